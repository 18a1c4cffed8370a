"""The tensors of a model by their qualified names: parameters, buffers and plain tensor attributes."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

from torch import Tensor, nn


def named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(qualified name, tensor)`` for parameters, buffers and plain tensor attributes, ties repeated."""
    for prefix, module in root.named_modules():
        for name, tensor in _direct_tensors(module):
            yield (f"{prefix}.{name}" if prefix else name), tensor


def _direct_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    held = (module._parameters, module._buffers, vars(module))
    return [(name, value) for table in held for name, value in table.items() if isinstance(value, Tensor)]


def own_tensors(module: nn.Module, prefix: str) -> Iterator[str]:
    """Yield the qualified names of the tensors of a module that stands at ``prefix``."""
    for name, _ in named_tensors(module):
        yield f"{prefix}.{name}" if prefix else name


def tensor_names(root: nn.Module) -> dict[int, str]:
    """Return the first name of each tensor, by its ``id``."""
    return {id(tensor): name for name, tensor in reversed(list(named_tensors(root)))}


def tensor_aliases(root: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return every name of each tensor, by each of its names; more than one is a tie."""
    groups: dict[int, list[str]] = collections.defaultdict(list)
    for name, tensor in named_tensors(root):
        groups[id(tensor)].append(name)
    return {name: tuple(group) for group in groups.values() for name in group}
