"""Make the objects that a checked description asks for.

Modules are made empty and filled, as unpickling fills them, through ``__setstate__`` of their own class, which adds
what older versions did not save. A class that a model merely refers to is the real one where its constructor is known
to build layers and nothing else; otherwise, and for a partial of one, a record stands in its place that refuses to be
called.
"""

from __future__ import annotations

import collections
import functools
from typing import Any

import torch
from torch import nn

from normfuse.errors import LoadError
from normfuse.pickles.allowed import SAFE_CONSTRUCTORS, Allowed, Kind
from normfuse.pickles.archives import Archive
from normfuse.pickles.checks import pairs_of, state_of
from normfuse.pickles.inert import NOT_FILLED, Inert, is_global
from normfuse.pickles.tensors import TensorBuilder


class Uncallable:
    """A class that a model refers to, or a ``functools.partial`` of one, as data."""

    def __init__(self, path: str, args: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None) -> None:
        self.path, self.args, self.keywords = path, args, keywords or {}

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Refuse: it would run a constructor with arguments that the file chose."""
        raise LoadError(f"the model makes a {self.path} as its file says; --trust-pickle allows that")


class Builder:
    """Makes the objects of one description."""

    def __init__(self, archive: Archive, allowed: Allowed) -> None:
        self._allowed = allowed
        self._tensors = TensorBuilder(archive, self.build)
        self._made: dict[int, tuple[Any, Any]] = {}

    def build(self, value: Any) -> Any:
        """Return what a value of the description stands for; the same object for the same value."""
        if id(value) not in self._made:
            made = self._new(value)
            self._made[id(value)] = value, made  # the value is kept, so that its id stays its own
            self._fill(value, made)
        return self._made[id(value)][1]

    def _new(self, value: Any) -> Any:
        """Return the object, empty where it can be filled afterwards: it may contain itself."""
        if is_global(value):
            return self._reference(value)
        if isinstance(value, Inert):
            return self._instance(value)
        if type(value) in (list, dict, set):
            return type(value)()
        if isinstance(value, (tuple, frozenset)):
            return type(value)(map(self.build, value))
        return value

    def _fill(self, value: Any, made: Any) -> None:
        if isinstance(value, Inert):
            self._fill_instance(value, made)
        elif type(value) is list:
            made.extend(map(self.build, value))
        elif type(value) is set:
            made.update(map(self.build, value))
        elif type(value) is dict:
            made.update((self.build(key), self.build(item)) for key, item in value.items())

    def _reference(self, value: type[Inert]) -> Any:
        if self._allowed.kind(value.path) is Kind.MODULE and not value.path.startswith(SAFE_CONSTRUCTORS):
            return Uncallable(value.path)
        return self._allowed.find(value.path)

    def _instance(self, value: Inert) -> Any:
        kind = self._allowed.kind(value.path)
        if kind is Kind.TENSOR:
            return self._tensors.make(value)
        if kind is Kind.CONTAINER:
            return self._container(value)
        if kind is Kind.PARTIAL:
            return self._partial(value)
        cls = self._allowed.find(value.path)
        return cls(value.args[0]) if kind is Kind.ENUM else object.__new__(cls)

    def _container(self, value: Inert) -> Any:
        args = [None if is_global(part) else self.build(part) for part in value.args]
        name = value.path.rpartition(".")[2]
        makers: dict[str, Any] = {
            "OrderedDict": lambda *pairs: collections.OrderedDict(),
            "Counter": lambda *counts: collections.Counter(dict(*counts)),
            "defaultdict": lambda *_: {},  # what it would make of a missing key is code
            "deque": lambda items=(), length=None: collections.deque(list(items), length),
            "encode": lambda text, coding="latin1": _encoded(text, coding),
            "_get_layout": lambda name: _layout(name),
            "Size": lambda shape=(): torch.Size(shape),
            "device": lambda *place: torch.device(*place),
            "tuple": lambda items=(): tuple(items),
            "bytearray": lambda content=b"", *coding: bytearray(
                _encoded(content, *coding) if coding else bytes(content)
            ),
            **{plain.__name__: plain for plain in (set, frozenset, list, dict, complex, slice)},
        }
        return makers[name](*args)

    def _partial(self, value: Inert) -> Any:
        function, args, keywords, _ = value.state
        given = self.build(args), self.build(keywords)
        if self._allowed.kind(function.path) is Kind.FUNCTION:
            return functools.partial(self._allowed.find(function.path), *given[0], **given[1])
        return Uncallable(function.path, *given)

    def _fill_instance(self, value: Inert, made: Any) -> None:
        kind = self._allowed.kind(value.path)
        if kind in (Kind.MODULE, Kind.RECORD, Kind.HOOK):
            self._fill_object(value, made)
        elif kind is Kind.CONTAINER:
            self._fill_container(value, made)

    def _fill_object(self, value: Inert, made: Any) -> None:
        if isinstance(value.state, list):  # a dataclass with slots, of our own
            made.__setstate__(self.build(value.state))
            return
        state = {name: self.build(item) for name, item in state_of(value).items()}
        if isinstance(made, nn.Module):
            made.__setstate__(state)
        else:
            vars(made).update(state)

    def _fill_container(self, value: Inert, made: Any) -> None:
        entries = value.entries
        if isinstance(made, collections.OrderedDict):
            entries = pairs_of(value) or []
            if isinstance(value.state, dict) and "_metadata" in value.state:  # the versions that a state dict carries
                vars(made)["_metadata"] = self.build(value.state["_metadata"])
        elif value.state is not NOT_FILLED:
            raise LoadError(f"holds a damaged {value.path}")
        for key, item in entries:
            made[self.build(key)] = self.build(item)
        put = made.add if isinstance(made, set) else getattr(made, "append", None)
        for item in value.items:
            if put is None:
                raise LoadError(f"holds a damaged {value.path}")
            put(self.build(item))


def _encoded(text: Any, coding: Any) -> bytes:
    """``_codecs.encode(text, "latin1")``: how pickles of protocol 2 write bytes."""
    if coding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise LoadError("encodes a text in a way that no pickle writes")
    return text.encode("latin1")


def _layout(name: Any) -> torch.layout:
    found = vars(torch).get(str(name).removeprefix("torch."))
    if not isinstance(found, torch.layout):
        raise LoadError("holds a tensor of a layout that torch does not have")
    return found
