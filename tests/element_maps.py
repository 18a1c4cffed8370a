"""Maps ``y = s x + t`` element by element, and what operations do to them, by their mathematics alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Map:
    """A map element by element: scale and shift have the shape of the value, and are NaN where nobody looks."""

    scale: Tensor
    shift: Tensor

    @property
    def shifts(self) -> bool:
        return bool((self.shift.nan_to_num(0) != 0).any())

    @property
    def ordered(self) -> bool:
        return bool((self.scale.nan_to_num(1) >= 0).all())

    @property
    def trivial(self) -> bool:
        return not self.shifts and bool((self.scale.nan_to_num(1) == 1).all())

    def each(self, function: Callable[[Tensor], Tensor]) -> Map:
        return Map(function(self.scale), function(self.shift))

    def along(self, axis: int) -> Map:
        """Return the map with size 1 along an axis it does not vary along."""
        return self.each(lambda t: t.nan_to_num(-math.inf).amax(axis, keepdim=True).nan_to_num(neginf=math.nan))

    def varies(self, *axes: int) -> bool:
        """Whether values that are not free differ along one of the axes."""
        pairs = [(t, s) for a in axes for t, s in zip(self.both, self.along(a).both, strict=True)]
        return any(bool(((t != s) & ~t.isnan()).any()) for t, s in pairs)

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.shift

    def bound(self) -> Map:
        """Return the map with identity where it is free."""
        return Map(self.scale.nan_to_num(1), self.shift.nan_to_num(0))


Rule = Callable[[Map], "Map | None"]


def same(m: Map) -> Map:
    return m


def never(m: Map) -> None:
    return None


def ordered(m: Map) -> Map | None:
    return m if m.ordered else None


def rectifier(slope: Tensor) -> tuple[Rule, Rule]:
    """``y = x`` above zero and ``slope x`` below: a constant channel stays constant, any other takes no shift."""

    def through(m: Map, constants: Callable[[Tensor], Tensor]) -> Map | None:
        if not m.ordered or bool(((m.scale.nan_to_num(1) != 0) & (m.shift.nan_to_num(0) != 0)).any()):
            return None
        shift = constants(m.shift.nan_to_num(0))
        return None if bool(shift.isnan().any()) else Map(m.scale, torch.where(m.shift.isnan(), torch.nan, shift))

    def back(t: Tensor) -> Tensor:
        return torch.where(t >= 0, t, torch.where(slope > 0, t / slope, torch.nan))

    return lambda m: through(m, back), lambda m: through(m, lambda t: t.clamp(min=0) + slope * t.clamp(max=0))


def scale_only(m: Map) -> Map | None:
    return None if m.shifts else m


def times(factor: Tensor) -> tuple[Rule, Rule]:
    """``y = f x``: backwards the shift is divided, forwards it is multiplied."""

    def back(m: Map) -> Map | None:
        return (
            None if m.shifts and bool((factor == 0).any()) else Map(m.scale, m.shift / factor if m.shifts else m.shift)
        )

    return back, lambda m: Map(m.scale, m.shift * factor)


def plus(number: float) -> tuple[Rule, Rule]:
    """``y = x + k``."""
    return (
        lambda m: Map(m.scale, m.shift + (m.scale - 1) * number),
        lambda m: Map(m.scale, m.shift + (1 - m.scale) * number),
    )


def moved(function: Callable[[Tensor], Tensor], shape: Shape) -> tuple[Rule, Rule, Shape]:
    """``y.flat[j] = x.flat[i(j)]``: equal sources must want equal maps; what is not shown keeps its values."""
    index = function(torch.arange(math.prod(shape)).reshape(shape))

    def back(m: Map) -> Map | None:
        result = Map(torch.full(shape, math.nan).double(), torch.full(shape, math.nan).double())
        for target, wanted in zip(result.both, m.both, strict=True):
            seen = ~wanted.isnan().reshape(-1)
            target.view(-1)[index.reshape(-1)[seen]] = wanted.reshape(-1)[seen]
            if bool((target.view(-1)[index] != wanted).logical_and(~wanted.isnan()).any()):
                return None
        return result

    return back, lambda m: m.each(lambda t: t.reshape(-1)[index]), tuple(index.shape)


def windowed(rule: Rule, axes: tuple[int, ...], before: Shape, after: Shape) -> tuple[Rule, Rule]:
    """An operation that mixes values along ``axes``: the map may not vary along them, and obeys ``rule``."""

    def resized(target: Shape) -> Rule:
        def apply(m: Map) -> Map | None:
            if m.varies(*axes) or rule(m) is None:
                return None
            for axis in axes:
                m = m.along(axis)
            return m.each(lambda t: t.expand(target).clone())

        return apply

    return resized(before), resized(after)
