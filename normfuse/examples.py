"""What a model is called on, once or several times.

One call is a tensor, a tuple of positional arguments or a mapping of keyword arguments; anything else is one argument.
Several calls are :class:`Examples`, and a list may be short for it. A list that holds a tuple is several calls:
``[(images,), (images, 1)]``. A list of tensors or mappings is *one* argument where the model takes it, as detectors do,
and several calls otherwise (:func:`normfuse.capture.understood`). A tuple around a list says that it is one argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One call of a model; :class:`Examples`, or a list that is short for it, where several are taken."""


@dataclass(frozen=True, init=False)
class Examples:
    """Several calls of one model, which together run every part of it that is used.

    Args:
        calls: One call each: a tensor, a tuple of positional arguments or a mapping of keyword arguments.

    Raises:
        ValueError: There is none.

    Example:
        >>> examples = normfuse.Examples(images, (images, 1), {"x": images, "domain": 2})  # doctest: +SKIP
        >>> folded = normfuse.fold(model, example_inputs=examples)  # doctest: +SKIP
    """

    calls: tuple[Inputs, ...]

    def __init__(self, *calls: Inputs) -> None:
        if not calls:
            raise ValueError("Examples needs at least one call")
        object.__setattr__(self, "calls", calls)


def calls_of(inputs: Inputs | Examples) -> tuple[Inputs, ...]:
    """Return each call that example inputs stand for."""
    if isinstance(inputs, Examples):
        return inputs.calls
    several = could_be_several(inputs) and any(type(item) is tuple for item in inputs)
    return tuple(cast(list[Any], inputs)) if several else (inputs,)


def could_be_several(inputs: Inputs | Examples) -> bool:
    """Whether inputs are a list of which each item could be a call."""
    calls = inputs if type(inputs) is list else ()
    return bool(calls) and all(isinstance(item, Tensor | Mapping) or type(item) is tuple for item in calls)
