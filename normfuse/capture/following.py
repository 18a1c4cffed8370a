"""Follow tensors through the functions that are called on them: each call becomes a node.

Tensors are followed by identity. An in-place operation gives its tensor a new node, and every view of the same storage
an opaque one.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

_METADATA = frozenset(
    name
    for line in (
        "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex element_size",
        "storage_offset get_device type __len__ __hash__ __get__ data_ptr is_pinned has_names is_signed is_inference",
        "is_conj is_neg untyped_storage __repr__ __format__ dim_order is_same_size",
    )
    for name in line.split()
)


class Follower(abc.ABC):
    """Knows the node of every tensor, and makes the nodes of what is called on tensors.

    Attributes:
        tensor_name: The names of the tensors of the model, by ``id``.
        busy: Whether a call is under way that is one node whatever it calls itself.
    """

    def __init__(self, tensor_name: Mapping[int, str]) -> None:
        self.tensor_name = tensor_name
        self.busy = False
        self.node_of = WeakTensorKeyDictionary()

    @abc.abstractmethod
    def make(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Return a new node of the graph."""

    # values to nodes

    def nodes_of(self, value: Any) -> Any:
        """Return ``value`` with every tensor in it replaced by its node."""
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, Mapping):
            return {str(key): self.nodes_of(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return (
                type(value)(map(self.nodes_of, value))
                if type(value) in (list, tuple)
                else tuple(map(self.nodes_of, value))
            )
        if isinstance(value, slice):
            return slice(self.nodes_of(value.start), self.nodes_of(value.stop), self.nodes_of(value.step))
        held = tensors_in(value)
        return [self.node(tensor) for tensor in held] if held else value

    def node(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor: the last that made it or wrote to it, or the one that names it."""
        node = self.node_of.get(tensor)
        if node is None:
            name = self.tensor_name.get(id(tensor))
            kind = ("get_attr", name) if name is not None else ("call_function", opaque)
            node = self.make(*kind, (), {})
            self.bind(tensor, node)
        return node

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        """Note that a tensor is the value of a node."""
        node.meta.setdefault("shape", tuple(tensor.shape))
        node.meta.setdefault("dtype", tensor.dtype)
        self.node_of[tensor] = node

    # operations to nodes

    def record(
        self, op: str, target: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one operation and add the node for it; return its result."""
        inputs = tensors_in((args, kwargs))
        versions = [_version(tensor) for tensor in inputs]
        node_args, node_kwargs = self.nodes_of(args), self.nodes_of(kwargs)
        self.busy = True
        try:
            result = call(*args, **kwargs)
        finally:
            self.busy = False
        mutated = [t for t, version in zip(inputs, versions, strict=True) if _version(t) != version]
        outputs = tensors_in(result)
        if not outputs and not mutated and _is_metadata(target):
            return result
        node = self.make(op, target, node_args, node_kwargs)
        self._bind_result(node, result, outputs, mutated)
        return result

    def _bind_result(self, node: fx.Node, result: Any, outputs: list[Tensor], mutated: list[Tensor]) -> None:
        if any(id(tensor) in self.tensor_name for tensor in mutated):
            node.meta["constant"] = False  # a counter of the model, which every run finds as the last one left it
        if mutated:
            node.meta["writes"] = tuple(self.node_of[tensor] for tensor in mutated if tensor in self.node_of)
        for tensor in mutated:
            self._invalidate_views(tensor, node)
            self.node_of[tensor] = node
        if isinstance(result, Tensor):
            self.bind(result, node)
        elif isinstance(result, list | tuple) and all(isinstance(item, Tensor) for item in result):
            for index, item in enumerate(result):
                self.bind(item, self.make("call_function", pick, (node, index), {}))
        else:
            for tensor in outputs:
                self.bind(tensor, self.make("call_function", opaque, (node,), {}))

    def _invalidate_views(self, mutated: Tensor, node: fx.Node) -> None:
        storage = _storage(mutated)
        if storage is None:
            return
        for tensor, old in list(self.node_of.items()):
            if tensor is not mutated and _storage(tensor) == storage and old.op != "get_attr":
                self.node_of[tensor] = self.make("call_function", opaque, (old, node), {})


class FunctionReader(TorchFunctionMode):
    """Hands every torch function to a follower."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.follower.busy:
            return func(*args, **(kwargs or {}))
        return self.follower.record("call_function", func, func, args, kwargs or {})


def opaque(*values: Any) -> Any:
    """Stand in a graph for a value whose origin torch does not show."""
    raise RuntimeError("an opaque value cannot be computed")


def pick(values: Any, index: int) -> Any:
    """Return one of the tensors that an operation returned together."""
    return values[index]


def tensors_in(value: Any, seen: frozenset[int] = frozenset()) -> list[Tensor]:
    """Return the tensors in nested containers and records, in order; ``seen`` are the records around ``value``."""
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, _ATOMS) or id(value) in seen:
        return []
    if isinstance(value, slice):
        return tensors_in((value.start, value.stop, value.step))
    items = _items(value)
    inner = seen | {id(value)} if items else seen
    return [tensor for item in items for tensor in tensors_in(item, inner)]


_ATOMS = (int, float, complex, str, bytes, enum.Enum, nn.Module, type, torch.dtype, torch.device, torch.Generator)


def _items(value: Any) -> list[Any]:
    """Return what a container holds, or a record such as a dataclass or a detector's instances, slots included."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if callable(value):
        return []
    slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
    return [*(getattr(value, name, None) for name in slots), *getattr(value, "__dict__", {}).values()]


def _names(slots: Any) -> list[str]:
    return [name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__")]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def _is_metadata(target: Any) -> bool:
    return getattr(target, "__name__", "") in _METADATA
