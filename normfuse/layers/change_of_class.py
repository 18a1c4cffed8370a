"""Layers of the user's change their class, to a subclass made here, and get their own back.

The object, its parameters and its buffers stay. What Tune mode knows of a layer is one entry of its ``__dict__``. A
library may have put a class of its own on top in between, as parametrizations and FSDP do: that stays, on top of the
class that the layer had.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, cast

from torch import nn

from normfuse.layers.handshake import Member

STATE = "_normfuse_tuned"
_LEAF = "torch.nn"  # where torch.fx looks whether a layer is one operation; a pair is traced as two

Tuned = tuple[nn.Module, type[nn.Module], object]  # a layer, its class in Tune mode, and what is known of it


class TunedLayer(nn.Module):
    """What all layers in Tune mode have in common: they know the class they had, and are pickled under it."""

    prefix: ClassVar[str] = "Tuned"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Name the class, which no module holds, by what it was made from."""
        kind = cast(Any, type(self))._normfuse_kind
        return _rebuild, (kind, original_class(self)), self.__getstate__()

    def __setstate__(self, state: Any) -> None:
        """Take the seat in a pair that comes from a file."""
        super().__setstate__(state)
        member = vars(self).get(STATE)
        if isinstance(member, Member):
            member.join(self)


@functools.cache
def tuned_class(kind: type[TunedLayer], cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``cls`` that runs in Tune mode as ``kind``."""
    members = {"__module__": _LEAF, "_normfuse_kind": kind, "_normfuse_class": cls}
    return type(f"{kind.prefix}{cls.__name__}", (kind, cls), members)


def original_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that a layer had before Tune mode, which is its own where it is not in it."""
    return getattr(type(layer), "_normfuse_class", type(layer)) if isinstance(layer, TunedLayer) else type(layer)


def enter(layer: nn.Module, kind: type[TunedLayer], state: object = None) -> None:
    """Put one layer into Tune mode."""
    vars(layer)[STATE] = state
    layer.__class__ = tuned_class(kind, type(layer))
    if isinstance(state, Member):
        state.seat.take(layer, type(layer))


def leave(layer: nn.Module) -> None:
    """Take a layer out of Tune mode; any other layer stays as it is."""
    if isinstance(layer, TunedLayer):
        vars(layer).pop(STATE, None)
        layer.__class__ = _without(type(layer))  # type: ignore[assignment]


def leave_all(model: nn.Module) -> None:
    """Take every layer of a model out of Tune mode."""
    for module in list(model.modules()):
        leave(module)


def tuned_layers(model: nn.Module) -> list[Tuned]:
    """Return the layers of a model that are in Tune mode, with what :func:`restore` needs to put them back into it."""
    layers = [layer for layer in model.modules() if isinstance(layer, TunedLayer)]
    return [(layer, type(layer), vars(layer).get(STATE)) for layer in layers]


def restore(layers: list[Tuned]) -> None:
    """Put layers that have left Tune mode back into it, except for those whose class is another by now."""
    for layer, cls, state in layers:
        if vars(cls).get("_normfuse_class") is type(layer):
            vars(layer)[STATE] = state
            layer.__class__ = cls


@contextlib.contextmanager
def left(model: nn.Module) -> Iterator[None]:
    """Run a block with every layer of a model outside of Tune mode, and put all back into it afterwards."""
    layers = tuned_layers(model)
    leave_all(model)
    try:
        yield
    finally:
        restore(layers)


def _without(cls: type) -> type:
    """Return a class without Tune mode: what it was made from, or, on top of that, what a library has made of it."""
    if "_normfuse_class" in vars(cls):
        return cast(Any, cls)._normfuse_class
    tuned = next(base for base in cls.__mro__ if "_normfuse_class" in vars(base))
    name = cls.__name__.replace(tuned.__name__, cast(Any, tuned)._normfuse_class.__name__)
    bases = tuple(_without(base) if issubclass(base, TunedLayer) else base for base in cls.__bases__)
    members = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls)(name, bases, members)


def _rebuild(kind: type[TunedLayer], cls: type[nn.Module]) -> nn.Module:
    made = tuned_class(kind, cls)
    return made.__new__(made)
