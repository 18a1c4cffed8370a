"""Modules, objects and hooks that the random networks are made with: what users write around torch's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Output:
    """What a network may return."""

    logits: Tensor
    features: Tensor | None = None


class Box:
    """An object that holds layers and is no module."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def run(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Holder(nn.Module):
    """Parameters that another module computes with."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.5))


class Wrapped(nn.Module):
    """A layer one level down."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class ConvNorm(nn.Conv2d):
    """A convolution that holds its norm, as in detection frameworks."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class UnbiasedConv(nn.Conv2d):
    """A convolution whose forward leaves its bias out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


class StandardizedConv(nn.Conv2d):
    """A convolution by a weight that is computed at every call."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        w = (self.weight - mean) * (var + 1e-5).rsqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of pictures."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class FrozenNorm(nn.Module):
    """A BatchNorm written out on buffers, as in detectors."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.randn(channels))
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = w * (self.running_var.reshape(1, -1, 1, 1) + self.eps).rsqrt()
        return x * scale + (b - self.running_mean.reshape(1, -1, 1, 1) * scale)


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as in timm."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.act = nn.ReLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(x)


class CountingNorm(nn.BatchNorm2d):
    """A norm whose forward does something beside the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class SqueezeExcite(nn.Module):
    """A gate by the mean of each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * self.up(F.relu(self.norm(self.down(gate)))).sigmoid()


class Domains(nn.Module):
    """A norm for each domain."""

    def __init__(self, norm: type[nn.Module], channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(channels) for _ in range(2))

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.norms[domain](x)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


# hooks and patches


def watch(module: nn.Module, *_: Any) -> None:
    """A hook that changes nothing."""


def double_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def double_convolutions(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A hook of all modules that changes what some of them return."""
    return output * 2 if isinstance(module, nn.modules.conv._ConvNd) else output


def shift_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return (inputs[0] + 1, *inputs[1:])


def patch_forward(module: nn.Module) -> None:
    """Give an instance a forward of its own."""
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) * 2


def patch_transparent(module: nn.Module) -> None:
    """Give an instance a forward that calls its class's."""
    module.forward = type(module).forward.__get__(module)


def patch_conv(module: nn.Module) -> None:
    """Give an instance a convolution of its own."""
    original = module._conv_forward
    module._conv_forward = lambda x, weight, bias: original(x, weight, None)
