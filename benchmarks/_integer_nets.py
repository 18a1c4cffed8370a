"""Networks that are trained on integers, and norms that read and pass on integers of as many bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.layers import L1BatchNorm2d, L1LayerNorm
from normfuse.quantization import ShiftQuant

MakeNorm = Callable[[int], nn.Module]


class _Rounded(torch.autograd.Function):
    """Rounds a value to nearest on its way forward and its gradient stochastically on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, nearest: ShiftQuant, stochastic: ShiftQuant) -> Tensor:
        ctx.settings = dim, stochastic
        return nearest(x, dim=dim).dequantize()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        dim, stochastic = ctx.settings
        return stochastic(grad_outputs[0], dim=dim).dequantize(), None, None, None


class QuantizedNorm(nn.Module):
    """A norm whose input and whose gradient are integers times the scales of ShiftQuant."""

    def __init__(self, norm: nn.Module, dim: int, bits: int, groups: int) -> None:
        super().__init__()
        self.norm, self.dim = norm, dim
        self.nearest, self.stochastic = ShiftQuant(bits, groups), ShiftQuant(bits, groups, "stochastic")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(_Rounded.apply(x, self.dim, self.nearest, self.stochastic))


def batch_norm(bits: int | None, groups: int) -> MakeNorm:
    """Return what makes the L1 norms of a convolutional network; in floating point without ``bits``."""

    def make(width: int) -> nn.Module:
        norm = L1BatchNorm2d(width, gaussian=True)
        return norm if bits is None else QuantizedNorm(norm, 1, bits, groups)

    return make


def layer_norm(bits: int | None, groups: int) -> MakeNorm:
    """Return what makes the L1 norms of a transformer."""

    def make(width: int) -> nn.Module:
        norm = L1LayerNorm(width, gaussian=True)
        return norm if bits is None else QuantizedNorm(norm, -1, bits, groups)

    return make


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norms and a shortcut, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: MakeNorm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        same = stride == 1 and inputs == outputs
        conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(conv, norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A stem and three blocks of 16, 32 and 64 channels on ``(B, 1, 28, 28)``: 10 logits."""

    def __init__(self, norm: MakeNorm) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
        self.norm = norm(16)
        self.blocks = nn.Sequential(
            BasicBlock(16, 16, 2, norm), BasicBlock(16, 32, 2, norm), BasicBlock(32, 64, 1, norm)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(images)))).mean((2, 3)))
