"""A fixed map ``y = scale * x + shift`` along one axis of an ONNX value, in float64.

Re-indexing by a reshape. Number the elements of a value ``l = 0, 1, ...`` in row-major order. Along an axis of size C
whose later axes hold S elements the channel of element l is ``(l // S) mod C``; the coordinate on an axis of size D and
stride T after the reshape is ``o = (l // T) mod D``. The channel is a function of ``o`` alone if T divides S and
``C S`` divides ``D T``, and then it is ``(o // (S / T)) mod C``. Nothing is asked about the axes before, so a batch of
unknown size does no harm, and common last axes of unknown size cancel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from normfuse.base import Reason, Refused

Dim = int | str | None


@dataclass(frozen=True, slots=True, eq=False)
class ChannelMap:
    """``y = scale * x + shift``: two float64 vectors of length C along ``axis``, counted from the front."""

    scale: np.ndarray
    shift: np.ndarray
    axis: int

    @property
    def size(self) -> int:
        """The number of channels C."""
        return self.scale.size

    @property
    def has_shift(self) -> bool:
        """Whether any shift is not zero."""
        return bool(np.any(self.shift != 0))

    @property
    def is_identity(self) -> bool:
        """Whether the map changes nothing."""
        return not self.has_shift and bool(np.all(self.scale == 1))

    @property
    def is_constant(self) -> bool:
        """Whether it is one scale and one shift for everything, so that its axis is no matter."""
        return bool(np.ptp(self.scale) == 0 and np.ptp(self.shift) == 0)

    def spread(self, axis: int, size: int) -> ChannelMap:
        """Return a constant map as one along this axis, which has this size."""
        return self.take(np.zeros(size, int), axis)

    def on(self, axis: int) -> ChannelMap:
        """Return the same vectors along another axis."""
        return replace(self, axis=axis)

    def with_shift(self, shift: np.ndarray | float) -> ChannelMap:
        """Return the map with another shift, a scalar or a vector of length C."""
        return replace(self, shift=np.broadcast_to(np.asarray(shift, np.float64), self.scale.shape))

    def take(self, indices: np.ndarray, axis: int) -> ChannelMap:
        """Return the map whose channel ``i`` along ``axis`` is channel ``indices[i]`` of this one."""
        return ChannelMap(self.scale[indices], self.shift[indices], axis)

    def aligned(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and shift of shape ``(C, 1, ..., 1)``, which broadcasts to a value of that rank."""
        shape = (self.size, *[1] * (rank - 1 - self.axis))
        return self.scale.reshape(shape), self.shift.reshape(shape)


def reshaped(m: ChannelMap, source: tuple[Dim, ...], target: tuple[Dim, ...], where: str) -> ChannelMap:
    """Return the map as seen after a reshape of ``source`` to ``target`` (a dim is a size, a symbol or unknown).

    Raises:
        Refused: ``AXIS`` where the elements of one channel do not stay together, ``RANK_UNKNOWN`` where a size that
            decides it is not known.
    """
    if _same(source[: m.axis + 1], target[: m.axis + 1]):
        return m
    if m.is_constant and target and isinstance(target[-1], int):
        return m.spread(len(target) - 1, target[-1])
    moved = f"{where} reshapes {source} to {target}"
    source, target = _without_common_tail(source, target, m.axis)
    stride = _product(source[m.axis + 1 :])
    if stride is None:
        raise Refused(Reason.RANK_UNKNOWN, f"{moved}, of unknown size", "fix the input shapes")
    for axis, size in enumerate(target):
        step = _product(target[axis + 1 :])
        if isinstance(size, int) and step and stride % step == 0 and (size * step) % (m.size * stride) == 0:
            return m.take(np.arange(size) // (stride // step) % m.size, axis)
    raise Refused(Reason.AXIS, f"{moved}, which mixes channels")


def _same(source: tuple[Dim, ...], target: tuple[Dim, ...]) -> bool:
    return len(source) == len(target) and all(a is not None and a == b for a, b in zip(source, target, strict=True))


def _without_common_tail(
    source: tuple[Dim, ...], target: tuple[Dim, ...], axis: int
) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    while len(source) > axis + 1 and target and source[-1] is not None and source[-1] == target[-1]:
        source, target = source[:-1], target[:-1]
    return source, target


def _product(dims: tuple[Dim, ...]) -> int | None:
    product = 1
    for dim in dims:
        if not isinstance(dim, int):
            return None
        product *= dim
    return product
