"""How a product in Tune mode and its norm know of each other that both still run.

At every call of the product it is asked whether each layer of the pair is what it was and where it was: the same
object, of the same class, under the same name in the same module, with no hook, no ``forward`` of the instance's own
and with statistics. If not, each layer of the pair runs as in eval mode, by its own class: whatever has taken the pair
apart then gets what it would have got without Tune mode.

That the norm is called, and on the product's value, :mod:`normfuse.layers.normalized_value` sees to.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from normfuse.errors import TuneModeError

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Pair:
        """Return the pair of the layers that are copied together; any other copy of a layer belongs to no pair."""
        norm, *products = copy.deepcopy(self.seats, memo)
        copied = memo[id(self)] = Pair(norm, products, self.direct, self.rank)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the names; a pair that is whole is open to the layers that are read with it."""
        return Pair, (self.norm, self.seats[1:], self.direct, self.rank, self.is_whole())


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
