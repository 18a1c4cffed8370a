"""Random networks of convolutions, linear layers and norms on fixed statistics, and inputs for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.gradients import hard_norms

Draw = random.Random
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.Identity,
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.ReLU6(inplace=True),
    nn.SiLU,
    nn.Tanh,
    lambda: nn.Dropout(0.2),
)


class Residual(nn.Module):
    """A branch added to its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


class Joined(nn.Module):
    """Two layers on one input, side by side in front of one norm."""

    def __init__(self, one: nn.Module, other: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.one, self.other, self.norm = one, other, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.one(x), self.other(x)], 1))


@dataclass(frozen=True, slots=True)
class Case:
    """A network in float64, and the shapes of its inputs."""

    model: nn.Module
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self, seed: int) -> Tensor:
        """Return a batch."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shapes[seed % len(self.shapes)], generator=generator, dtype=torch.float64)


def random_case(draw: Draw) -> Case:
    """Return a network of some blocks, and a head."""
    if draw.random() < 0.2:
        return _multilayer(draw)
    dims, width = draw.choice((1, 2, 2, 2, 3)), draw.choice((2, 4))
    layers: list[nn.Module] = []
    channels = width
    for _ in range(draw.randint(1, 3)):
        block, channels = _block(draw, dims, channels)
        layers.append(block)
    layers += [_pool(dims), nn.Flatten(), nn.Linear(channels, 3)]
    shapes = tuple((batch, width, *[size] * dims) for batch, size in ((2, 6), (3, 5), (1, 8)))
    return Case(_ready(nn.Sequential(*layers), draw), shapes)


def _multilayer(draw: Draw) -> Case:
    layers: list[nn.Module] = []
    channels = 5
    for _ in range(draw.randint(1, 3)):
        out = draw.choice((3, 6))
        norm = nn.BatchNorm1d(out, affine=draw.random() < 0.9)
        layers += [nn.Linear(channels, out, bias=draw.random() < 0.5), norm, draw.choice(ACTIVATIONS)()]
        channels = out
    return Case(_ready(nn.Sequential(*layers, nn.Linear(channels, 3)), draw), ((4, 5), (2, 5), (7, 5)))


def _ready(model: nn.Module, draw: Draw) -> nn.Module:
    return hard_norms(model.double(), draw.randrange(1000))


def _pool(dims: int) -> nn.Module:
    return {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims](1)


def _block(draw: Draw, dims: int, channels: int) -> tuple[nn.Module, int]:
    """Return a block and the number of channels that it returns."""
    kind = draw.choice(("plain", "plain", "residual", "joined", "alone"))
    if kind == "alone":
        return nn.Sequential(draw.choice((nn.Identity, nn.ReLU, nn.SiLU))(), NORMS[dims](channels), nn.Tanh()), channels
    if kind == "residual":
        same = CONVOLUTIONS[dims](channels, channels, 3, padding=1, groups=draw.choice((1, channels)))
        return Residual(nn.Sequential(same, NORMS[dims](channels), draw.choice(ACTIVATIONS)())), channels
    out = draw.choice((2, 4, 6))
    if kind == "joined":
        parts = [CONVOLUTIONS[dims](channels, out, k, padding=k // 2, bias=k == 1) for k in (1, 3)]
        return nn.Sequential(Joined(*parts, NORMS[dims](2 * out)), draw.choice(ACTIVATIONS)()), 2 * out
    layers = [_convolution(draw, dims, channels, out)]
    if draw.random() < 0.15:
        layers.append({1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](2, stride=1, padding=1))
    norm = NORMS[dims](out, eps=draw.choice((1e-5, 1e-3)), affine=draw.random() < 0.9)
    return nn.Sequential(*layers, norm, draw.choice(ACTIVATIONS)()), out


def _convolution(draw: Draw, dims: int, channels: int, out: int) -> nn.Module:
    bias, groups = draw.random() < 0.5, draw.choice((1, 2))
    if draw.random() < 0.2:
        return TRANSPOSED[dims](channels, out, 2, stride=2, groups=groups, bias=bias)
    mode = draw.choice(("zeros", "zeros", "replicate"))
    stride, dilation = draw.choice(((1, 1), (2, 1), (1, 2)))
    options = {"stride": stride, "dilation": dilation, "padding": dilation, "padding_mode": mode}
    return CONVOLUTIONS[dims](channels, out, 3, groups=groups, bias=bias, **options)
