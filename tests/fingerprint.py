"""Everything about a model that an edit could change, in a form that compares equal only where nothing did."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

CONTAINERS = (dict, list, tuple, set)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return the modules by name with identity, class and every attribute, and the bytes and flags of every tensor.

    Containers and namespaces in attributes are read to their ends; every other object counts by its identity.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    return {name: (id(module), type(module), content(vars(module))) for name, module in modules.items()}


def content(value: Any) -> Any:
    """Return a value as nested tuples of identities, and tensors as what they hold."""
    if isinstance(value, SimpleNamespace):
        return id(value), content(vars(value))
    if isinstance(value, Tensor):
        return id(value), type(value), value.requires_grad, value.dtype, tuple(value.shape), bits(value)
    if isinstance(value, dict):
        return id(value), type(value), [(key, content(item)) for key, item in value.items()]
    if isinstance(value, CONTAINERS):
        return id(value), type(value), [content(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def bits(tensor: Tensor) -> bytes:
    """Return the values of a tensor, bit by bit."""
    if is_lazy(tensor):
        return b""
    plain = tensor.detach().contiguous().cpu()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
