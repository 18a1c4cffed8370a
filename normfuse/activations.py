"""What the activations of a model would lose in a narrower floating-point type, layer by layer, on data.

float16 ends at 65504 and loses digits below 6e-5. A value beyond its end becomes infinite and ends as NaN; a norm that
squares its input in float16 overflows from 256 on, although what it reads and writes is in range.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import rerun
from normfuse.capture import eval_mode
from normfuse.graph import Inputs
from normfuse.norms import is_norm
from normfuse.outputs import flatten


@dataclass(slots=True)
class ActivationRange:
    """The range of what one module returned on the data, and what becomes of it in the target type.

    Attributes:
        name: Qualified name of the module; empty for the model itself.
        layer: Its class name.
        dtype: The target type: ``"float16"``.
        largest: Largest magnitude of a finite element.
        overflowed: How many elements become infinite.
        subnormal: Fraction of the elements that are subnormal in the target type and so keep fewer digits.
        flushed: Fraction of the elements that become zero, without being zero.
        squares_overflow: Whether it is a norm whose input has squares out of the range of the target type.
    """

    name: str
    layer: str
    dtype: str
    largest: float = 0.0
    overflowed: int = 0
    subnormal: float = 0.0
    flushed: float = 0.0
    squares_overflow: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        squares = ", squares of its input overflow" if self.squares_overflow else ""
        return f"{self.name or 'the model'} ({self.layer}) reaches {self.largest:.3g}{squares}"


def activation_ranges(
    model: nn.Module, data: Iterable[Inputs], dtype: torch.dtype = torch.float16
) -> tuple[ActivationRange, ...]:
    """Return the range of what every module returned, in the order in which they first returned something.

    A tensor that several modules hand on counts for the innermost.

    Args:
        model: The model; it runs in its own precision, in eval mode.
        data: What it runs on, item by item as example inputs.
        dtype: The floating-point type that it is to be cast to.

    Raises:
        ValueError: There is no data.
    """
    watch = _Watch(model, dtype)
    with watch, eval_mode(model):
        for inputs in data:
            watch.begin()
            rerun.run(model, inputs)
    if not watch.runs:
        raise ValueError("there is no data to find the ranges of the activations on")
    return tuple(watch.finished())


def overflowing(ranges: Iterable[ActivationRange]) -> tuple[ActivationRange, ...]:
    """Return those with elements that become infinite."""
    return tuple(one for one in ranges if one.overflowed)


class _Watch:
    """Hooks on every module that gather what it returns."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.found: dict[str, ActivationRange] = {}
        self.counts: dict[str, int] = {}
        self.seen: list[Tensor] = []  # held, so that no id is used again within a run
        self.runs = 0
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        self.seen, self.runs = [], self.runs + 1

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            entry = self.found.setdefault(name, self._new(name, module))
            if is_norm(module):
                limit = math.sqrt(torch.finfo(self.dtype).max)
                entry.squares_overflow |= any(bool((x.abs() > limit).any()) for x in _floating(args))
            for tensor in _floating(output):
                if not any(tensor is other for other in self.seen):
                    self.seen.append(tensor)
                    self._add(entry, tensor)

        return hook

    def _new(self, name: str, module: nn.Module) -> ActivationRange:
        return ActivationRange(name, type(module).__name__, str(self.dtype).removeprefix("torch."))

    def _add(self, entry: ActivationRange, tensor: Tensor) -> None:
        wide = tensor.detach().float()
        narrow, finite = wide.to(self.dtype).float(), wide.isfinite()
        nonzero, tiny = wide != 0, torch.finfo(self.dtype).tiny
        entry.largest = max(entry.largest, float(wide.abs().where(finite, 0.0).max()))
        entry.overflowed += int((finite & narrow.isinf()).sum())
        entry.subnormal += int((nonzero & (narrow != 0) & (narrow.abs() < tiny)).sum())  # counts until finished
        entry.flushed += int((nonzero & (narrow == 0)).sum())
        self.counts[entry.name] = self.counts.get(entry.name, 0) + tensor.numel()

    def finished(self) -> Iterator[ActivationRange]:
        for name, entry in self.found.items():
            if count := self.counts.get(name, 0):
                entry.subnormal, entry.flushed = entry.subnormal / count, entry.flushed / count
                yield entry


def _floating(values: Any) -> list[Tensor]:
    leaves = (leaf for _, leaf in flatten(values))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
