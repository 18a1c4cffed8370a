"""Matrices that are hard to quantize, the definition of what integers stand for, and layers made from others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.quantization import Precision, Quantized, ShiftQuantConv1d, ShiftQuantConv2d, ShiftQuantLinear


def spread(rows: int, columns: int, seed: int = 0, *, octaves: float = 6.0) -> Tensor:
    """Return a float64 matrix whose columns differ in range by up to ``octaves`` powers of two."""
    g = torch.Generator().manual_seed(seed)
    ranges = torch.exp2(-octaves * torch.rand(columns, generator=g, dtype=torch.float64))
    return torch.randn(rows, columns, generator=g, dtype=torch.float64) * ranges


def one_outlier(rows: int, columns: int) -> Tensor:
    x = spread(rows, columns)
    x[-1, -1] = 1e4
    return x


def zero_channels(rows: int, columns: int) -> Tensor:
    x = spread(rows, columns)
    x[:, ::2] = 0
    return x


def extremes(rows: int, columns: int) -> Tensor:
    """Every element is the largest or the smallest, so every integer is ``q`` or ``-q``."""
    return torch.where(spread(rows, columns) > 0, 3.7, -3.7).double()


def powers_of_two(rows: int, columns: int) -> Tensor:
    """Ranges that are exactly ``r_max 2^-g``, where a rounded logarithm would land one step off."""
    return torch.exp2(-(torch.arange(columns) % 9).double()).expand(rows, columns).contiguous()


RANGES: dict[str, Callable[[int, int], Tensor]] = {
    "random": spread,
    "one_outlier": one_outlier,
    "zero_channels": zero_channels,
    "all_zero": lambda rows, columns: torch.zeros(rows, columns, dtype=torch.float64),
    "equal_ranges": lambda rows, columns: torch.sign(spread(rows, columns)),
    "extremes": extremes,
    "powers_of_two": powers_of_two,
}


def product_by_definition(a: Quantized, b: Quantized) -> Tensor:
    """Return ``A B^T`` in float64: sums that float64 holds exactly, times the scales once."""
    left, right = (q.values.double() * shifts(q) for q in (a, b))
    return (left @ right.T) * (a.scale.double() * b.scale.double())


def shifts(q: Quantized) -> Tensor:
    """Return ``2**-shift``, broadcast along its axis."""
    return torch.exp2(-q.shift.double()).reshape([-1 if d == q.dim else 1 for d in range(q.values.dim())])


LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: ShiftQuantLinear,
    nn.Conv1d: ShiftQuantConv1d,
    nn.Conv2d: ShiftQuantConv2d,
}


def quantized(module: nn.Module, precision: Precision | None = None) -> Any:
    return LAYERS[type(module)].from_float(module, precision)


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random values whose channels (axis 1) differ in range."""
    g = torch.Generator().manual_seed(seed)
    ranges = torch.exp2(-6 * torch.rand(shape[1], generator=g)).reshape(-1, *[1] * (len(shape) - 2))
    return (torch.randn(shape, generator=g) * ranges).to(dtype)
