"""The value of a product in Tune mode: it is for the product's norm alone, and knows it.

The product marks the value that it returns: it changes the value's class. The norm takes the mark off. A marked value
that anything else reads raises, and so does a norm that is given a value without the mark of its products. The mark
goes where the value goes, so no exception, thread or second call in between can mislead it.

What is compiled or traced, and what is computed again inside a backward pass, bears no marks; nor do the values of a
pair between whose layers other operations lie. There, structure alone decides (:mod:`normfuse.layers.handshake`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normfuse.errors import TuneModeError
from normfuse.layers.handshake import Member

_graph_task, _tracing_state = torch._C._current_graph_task_id, torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling


class NormalizedValue(Tensor):
    """The value of a product that has its norm applied already: for that norm alone.

    Its shape and such can be asked for; any operation on it raises :class:`normfuse.TuneModeError`.
    """

    member: Member

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about the tensor that do not read its values."""
        if func not in _QUESTIONS:
            _refuse_reader(_name(func), (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def mark(value: Tensor, member: Member) -> Tensor:
    """Return the value of a product, marked for its norm."""
    if _is_compiling():
        if not torch.compiler.is_exporting():
            member.pair.was_compiled = True
    elif member.pair.direct and type(value) is Tensor and not _is_traced_or_recomputed():
        value.__class__ = NormalizedValue
        value.member = member  # type: ignore[attr-defined]
    return value


def taken(value: Any, member: Member, layer: nn.Module) -> Tensor | None:
    """Return a value that is marked for a norm, without the mark; None where it is not, or the layer is a clone."""
    if type(value) is not NormalizedValue or value.member.pair is not member.pair or member.seat.layer() is not layer:
        return None
    del value.member
    value.__class__ = Tensor  # type: ignore[assignment]
    return value


def may_be_unmarked(value: Any, member: Member) -> bool:
    """Whether a value that its products have made may come to a norm without a mark."""
    if _is_compiling() or not member.pair.direct or member.pair.was_compiled:
        return True
    return type(value) not in (Tensor, nn.Parameter, NormalizedValue) or _is_traced_or_recomputed()


def _is_traced_or_recomputed() -> bool:
    return _tracing_state() is not None or _graph_task() != -1


def refuse_value(member: Member) -> NoReturn:
    """Raise for a value that a norm is given and that does not come from a product of its own.

    Raises:
        TuneModeError: Always.
    """
    products = " or ".join(seat.name for seat in member.pair.seats[1:])
    raise TuneModeError(
        f"{member.seat.name} is applied by {products} in Tune mode and was given a value of something else: call "
        f"tune_mode again, with example_inputs that go this way, or tune_mode(model, False)"
    )


def _refuse_reader(reader: str, arguments: Any) -> NoReturn:
    values = (leaf for leaf in tree_leaves(arguments) if type(leaf) is NormalizedValue)
    member = next(values).member
    norm, product = member.pair.norm.name, member.seat.name
    raise TuneModeError(
        f"the value of {product} has {norm} applied already in Tune mode, and {reader} reads it in place of {norm}: "
        f"call tune_mode again, with example_inputs that go this way, or tune_mode(model, False)"
    )


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name  # of a property


def _questions() -> Iterator[Any]:
    """Yield what may be asked of a marked value: what forwards ask, and compilers before they read a graph."""
    properties = "shape dtype device layout ndim requires_grad is_leaf grad grad_fn"
    kinds = "is_cpu is_cuda is_meta is_sparse is_nested is_quantized is_mkldnn"
    for name in (*properties.split(), *kinds.split()):
        yield getattr(Tensor, name).__get__
    methods = "size dim stride numel nelement ndimension element_size is_contiguous is_floating_point is_complex"
    of_memory = "get_device is_inference is_conj is_neg _is_view storage_offset untyped_storage"
    for name in (*methods.split(), *of_memory.split(), "__len__", "__hash__", "__repr__"):
        yield getattr(Tensor, name)


_QUESTIONS = frozenset(_questions())
