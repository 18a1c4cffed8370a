"""Tensors out of the calls by which torch pickles them, with their bounds checked.

``torch`` lets such a call make a tensor larger than its storage, by taking more memory; here every element must lie in
the storage. A tensor that shows one element many times (a stride of 0) is ordinary, but may not pretend to be larger
than :data:`LARGEST_VIEW` elements and its storage together: copying it would take that memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, _utils, nn

from normfuse.errors import LoadError
from normfuse.pickles.archives import Archive, dtype_of
from normfuse.pickles.checks import pairs_of
from normfuse.pickles.inert import Inert, StorageReference, is_global

LARGEST_VIEW = 1 << 30
"""Elements that a tensor may show of a smaller storage."""

_UTILS = "torch._utils._rebuild_"
_MADE_EMPTY = {"torch.nn.parameter.UninitializedParameter": nn.UninitializedParameter,
               "torch.nn.parameter.UninitializedBuffer": nn.UninitializedBuffer}  # fmt: skip


class TensorBuilder:
    """Makes the tensors of one archive.

    Args:
        archive: Where their memory is.
        build: Makes any other value of the description: sizes, dtypes, devices, tensors inside of tensors.
    """

    def __init__(self, archive: Archive, build: Callable[[Any], Any]) -> None:
        self._archive, self._build = archive, build

    def make(self, call: Inert) -> Tensor:
        """Return the tensor that a call of the file describes.

        Raises:
            LoadError: It does not lie in its storage, or is described as torch does not.
        """
        if call.kwargs or call.items or call.entries:
            raise LoadError(f"holds a damaged call of {call.path}")
        if call.path in _MADE_EMPTY:
            return self._uninitialized(call)
        name = call.path.removeprefix(_UTILS)
        if name == "torch._tensor._rebuild_from_type_v2":
            return self._from_type(*call.args)
        if name in ("tensor", "tensor_v2", "tensor_v3"):
            return self._strided(name, *call.args)
        if name in ("parameter", "parameter_with_state"):
            return self._parameter(*call.args)
        return self._by_torch(name, call)

    def _strided(
        self,
        name: str,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        grad: Any = False,
        hooks: Any = None,
        *rest: Any,
    ) -> Tensor:
        """``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)``; in v3 a dtype follows."""
        if not isinstance(storage, StorageReference):
            raise LoadError("holds a tensor without memory")
        _require_no_hooks(hooks)
        dtype = self._build(rest[0]) if name == "tensor_v3" else dtype_of(storage)
        memory = self._memory(storage)
        shape, strides = self._numbers(size), self._numbers(stride)
        _require_inside(memory.nbytes(), dtype, offset, shape, strides)
        tensor = torch.empty(0, dtype=dtype).set_(memory, offset, shape, strides)
        if grad is True and (dtype.is_floating_point or dtype.is_complex):
            tensor.requires_grad_()
        return tensor

    def _memory(self, reference: StorageReference) -> torch.UntypedStorage:
        memory = self._archive.bytes_of(reference)
        if reference.view is None and memory.nbytes() != reference.count * dtype_of(reference).itemsize:
            raise LoadError(f"says that storage {reference.key} has {reference.count} elements, which it does not")
        return memory

    def _numbers(self, value: Any) -> tuple[int, ...]:
        numbers = self._build(value)
        if not isinstance(numbers, (tuple, list)) or not all(type(n) is int and n >= 0 for n in numbers):
            raise LoadError("holds a tensor whose shape is not made of numbers")
        return tuple(numbers)

    def _parameter(self, data: Any, grad: Any, hooks: Any, state: Any = None) -> Tensor:
        """``_rebuild_parameter(data, requires_grad, hooks)``, and with the attributes it had."""
        _require_no_hooks(hooks)
        tensor = self._build(data)
        if not isinstance(tensor, Tensor):
            raise LoadError("holds a parameter that is no tensor")
        return _with_attributes(nn.Parameter(tensor.detach(), bool(grad)), self._build(state))

    def _from_type(self, function: Any, kind: Any, args: Any, state: Any) -> Tensor:
        """``_rebuild_from_type_v2(function, class, arguments, attributes)``: a tensor with attributes of its own."""
        known = is_global(function) and function.path.startswith(_UTILS) and isinstance(args, tuple)
        if not (known and is_global(kind) and self._build(kind) in (Tensor, nn.Parameter)):
            raise LoadError("holds a tensor of a class that is not one of torch's own")
        return _with_attributes(self.make(function(*args)), self._build(state))

    def _uninitialized(self, call: Inert) -> Tensor:
        grad, device, dtype = call.args
        kind = _MADE_EMPTY[call.path]
        return kind(bool(grad), self._build(device), self._build(dtype))

    def _by_torch(self, name: str, call: Inert) -> Tensor:
        """Make quantized, sparse and meta tensors by torch's own functions, which check what they are given."""
        storages = [part for part in call.args if isinstance(part, StorageReference)]
        if name == "qtensor":
            storage, offset, size, stride, _, _, hooks = call.args
            _require_no_hooks(hooks)
            memory = self._memory(storage)
            _require_inside(memory.nbytes(), dtype_of(storage), offset, self._numbers(size), self._numbers(stride))
        elif storages:
            raise LoadError(f"holds a damaged call of {call.path}")
        args = [self._typed(part) if isinstance(part, StorageReference) else self._build(part) for part in call.args]
        with torch.sparse.check_sparse_tensor_invariants(True):
            return getattr(_utils, f"_rebuild_{name}")(*args)

    def _typed(self, reference: StorageReference) -> torch.TypedStorage:
        memory = self._memory(reference)
        return torch.TypedStorage(wrap_storage=memory, dtype=dtype_of(reference), _internal=True)


def _require_no_hooks(hooks: Any) -> None:
    if hooks is not None and pairs_of(hooks) != []:
        raise LoadError("holds a tensor with hooks, which are code")


def _require_inside(nbytes: int, dtype: torch.dtype, offset: Any, shape: Sequence[int], strides: Sequence[int]) -> None:
    if type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise LoadError("holds a tensor with a damaged place in its memory")
    count = 1
    for length in shape:
        count *= length
    there = nbytes // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if count and last >= there:
        raise LoadError(f"holds a tensor of shape {tuple(shape)} that is larger than its memory")
    if count > there + LARGEST_VIEW:
        raise LoadError(f"holds a tensor that shows {count} elements of a memory of {there}")


def _with_attributes(tensor: Tensor, state: Any) -> Tensor:
    """Give a tensor the attributes that it was saved with, which are plain values."""
    parts = state if isinstance(state, tuple) else (state,)
    attributes: dict[Any, Any] = {}
    for part in parts:
        attributes.update(part or {})
    for name, value in attributes.items():
        plain = isinstance(value, (bool, int, float, str, type(None), Tensor))
        if not (isinstance(name, str) and name.isidentifier() and not name.startswith("__") and plain):
            raise LoadError(f"holds a tensor with an attribute {name!r:.80} that is not a plain value")
        if not hasattr(type(tensor), name):
            vars(tensor)[name] = value
    return tensor
