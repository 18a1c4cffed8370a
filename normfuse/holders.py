"""Who holds the modules and tensors of a model outside of its module tree.

Replacing a layer in ``_modules`` is not enough where the model also calls it through a list, a dictionary or an object
of its own: that place would go on calling the old layer. Everything reachable from the attributes of the modules is
looked through: containers, plain objects and what functions close over; no property is run. Most places can be given
the new object; a closure, a ``functools.partial``, a bound method or a set cannot, and is *frozen*.
"""

from __future__ import annotations

import collections
import functools
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TREE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_ATOMS = frozenset((int, float, complex, bool, str, bytes, bytearray, type(None), type, types.ModuleType, range, slice,
                    types.BuiltinFunctionType, torch.dtype, torch.device, torch.Size, torch.Generator))  # fmt: skip
_LOOKED_THROUGH = ("collections", "types", "functools", "weakref", "enum", "argparse")  # of the standard library
_LIMIT = 1_000_000  # objects looked at, nearest first: an attribute may lead to a whole data set


@dataclass(frozen=True, slots=True)
class Holder:
    """One place outside of the module tree that holds a module or a tensor of the model.

    Attributes:
        name: Where it is, for people: ``"layers[1]"``, ``"a closure of block.forward"``.
        owner: The list, the dictionary (of attributes) or the object with slots; None where the place is frozen.
        key: Index, key or name in ``owner``.
        inside: Indices through tuples that stand there.
    """

    name: str
    owner: Any = None
    key: Any = None
    inside: tuple[int, ...] = ()

    @property
    def is_frozen(self) -> bool:
        """Whether nothing else can be put there."""
        return self.owner is None

    @property
    def value(self) -> Any:
        """What stands there: the module or tensor, or the tuple around it."""
        return object.__getattribute__(self.owner, self.key) if self._is_slot else self.owner[self.key]

    def give(self, value: Any) -> None:
        """Let this stand there."""
        if self._is_slot:
            object.__setattr__(self.owner, self.key, value)
        else:
            self.owner[self.key] = value

    @property
    def _is_slot(self) -> bool:
        return not isinstance(self.owner, list | dict | collections.deque)

    def put(self, new: Any) -> None:
        """Let the place hold another module or tensor."""
        self.give(_exchanged(self.value, self.inside, new))


def _exchanged(value: Any, inside: tuple[int, ...], new: Any) -> Any:
    """Return a value, or a tuple like it that has ``new`` at the place that the indices lead to."""
    if not inside:
        return new
    items = [_exchanged(item, inside[1:], new) if i == inside[0] else item for i, item in enumerate(value)]
    return value._make(items) if hasattr(value, "_make") else tuple(items)


class Holders:
    """Every holder of each module and each parameter or buffer of a model.

    Args:
        root: The model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._held: dict[int, list[Holder]] = collections.defaultdict(list)
        modules = dict(root.named_modules())
        ours = {id(module) for module in modules.values()}
        ours |= {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
        for thing, holder, within in _Walk(ours).places(modules):
            if thing is not within:  # what only the replaced module itself holds goes with it
                self._held[id(thing)].append(holder)

    def of(self, thing: nn.Module | Tensor) -> list[Holder]:
        """Return the places outside of the module tree that hold a module or tensor."""
        return self._held.get(id(thing), [])

    def places(self) -> Iterator[Holder]:
        """Yield every place that can hold another object."""
        yield from (holder for held in self._held.values() for holder in held if not holder.is_frozen)

    def frozen(self, thing: nn.Module | Tensor) -> Holder | None:
        """Return a place that holds a module or tensor and cannot hold another, if there is one."""
        return next((holder for holder in self.of(thing) if holder.is_frozen), None)

    def replace(self, old: nn.Module | Tensor, new: nn.Module | Tensor) -> None:
        """Put ``new`` wherever ``old`` is held; frozen places keep what they have."""
        moved = self._held.pop(id(old), [])
        for holder in moved:
            if not holder.is_frozen:
                holder.put(new)
        if moved:
            self._held[id(new)].extend(moved)


@dataclass(frozen=True, slots=True)
class _Place:
    """A value on the way, the module whose attributes led to it, and how to put another in its stead."""

    value: Any
    name: str
    within: nn.Module
    owner: Any = None
    key: Any = None
    inside: tuple[int, ...] = ()

    def frozen(self, value: Any, name: str) -> _Place:
        """Return the place of a value that cannot be exchanged."""
        return _Place(value, name, self.within)


class _Walk:
    """A walk through what modules hold, nearest first; each object is entered once, so cycles end."""

    def __init__(self, ours: set[int]) -> None:
        self.ours = ours
        self.entered: set[int] = set()

    def places(self, modules: dict[str, nn.Module]) -> Iterator[tuple[Any, Holder, nn.Module]]:
        """Yield ``(module or tensor, its holder, the module that leads to it)``."""
        queue = collections.deque(place for name, module in modules.items() for place in _attributes(name, module))
        for _ in range(_LIMIT):
            if not queue:
                return
            place = queue.popleft()
            if id(place.value) in self.ours:
                yield place.value, Holder(place.name, place.owner, place.key, place.inside), place.within
            elif self._is_entered(place):
                queue.extend(_steps(place))

    def _is_entered(self, place: _Place) -> bool:
        """Whether to look into a value: once, or wherever it stands for a tuple, which each holder has a place in."""
        if isinstance(place.value, tuple):
            return len(place.inside) < 8  # deeper ones are no tuples of layers
        first = id(place.value) not in self.entered
        self.entered.add(id(place.value))
        return first


def _is_atom(value: Any) -> bool:
    return type(value) in _ATOMS or isinstance(value, type)


def _attributes(name: str, module: nn.Module) -> Iterator[_Place]:
    """Yield what a module of the tree holds beside its tree; its own plain tensors have names of their own."""
    prefix = f"{name}." if name else ""
    for key, value in vars(module).items():
        if key not in _TREE and not _is_atom(value) and not isinstance(value, Tensor):
            yield _Place(value, f"{prefix}{key}", module, vars(module), key)


def _steps(place: _Place) -> Iterator[_Place]:
    """Yield what stands in a value."""
    value, name = place.value, place.name
    if isinstance(value, tuple):
        yield from _of_tuple(place)
    elif isinstance(value, list | collections.deque):
        found = [(i, item) for i, item in enumerate(value) if not _is_atom(item)]
        yield from (_Place(item, f"{name}[{i}]", place.within, value, i) for i, item in found)
    elif isinstance(value, dict):
        found = [(key, item) for key, item in value.items() if not _is_atom(item)]
        yield from (_Place(item, f"{name}[{key!r}]", place.within, value, key) for key, item in found)
        yield from (place.frozen(key, f"the keys of {name}") for key in value if not _is_atom(key))
    elif isinstance(value, set | frozenset):
        yield from (place.frozen(item, name) for item in value)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(place)
    elif isinstance(value, types.MethodType):
        yield place.frozen(value.__self__, f"the method {name}")
        yield place.frozen(value.__func__, name)
    elif isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
        yield from (place.frozen(item, f"the partial {name}") for item in held)
    elif isinstance(value, weakref.ref):
        yield place.frozen(value(), f"the weak reference {name}")
    if _may_hold(value):
        yield from _of_object(place)


def _of_tuple(place: _Place) -> Iterator[_Place]:
    known = type(place.value) is tuple or hasattr(place.value, "_make")
    for i, item in enumerate(place.value):
        if known and place.owner is not None:
            inside = (*place.inside, i)
            yield _Place(item, f"{place.name}[{i}]", place.within, place.owner, place.key, inside)
        else:
            yield place.frozen(item, f"{place.name}[{i}]")


def _of_function(place: _Place) -> Iterator[_Place]:
    function: types.FunctionType = place.value
    for cell in function.__closure__ or ():
        try:
            yield place.frozen(cell.cell_contents, f"the closure of {place.name}")
        except ValueError:  # a cell that is empty yet
            continue
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    yield from (place.frozen(value, f"a default of {place.name}") for value in defaults)


def _may_hold(value: Any) -> bool:
    """Whether the attributes of an object are looked at: not those of tensors and of most of the standard library."""
    if isinstance(value, Tensor):
        return False
    home = type(value).__module__.partition(".")[0]
    return home not in ("numpy", "builtins") and (home not in sys.stdlib_module_names or home in _LOOKED_THROUGH)


def _of_object(place: _Place) -> Iterator[_Place]:
    """Yield the attributes of an object, those in slots too; no property or ``__getattr__`` is run."""
    value, name = place.value, place.name
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        attributes = {}
    if isinstance(attributes, dict):
        for key, item in attributes.items():
            yield _Place(item, f"{name}.{key}", place.within, attributes, key)
    for kind in type(value).__mro__:
        for key, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    yield _Place(member.__get__(value), f"{name}.{key}", place.within, value, key)
                except AttributeError:  # an empty slot
                    continue
