"""How a product in Tune mode and its norm know of each other that both still run.

*Structure.* At every call of the product it is asked whether each layer of the pair is what it was and where it was:
the same object, of the same class, under the same name in the same module, with no hook, no ``forward`` of the
instance's own and with statistics. If not, each layer of the pair runs as in eval mode, by its own class: whatever has
taken the pair apart then gets what it would have got without Tune mode.

*Value.* The product marks the value that it returns: it changes the value's class. The norm takes the mark off. A
marked value that anything else reads raises, and so does a norm that is given a value without the mark of its products.
The mark goes where the value goes, so no exception, thread or second call in between can mislead it. What is compiled
or traced, and what is computed again inside a backward pass, goes by structure alone; so does a pair between whose
layers other operations lie.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from normfuse.errors import TuneModeError

_graph_task, _tracing_state = torch._C._current_graph_task_id, torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_are_transforms_active = torch._C._are_functorch_transforms_active
_count_modes = torch._C._len_torch_dispatch_stack
_HOOKS_ON_ALL = (
    module_hooks._global_forward_hooks,
    module_hooks._global_forward_pre_hooks,
    module_hooks._global_backward_hooks,
    module_hooks._global_backward_pre_hooks,
)


def _nobody() -> None:
    return None


class Seat:
    """Where a layer of a pair is.

    Attributes:
        name: Its qualified name when the pair was made.
        key: Its name in the module that holds it.
        parent: Returns that module, or None where it is not known or no more.
        layer: Returns the layer, or None where it is no more.
        kind: Its class in Tune mode.
    """

    __slots__ = ("key", "kind", "layer", "name", "parent")

    def __init__(self, name: str, parent: nn.Module | None) -> None:
        self.name, self.key = name, name.rpartition(".")[2]
        self.parent: Callable[[], nn.Module | None] = _nobody if parent is None else weakref.ref(parent)
        self.layer: Callable[[], nn.Module | None] = _nobody
        self.kind: type[nn.Module] = nn.Module

    def take(self, layer: nn.Module, kind: type[nn.Module]) -> None:
        """Note which layer it is."""
        self.layer, self.kind = weakref.ref(layer), kind

    def is_alone(self, memo: dict[int, Any]) -> bool:
        """Whether the layer is being copied without the module that holds it."""
        parent = self.parent()
        return parent is not None and id(parent) not in memo

    def __deepcopy__(self, memo: dict[int, Any]) -> Seat:
        """Return the same place in the copy that is being made, which its layer has not taken yet."""
        copied = memo[id(self)] = Seat(self.name, memo.get(id(self.parent())))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the name."""
        return Seat, (self.name, None)


class Pair:
    """A norm and the products that apply it.

    Attributes:
        norm: Where the norm is.
        seats: Where all of them are, the norm first.
        direct: Whether the norm is given the very values that the products return, so that they can be marked.
        rank: How many axes a value must have for the channels of the products to be those of the norm; None for any. A
            BatchNorm1d behind a linear layer normalizes its outputs in ``(N, C)``, and something else in ``(N, L, C)``.
        is_open: Whether it comes from a file, so that the layers that are read with it take their seats.
        was_compiled: Whether a product has been compiled, so that the norm may get its values without a mark.
    """

    def __init__(
        self,
        norm: Seat,
        products: Sequence[Seat],
        direct: bool = True,
        rank: int | None = None,
        is_open: bool = False,
    ) -> None:
        self.norm, self.seats, self.direct, self.rank = norm, (norm, *products), direct, rank
        self.is_open, self.was_compiled = is_open, False

    def is_whole(self) -> bool:
        """Whether each layer is what it was and where it was."""
        for seat in self.seats:
            layer = seat.layer()
            if layer is None or type(layer) is not seat.kind:
                return False
            held = layer.__dict__
            if "forward" in held or "_conv_forward" in held or "_compiled_call_impl" in held:
                return False
            if held["_forward_hooks"] or held["_forward_pre_hooks"]:
                return False
            if held["_backward_hooks"] or held["_backward_pre_hooks"]:
                return False
            parent = seat.parent()
            if parent is not None and parent._modules.get(seat.key) is not layer:
                return False
        norm: Any = self.norm.layer()
        return norm._buffers.get("running_mean", True) is not None

    def require_fixed_statistics(self) -> None:
        """Raise where the norm that is now in the norm's place would normalize by the batch, and move its statistics.

        Raises:
            TuneModeError: It would.
        """
        parent = self.norm.parent()
        other = None if parent is None else parent._modules.get(self.norm.key)
        if isinstance(other, _NormBase) and other.training and not hasattr(type(other), "_normfuse_kind"):
            raise TuneModeError(
                f"{self.norm.name} was replaced by a {type(other).__name__} that is not in Tune mode and normalizes by "
                f"the batch: call tune_mode again, with exclude=[{self.norm.name!r}] to leave it so"
            )

    def refuse_value(self) -> NoReturn:
        """Raise for a value that a norm is given and that does not come from a product of its own.

        Raises:
            TuneModeError: Always.
        """
        products = " or ".join(seat.name for seat in self.seats[1:])
        raise TuneModeError(
            f"{self.norm.name} is applied by {products} in Tune mode and was given a value of something else: call "
            f"tune_mode again, with example_inputs that go this way, or tune_mode(model, False)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Pair:
        """Return the pair of the layers that are copied together; any other copy of a layer belongs to no pair."""
        norm, *products = copy.deepcopy(self.seats, memo)
        copied = memo[id(self)] = Pair(norm, products, self.direct, self.rank)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the names; a pair that is whole is open to the layers that are read with it."""
        return Pair, (self.norm, self.seats[1:], self.direct, self.rank, self.is_whole())


def is_patched(layer: nn.Module) -> bool:
    """Whether a layer computes by something that was put on the instance."""
    return not {"forward", "_conv_forward", "_compiled_call_impl"}.isdisjoint(vars(layer))


@dataclass(slots=True)
class Member:
    """What a layer of a pair knows of it.

    Attributes:
        pair: The pair.
        seat: Where the layer is.
    """

    pair: Pair
    seat: Seat

    def runs(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether a layer that holds this is the pair's, and the pair runs in Tune mode, at this call on ``x``."""
        if self.pair.rank not in (None, x.dim()):
            return False
        return self.seat.layer() is layer and self.pair.is_whole() and not _is_watched()

    def join(self, layer: nn.Module) -> None:
        """Let a layer that was read from a file take its seat."""
        if self.pair.is_open and self.seat.layer() is None:
            self.seat.take(layer, type(layer))

    def __deepcopy__(self, memo: dict[int, Any]) -> Member:
        """Copy all of it; the copy of the layer, which is being made, takes the seat in the copied pair."""
        copied = object.__new__(type(self))
        for one in fields(self):
            setattr(copied, one.name, copy.deepcopy(getattr(self, one.name), memo))
        layer = self.seat.layer()
        if id(layer) in memo and not self.seat.is_alone(memo):
            copied.seat.take(memo[id(layer)], self.seat.kind)
        return copied


def _is_watched() -> bool:
    """Whether something sees every call of a module, or every operation, and should see those of eval mode."""
    if _is_compiling():
        return False
    if any(_HOOKS_ON_ALL) or _are_transforms_active():
        return True
    return _count_modes() > 0 and not all(map(_is_of_torch, _get_current_dispatch_mode_stack()))


def _is_of_torch(mode: object) -> bool:
    """Whether a dispatch mode is one by which torch traces, and not one that watches."""
    return getattr(mode, "_mode_key", None) is not None


# values


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
