"""Nested values: what a model takes and what it returns, as named tensors.

Inputs are one tensor, a tuple of positional arguments, or a mapping of keyword arguments (a list is *one* argument,
as detectors take it). Outputs are any nesting of mappings, sequences and dataclasses.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.graph import Inputs


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(name, leaf)`` for every leaf that is not None: ``("aux[0].boxes", tensor)``; the root is ``"output"``.

    Python numbers become tensors. Anything else that is not a container is a leaf of its own.
    """
    if value is None:
        return
    children = _children(value)
    if children is None:
        yield name or "output", _as_tensor(value)
        return
    for key, child in children:
        yield from flatten(child, name + key if name else key.removeprefix("."))


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, Mapping):
        return [(f".{key}", child) for key, child in value.items()]
    if isinstance(value, list | tuple):
        names = getattr(value, "_fields", None)
        return [(f".{names[i]}" if names else f"[{i}]", child) for i, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _as_tensor(leaf: Any) -> Any:
    return torch.tensor(leaf) if isinstance(leaf, bool | int | float | complex) else leaf


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with ``function`` applied to every tensor of its mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(child, function) for key, child in value.items()}
    if isinstance(value, list | tuple):
        children = [map_tensors(child, function) for child in value]
        return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)
    return value


def leaves(output: Any) -> dict[str, Any]:
    """Return copies of what a model returned, by name as :func:`flatten` has them; later runs change none."""
    return {name: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for name, leaf in flatten(output)}


def copied(inputs: Any) -> Any:
    """Return inputs of the same types with every tensor copied, as a model may write into what it is given.

    A tensor that stands at two places is one tensor again. Objects that cannot be copied are handed on.
    """
    memo = {id(tensor): tensor.detach().clone() for tensor in input_tensors(inputs)}
    try:
        return copy.deepcopy(inputs, memo)
    except Exception:  # an object of the user's may refuse in any way
        return inputs


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``inputs`` as positional and keyword arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs, {}) if type(inputs) is tuple else ((inputs,), {})


def named_inputs(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the given arguments under the names that the model's ``forward`` has for them, in its order.

    Raises:
        TypeError: ``forward`` does not take these arguments.
    """
    args, kwargs = arguments(inputs)
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def describe(model: nn.Module, inputs: Inputs) -> str:
    """Return inputs for people: ``"x:1x3x224x224 float32"``."""
    entries = specification(model, inputs)
    return ", ".join(f"{entry['name']}:{'x'.join(map(str, entry['shape']))} {entry['dtype']}" for entry in entries)


def specification(model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
    """Return name, shape and type of each tensor of the inputs, as JSON-ready values."""
    try:
        named: Any = named_inputs(model, inputs)
    except (TypeError, ValueError):
        named = inputs
    tensors = [(name, leaf) for name, leaf in flatten(named) if isinstance(leaf, Tensor)]
    return [
        {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors
    ]


def input_tensors(inputs: Any) -> Sequence[Tensor]:
    """Return the tensors among nested inputs, in order."""
    return [leaf for _, leaf in flatten(inputs) if isinstance(leaf, Tensor)]


def resized(inputs: Any, batch: int) -> Any:
    """Return inputs with ``batch`` rows, those given by turns, where a tensor has as many rows as the first one."""
    given = input_tensors(inputs)[0].shape[0]

    def resize(tensor: Tensor) -> Tensor:
        rows = torch.arange(batch, device=tensor.device) % given
        return tensor[rows] if tensor.dim() and tensor.shape[0] == given else tensor

    return map_tensors(inputs, resize)
