"""What a manifest may ask for is no larger than its file: structure that was saved fits the tensors beside it.

An architecture and its arguments, and the layers that edits put in, are first built without memory (on torch's meta
device) and their elements counted. They may have :data:`SPARE` times those of the file, and :data:`ALWAYS` more: a
folded model has fewer tensors than the one it is built from, and buffers that are not saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import architectures, surgery
from normfuse.errors import LoadError
from normfuse.names import is_word

SPARE = 4
ALWAYS = 20_000_000
MOST_ARGUMENTS = 1000
LARGEST_NUMBER = 1_000_000


def require_architecture(spec: str, kwargs: Mapping[str, Any], state: Mapping[str, Any], path: object) -> None:
    """Refuse an architecture that a file asks for, if it is larger than the tensors of the file.

    Args:
        spec: Of timm or torchvision.
        kwargs: Its arguments, as the file gives them; none is always of a size that its package chose.
        state: The tensors of the file.
        path: The file, for errors.

    Raises:
        LoadError: It is too large, or its arguments are not numbers and words.
    """
    if not kwargs:
        return
    values = list(_leaves(kwargs))
    if len(values) > MOST_ARGUMENTS or not all(map(_is_plain_argument, values)):
        raise LoadError(f"{path}: its arguments for {spec} are not a few numbers and words; pass --arch {spec}")
    try:
        with torch.device("meta"):
            model = architectures.build(spec, kwargs)
    except LoadError as error:
        raise LoadError(
            f"{path}: {spec} with the arguments in the file cannot be measured; pass --arch: {error}"
        ) from error
    _require(_elements(model), state, f"{spec} with the arguments in it", path)


def require_edits(edits: Any, model: nn.Module, state: Mapping[str, Any], path: object) -> None:
    """Refuse edits that build layers larger than the tensors of the file.

    Raises:
        LoadError: They do.
    """
    total = 0
    for spec in _specs(edits):
        try:
            with torch.device("meta"):
                built = surgery.build(model, {**spec, "kwargs": _without_references(spec["kwargs"])})
        except Exception:  # what cannot be built has no size; carrying it out says why
            continue
        total += _elements(built)
    for shape in _shapes(edits):
        total += math.prod(shape)
    _require(total, state, "what its edits build", path)


def _require(count: int, state: Mapping[str, Any], what: str, path: object) -> None:
    held = sum(value.numel() for value in state.values() if isinstance(value, Tensor))
    if count > SPARE * held + ALWAYS:
        raise LoadError(
            f"{path}: {what} has {count} elements, the tensors of the file {held}: it is damaged or hostile"
        )


def _elements(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return sum(tensor.numel() for tensor in tensors)


def _leaves(value: Any, depth: int = 0) -> Iterator[Any]:
    """Yield the values in nested arguments, and a value that is none of an argument where they nest too deep."""
    if depth > 6:
        yield object()
    elif isinstance(value, Mapping):
        yield from value
        for item in value.values():
            yield from _leaves(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, depth + 1)
    else:
        yield value


def _is_plain_argument(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 100 and all(map(is_word, value.split(".")))
    return value is None or (isinstance(value, (bool, int, float)) and abs(value) <= LARGEST_NUMBER)


def _specs(edits: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the descriptions of new layers in edits, at any depth."""
    if isinstance(edits, Mapping):
        if isinstance(edits.get("class"), str) and isinstance(edits.get("kwargs"), Mapping):
            yield edits
        for value in edits.values():
            yield from _specs(value)
    elif isinstance(edits, (list, tuple)):
        for value in edits:
            yield from _specs(value)


def _without_references(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if not isinstance(value, Mapping)}


def _shapes(edits: Any) -> Iterator[list[int]]:
    for edit in edits if isinstance(edits, list) else ():
        tensors = edit.get("tensors") if isinstance(edit, Mapping) else None
        for shape in tensors.values() if isinstance(tensors, Mapping) else ():
            if isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape):
                yield shape
