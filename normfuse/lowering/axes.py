"""Axes of any size: what the user writes, what the exporter takes, and whether the file has them."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import LoweringError

DynamicAxes = Iterable[str] | Mapping[str, Iterable[int] | Mapping[int, str]]
Axes = dict[str, dict[int, str]]


def parse_axes(axes: DynamicAxes | None, named: Mapping[str, Any]) -> Axes:
    """Return ``{input: {axis: label}}`` for the dynamic axes of the inputs; a text without a name means the first.

    Raises:
        LoweringError: A text is not of the form, or there is no such tensor or axis among the inputs.
    """
    parsed = _from_mapping(axes) if isinstance(axes, Mapping) else _from_texts(axes or (), next(iter(named), ""))
    for name, labels in parsed.items():
        if not isinstance(named.get(name), Tensor):
            raise LoweringError(f"dynamic axis of {name!r}: the inputs of forward are {', '.join(named)}")
        if max(labels) >= named[name].dim():
            raise LoweringError(f"dynamic axis {max(labels)} of {name!r}: it has {named[name].dim()} axes")
    return parsed


def _from_mapping(axes: Mapping[str, Iterable[int] | Mapping[int, str]]) -> Axes:
    return {
        name: dict(given) if isinstance(given, Mapping) else {axis: label(name, axis) for axis in given}
        for name, given in axes.items()
    }


def _from_texts(axes: Iterable[str], only: str) -> Axes:
    parsed: Axes = collections.defaultdict(dict)
    for text in axes:
        place, _, given = text.partition("=")
        name, _, axis = place.rpartition(":")
        if not axis.isdigit() or (given and not given.isidentifier()):
            raise LoweringError(f"dynamic axis {text!r} is not of the form name:axis or name:axis=label")
        parsed[name or only][int(axis)] = given or label(name or only, int(axis))
    return dict(parsed)


def dynamic_shapes(axes: Axes, named: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the exporter's description of the inputs: a dimension for each dynamic axis, None for a static input."""
    labels = {label for names in axes.values() for label in names.values()}
    dims = {label: torch.export.Dim(label, min=1) for label in labels}
    shapes = {name: {axis: dims[label] for axis, label in names.items()} for name, names in axes.items()}
    return {name: shapes.get(name) for name in named} if shapes else None


def label(name: str, axis: int) -> str:
    """Return what an axis is called that was given no name."""
    return "batch" if axis == 0 else f"{name}_{axis}"


def require_dynamic(model: Any, axes: Axes) -> None:
    """Refuse a file in which the exporter silently fixed an axis that was to be dynamic."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    for name, labels in axes.items():
        for axis in labels:
            if name in shapes and not shapes[name][axis].dim_param:
                size = shapes[name][axis].dim_value
                raise LoweringError(f"axis {axis} of {name!r} cannot be dynamic: the model fixes its size to {size}")
