"""The ShiftQuant quantizer: one scale for a tensor, and a power of two for each channel of the reduction axis.

A *reconstruction* of "Towards Accurate and Efficient Sub-8-Bit Integer Training" (arXiv 2411.10948): a construction
with the properties that the paper states, not a quotation of its equations. For ``X`` of shape ``(M, K)`` whose axis
``K`` a product will sum over, ``q = 2^(bits-1) - 1`` and ``G`` groups:

    r_k   = max_m |X_mk|,   r_max = max_k r_k,   s_0 = r_max / q
    g_k   = the largest g in 0 .. G-1 with  r_k <= r_max 2^-g                (G-1 where r_k = 0)
    s_k   = s_0 2^-g_k,     Xq_mk = round(X_mk / s_k)  in  -q .. q,          X_mk ~ s_k Xq_mk

``g_k = clip(floor(log2(r_max / r_k)), 0, G-1)``, found by comparisons, so that no logarithm can land one step off.
Channels stay where they are. The error of an element is at most ``s_k / 2`` rounded to nearest; rounded stochastically
it is zero in expectation, with variance at most ``s_k^2 / 4``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MAX_GROUPS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A tensor as integers; ``values * scale * 2**-shift``, ``shift`` along ``dim``, is the tensor it stands for.

    Attributes:
        values: The integers, int8, of the shape of the tensor.
        scale: Base scale ``s_0``, 0-d; float64 for a float64 tensor, else float32.
        shift: Group index of each channel along ``dim``, int8, ``(K,)``.
        dim: The axis that ``shift`` runs along, counted from 0.
        bits: Width of the integers, sign included.
        groups: Number of groups; every shift is below it.
        dtype: Of the tensor that was quantized.
    """

    values: Tensor
    scale: Tensor
    shift: Tensor
    dim: int
    bits: int
    groups: int
    dtype: torch.dtype

    @property
    def limit(self) -> int:
        """The largest magnitude that ``bits`` can hold, ``q``."""
        return 2 ** (self.bits - 1) - 1

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.values.shape

    @property
    def T(self) -> Quantized:  # noqa: N802 - as torch names it
        """The transpose of a matrix; its shift runs along the other axis."""
        if self.values.dim() != 2:
            raise ValueError(f"only a matrix has a transpose here, not a tensor of {self.values.dim()} dimensions")
        return dataclasses.replace(self, values=self.values.T, dim=1 - self.dim)

    def channel_scales(self) -> Tensor:
        """Return ``s_k``, ``(K,)``, in the dtype of the scale."""
        return self.scale * powers_of_half(self.shift, self.scale.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor that the integers stand for, by default in the dtype that was quantized."""
        scales = self.channel_scales().reshape(along(self.dim, self.values.dim()))
        return (self.values * scales).to(self.dtype if dtype is None else dtype)


@dataclass(frozen=True, slots=True)
class ShiftQuant:
    """The quantizer: call it on a tensor.

    Args:
        bits: Width of the integers, 3 to 8, sign included.
        groups: Number of power-of-two scales, 1 to 32; one group is quantization per tensor.
        rounding: ``"nearest"`` (ties to even) or ``"stochastic"`` (unbiased, for gradients).
        range: ``"max"``: nothing is clipped. Or a percentile above 0, at most 100: ``r_k`` is then that percentile of
            ``|X_mk|`` over ``m`` (nearest rank), and larger elements are clipped to ``r_max 2^-g_k``. A channel
            whose percentile is zero keeps its maximum, so that none with content is lost.

    Raises:
        ValueError: An argument out of its range.
    """

    bits: int = 8
    groups: int = 4
    rounding: Literal["nearest", "stochastic"] = "nearest"
    range: Literal["max"] | float = "max"

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise ValueError(f"bits must be 3 to 8, not {self.bits}")
        if not 1 <= self.groups <= MAX_GROUPS:
            raise ValueError(f"groups must be 1 to {MAX_GROUPS}, not {self.groups}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f'rounding must be "nearest" or "stochastic", not {self.rounding!r}')
        if self.range != "max" and not (isinstance(self.range, int | float) and 0 < self.range <= 100):
            raise ValueError(f'range must be "max" or a percentile above 0, at most 100, not {self.range!r}')

    def __call__(self, x: Tensor, dim: int = -1, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize ``x`` with one shift for each index of ``dim``, the axis that a product will sum over.

        Args:
            x: Real floating-point tensor of one dimension or more, of any dtype; it may be empty.
            dim: The reduction axis, of length K.
            generator: Of the random numbers of stochastic rounding; torch's default otherwise.

        Raises:
            TypeError: ``x`` is not of floating point.
            ValueError: ``x`` holds NaN or infinity, or has no dimension; or a generator without stochastic rounding.
        """
        _require_quantizable(x)
        if generator is not None and self.rounding != "stochastic":
            raise ValueError('generator is for rounding="stochastic"')
        dim = range(x.dim())[dim]
        work = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        ranges = channel_ranges(work, dim, self.range)
        scale, shift = self.scales(ranges)
        steps = scale * powers_of_half(shift, scale.dtype)
        scaled = work / steps.reshape(along(dim, x.dim()))
        rounded = self._round(scaled, generator).clamp_(-self.limit, self.limit)
        return Quantized(rounded.to(torch.int8), scale, shift, dim, self.bits, self.groups, x.dtype)

    @property
    def limit(self) -> int:
        """The largest magnitude that ``bits`` can hold, ``q``."""
        return 2 ** (self.bits - 1) - 1

    def scales(self, ranges: Tensor) -> tuple[Tensor, Tensor]:
        """Return the base scale, 0-d, and the shifts, int8 ``(K,)``, for the ranges ``r_k``, ``(K,)``.

        The base scale is never below ``2^(G-1)`` times the smallest normal number, so that every ``s_k`` is normal:
        smaller tensors are quantized with larger steps than theirs, or to zero. Nor is ``q s_0`` ever infinite.
        """
        largest = ranges.max() if ranges.numel() else ranges.new_zeros(())
        info = torch.finfo(ranges.dtype)
        least, most = info.tiny * 2 ** (self.groups - 1), info.max / self.limit * (1 - info.eps)
        return (largest / self.limit).clamp(least, most), group_indices(ranges, self.groups)

    def _round(self, scaled: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.rounding == "nearest":
            return scaled.round_()
        draw = torch.rand(scaled.shape, generator=generator, dtype=scaled.dtype, device=scaled.device)
        lower = scaled.floor()
        return lower.add_(draw < scaled.sub_(lower))  # an integer has no fraction, and stays


def group_indices(ranges: Tensor, groups: int) -> Tensor:
    """Return ``g_k``, int8 ``(K,)``: how often ``r_max`` can be halved and still be no less than ``r_k``."""
    if groups == 1 or ranges.numel() == 0:
        return torch.zeros(ranges.shape, dtype=torch.int8, device=ranges.device)
    halvings = ranges.max() * torch.tensor(
        [2.0**-g for g in range(1, groups)], dtype=ranges.dtype, device=ranges.device
    )
    return (ranges.unsqueeze(-1) <= halvings).sum(-1).to(torch.int8)


def channel_ranges(x: Tensor, dim: int, kind: Literal["max"] | float = "max") -> Tensor:
    """Return ``r_k``, ``(K,)``: the largest ``|x|`` of each channel of ``dim``, or a percentile of them.

    Raises:
        ValueError: ``x`` holds NaN or infinity.
    """
    if x.numel() == 0:
        return x.new_zeros(x.shape[dim])
    others = [d for d in range(x.dim()) if d != dim]
    largest = torch.maximum(x.amax(others), -x.amin(others)) if others else x.abs()  # without a copy for abs
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("cannot quantize NaN or infinity: find where the tensor stopped being finite")
    if kind == "max" or not others:
        return largest
    rows = x.abs().movedim(dim, -1).reshape(-1, x.shape[dim])
    rank = max(1, math.ceil(float(kind) / 100 * len(rows)))
    percentile = rows.kthvalue(min(rank, len(rows)), dim=0).values
    return torch.where(percentile > 0, percentile, largest)


def powers_of_half(shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``2**-shift``, exactly, of the shape of ``shift``."""
    table = torch.tensor([2.0**-g for g in range(MAX_GROUPS)], dtype=dtype, device=shift.device)
    return table[shift.long()]


def along(dim: int, dims: int) -> list[int]:
    """Return the shape that broadcasts a vector along axis ``dim`` of a tensor of ``dims`` dimensions."""
    return [-1 if d == dim else 1 for d in range(dims)]


def _require_quantizable(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"a tensor of floating point is quantized, not one of {x.dtype}")
    if x.dim() == 0:
        raise ValueError("a tensor without dimensions has no axis to group: reshape it to (1,)")
