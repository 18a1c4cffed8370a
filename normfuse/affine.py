"""A fixed per-channel map ``y = scale * x + shift`` over an activation.

Scale and shift are float64 tensors of the activation's rank with size 1 along every axis they do not depend on, so for
BatchNorm2d both are ``(1, C, 1, 1)``. Composition, ``m after n``, is ``(m.scale n.scale, m.scale n.shift + m.shift)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normfuse.base import Reason, Refused
from normfuse.numerics import exact, preimage


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """``y = scale * x + shift``, both float64 and broadcastable to the activation, of its rank."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def along(cls, axis: int, rank: int, scale: Tensor, shift: Tensor) -> AffineMap:
        """Return the map of two vectors of length C along one axis of an activation of this rank."""
        shape = [1] * rank
        shape[axis] = -1
        return cls(exact(scale).reshape(shape), exact(shift).reshape(shape))

    @property
    def rank(self) -> int:
        """The rank of the activation."""
        return self.scale.dim()

    @property
    def has_shift(self) -> bool:
        """Whether any shift is not zero."""
        return bool((self.shift != 0).any())

    @property
    def keeps_order(self) -> bool:
        """Whether no scale is below zero, so that a larger value never becomes the smaller one."""
        return bool((self.scale >= 0).all())

    @property
    def is_identity(self) -> bool:
        """Whether the map changes nothing."""
        return not self.has_shift and bool((self.scale == 1).all())

    def after(self, inner: AffineMap) -> AffineMap:
        """Return the map that applies ``inner`` first and this one second."""
        return AffineMap(self.scale * inner.scale, self.scale * inner.shift + self.shift)

    def preimage(self, value: float) -> Tensor | None:
        """Return what the map takes to ``value``, as :func:`normfuse.numerics.preimage`."""
        return preimage(self.scale, self.shift, value)

    def only_scale(self) -> AffineMap:
        """Return the map without its shift."""
        return AffineMap(self.scale, torch.zeros_like(self.shift))

    def only_shift(self) -> AffineMap:
        """Return the map without its scale."""
        return AffineMap(torch.ones_like(self.scale), self.shift)

    def transform(self, function: object) -> AffineMap:
        """Return the map with ``function`` applied to scale and shift alike."""
        return AffineMap(function(self.scale), function(self.shift))  # type: ignore[operator]

    def equals(self, other: AffineMap) -> bool:
        """Whether both maps are the same to the last bit."""
        same_shape = self.scale.shape == other.scale.shape and self.shift.shape == other.shift.shape
        return same_shape and torch.equal(self.scale, other.scale) and torch.equal(self.shift, other.shift)

    def varies(self, axis: int) -> bool:
        """Whether the map depends on the place along an axis."""
        return self.scale.shape[axis] != 1 or self.shift.shape[axis] != 1

    def vectors(self, axis: int, size: int, layer: str) -> tuple[Tensor, Tensor]:
        """Return scale and shift as vectors of length ``size`` along ``axis``, for a layer of this name.

        Raises:
            Refused: The map depends on another axis as well, or is one of another number of channels.
        """
        axis %= self.rank
        for other in range(self.rank):
            if other != axis and self.varies(other):
                text = f"the map varies along axis {other}, the channels of {layer} lie along axis {axis}"
                raise Refused(Reason.AXIS, text)
        lengths = {self.scale.shape[axis], self.shift.shape[axis]} - {1, size}
        if lengths:
            raise Refused(Reason.AXIS, f"the map is one of {max(lengths)} channels, {layer} has {size}")
        return tuple(t.reshape(-1).expand(size) for t in (self.scale, self.shift))  # type: ignore[return-value]

    def require_constant(self, axes: tuple[int, ...], action: str) -> None:
        """Refuse where the map varies along one of these axes; the action is what is done there: ``"pool averages"``.

        Raises:
            Refused: It does, so an operation that mixes values along them cannot let it pass.
        """
        for axis in axes:
            if self.varies(axis):
                raise Refused(Reason.AXIS, f"{action} along axis {axis}, where the map varies")


def identity(shape: tuple[int, ...]) -> AffineMap:
    """Return the identity as a map over an activation of this shape, stored in full."""
    return AffineMap(torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))


def compress(full: AffineMap) -> AffineMap:
    """Return the same map with size 1 along every axis it does not depend on."""
    scale, shift = full.scale, full.shift
    for axis in range(full.rank):
        if scale.shape[axis] > 1 or shift.shape[axis] > 1:
            first = [t.narrow(axis, 0, 1) for t in (scale, shift)]
            if bool((scale == first[0]).all()) and bool((shift == first[1]).all()):
                scale, shift = first
    return AffineMap(scale, shift)


def fill(full: AffineMap) -> AffineMap:
    """Return a map, compressed; free places (NaN) repeat the others where those agree, and are identity elsewhere."""
    if not bool(full.scale.isnan().any()):
        return compress(full)
    for axis in range(full.rank):
        ends = [(_least(t, axis), -_least(-t, axis)) for t in (full.scale, full.shift)]
        if all(bool(((low == high) | low.isinf()).all()) for low, high in ends):
            full = AffineMap(*(torch.where(low.isinf(), torch.nan, low) for low, _ in ends))
    return compress(AffineMap(full.scale.nan_to_num(1.0), full.shift.nan_to_num(0.0)))


def _least(tensor: Tensor, axis: int) -> Tensor:
    return tensor.nan_to_num(torch.inf).amin(axis, keepdim=True)
