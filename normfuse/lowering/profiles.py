"""The shapes an engine is built for: smallest, usual and largest of every input that has an axis of any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from normfuse.errors import LoweringError
from normfuse.lowering.axes import Axes, label

Shape = tuple[int, ...]
Shapes = Mapping[str | None, Shape]


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes of one input.

    Attributes:
        smallest: Below it the engine refuses the input.
        usual: What the kernels are chosen for.
        largest: Above it the engine refuses the input.
    """

    smallest: Shape
    usual: Shape
    largest: Shape

    @property
    def dynamic(self) -> tuple[int, ...]:
        """The axes whose size may vary."""
        return tuple(i for i, (low, high) in enumerate(zip(self.smallest, self.largest, strict=True)) if low != high)

    def to_list(self) -> list[list[int]]:
        """Return the three shapes as JSON-ready values."""
        return [list(self.smallest), list(self.usual), list(self.largest)]


@dataclass(frozen=True, slots=True)
class ShapeRequest:
    """Shapes by the name of the input; the name None is that of a single input.

    Attributes:
        smallest: ``--min-shape``.
        usual: ``--opt-shape``; of inputs that are left out, the shape of the example, or the largest if that is beyond.
        largest: ``--max-shape``.
    """

    smallest: Shapes = field(default_factory=dict)
    usual: Shapes = field(default_factory=dict)
    largest: Shapes = field(default_factory=dict)

    def profiles(self, named: Mapping[str, Any]) -> dict[str, Profile]:
        """Return the profile of each input that has one.

        Args:
            named: The example input, by name.

        Raises:
            LoweringError: There is no such input, one of the three shapes is missing, or they do not fit each other or
                the example.
        """
        tensors = {name: tuple(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
        small, usual, large = (_by_name(shapes, tensors) for shapes in (self.smallest, self.usual, self.largest))
        if small.keys() != large.keys() or usual.keys() - small.keys():
            raise LoweringError("a profile needs the smallest and the largest shape of each of its inputs")
        return {name: _profile(name, small[name], usual.get(name), large[name], tensors[name]) for name in small}


def _by_name(shapes: Shapes, tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    if None in shapes and len(tensors) > 1:
        raise LoweringError(f"a profile of this model needs names: its inputs are {', '.join(tensors)}")
    found = {next(iter(tensors), "") if name is None else name: tuple(shape) for name, shape in shapes.items()}
    unknown = [name for name in found if name not in tensors]
    if unknown:
        raise LoweringError(f"profile of {unknown[0]!r}: the inputs are {', '.join(tensors)}")
    return found


def _profile(name: str, small: Shape, usual: Shape | None, large: Shape, example: Shape) -> Profile:
    within = len(example) == len(large) and all(e <= m for e, m in zip(example, large, strict=True))
    middle = usual or (tuple(map(max, example, small)) if within and len(small) == len(large) else large)
    if not len(small) == len(middle) == len(large) == len(example):
        ranks = "/".join(str(len(shape)) for shape in (small, middle, large))
        raise LoweringError(f"profile of {name!r}: its shapes have {ranks} axes, the input has {len(example)}")
    if not all(a <= b <= c for a, b, c in zip(small, middle, large, strict=True)):
        raise LoweringError(f"profile of {name!r}: min <= opt <= max is not so for {small}, {middle}, {large}")
    for axis, (low, size, high) in enumerate(zip(small, example, large, strict=True)):
        if low == high != size:
            raise LoweringError(f"profile of {name!r}: axis {axis} is {low}, but {size} in the example input")
    return Profile(small, middle, large)


def with_profiles(axes: Axes, profiles: Mapping[str, Profile]) -> Axes:
    """Return the dynamic axes with those of the profiles.

    Raises:
        LoweringError: An axis is dynamic and no profile says how large it gets.
    """
    for name, labels in axes.items():
        missing = set(labels) - set(profiles[name].dynamic if name in profiles else ())
        if missing:
            raise LoweringError(f"axis {min(missing)} of {name!r} is dynamic: an engine needs its min and max shape")
    found = {name: {axis: label(name, axis) for axis in profile.dynamic} for name, profile in profiles.items()}
    merged = {name: names | axes.get(name, {}) for name, names in found.items()}
    return {name: names for name, names in merged.items() if names}
