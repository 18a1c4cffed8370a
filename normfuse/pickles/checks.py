"""Whether what a pickle describes may be made: asked of the description as a whole, before anything of it exists.

- Every name is allowed (:mod:`normfuse.pickles.allowed`); the classes of modules, records and hooks are filled, never
  called, so no constructor runs.
- A module has in ``_modules`` modules, in ``_parameters`` and ``_buffers`` tensors, under names that are plain words;
  no hooks but those that torch itself puts on; its other attributes are data, modules, classes and functions of the
  lists, under names that are identifiers, none with two underscores on both sides, none that hides a method.
- A partial is of a listed function or class.

What passes is data and layers: to run the model runs the code of its classes, on values of the file's choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from normfuse.errors import LoadError
from normfuse.names import is_word
from normfuse.pickles.allowed import WRAPPED_HOOK, Allowed, Kind
from normfuse.pickles.inert import NOT_FILLED, Inert, StorageReference, is_global, parts_of, walk

HOOK_TABLES = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_TENSOR_TABLES = ("_parameters", "_buffers")
_PRIMITIVES = (bool, int, float, complex, str, bytes, bytearray, type(None))
_REFERABLE = (Kind.MODULE, Kind.RECORD, Kind.FUNCTION, Kind.ATOM)
_OURS = frozenset({("train", "normfuse.deploy.RefuseTraining"), ("forward", "normfuse.layers.deployed.NotReached")})
"""What a folded model has in place of methods: records that raise."""


class Checker:
    """The questions asked of one description."""

    def __init__(self, allowed: Allowed) -> None:
        self.allowed = allowed

    def unknown(self, description: Any) -> list[Any]:
        """Return the globals that are not allowed, each path once, as what the file makes or refers to."""
        found: dict[str, Any] = {}
        for value in walk(description):
            path = path_of(value)
            if path is not None and self.allowed.kind(path) is None:
                known = found.get(path)
                found[path] = value if known is None or looks_like_a_module(value) else known
        return [found[path] for path in sorted(found)]

    def require(self, description: Any) -> None:
        """Refuse a description that is not inert; all of its names are known to be allowed.

        Raises:
            LoadError: Something in it is not what it should be; the text says what.
        """
        seen: set[int] = set()
        todo = [description]
        while todo:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            todo.extend(self._require(value))

    def _require(self, value: Any) -> Iterable[Any]:
        """Check one value; return what it holds that is still to be checked."""
        if is_global(value):
            if self.allowed.kind(value.path) not in _REFERABLE:
                raise LoadError(f"refers to {value.path}, which a model does not hold")
            return ()
        if isinstance(value, Inert):
            return self._instance(value)
        if isinstance(value, StorageReference):
            raise LoadError("holds the memory of a tensor without the tensor")
        if not isinstance(value, (*_PRIMITIVES, list, tuple, dict, set, frozenset)):
            raise LoadError(f"holds a {type(value).__name__}, which no file of torch does")
        return parts_of(value)

    def _instance(self, value: Inert) -> Iterable[Any]:
        kind = self.allowed.kind(value.path)
        if kind is Kind.RECONSTRUCTOR:
            raise LoadError("is written in a protocol of pickle that torch does not use; save it with torch.save again")
        if kind in (Kind.MODULE, Kind.RECORD, Kind.HOOK):
            return self._filled(value, kind)
        if kind is Kind.PARTIAL:
            return self._partial(value)
        if kind is Kind.ENUM:
            if len(value.args) != 1 or not isinstance(value.args[0], (str, int)):
                raise LoadError(f"holds a damaged {value.path}")
            return ()
        if kind is Kind.TENSOR:
            return [
                part for part in _deep(value.args) if not isinstance(part, StorageReference) and not is_global(part)
            ]
        if kind is Kind.CONTAINER:
            factories = value.args[:1] if value.path == "collections.defaultdict" else ()
            return [part for part in value.parts() if part not in factories]
        raise LoadError(f"calls {value.path}, which is not to be called")

    def _filled(self, value: Inert, kind: Kind) -> Iterable[Any]:
        """Check a module, a record or a hook: made empty, then filled."""
        if value.args or value.kwargs or value.items or value.entries:
            raise LoadError(f"calls {value.path} with arguments")
        state = state_of(value)
        for name in state:
            _require_attribute(name, value)
        if kind is Kind.MODULE:
            self._module(value, state)
        elif kind is Kind.HOOK and value.path != WRAPPED_HOOK:
            others = [part for part in state.values() if self._kind_of_instance(part) is not Kind.HOOK]
            if any(map(path_of, _deep(others))):
                raise LoadError(f"holds a {value.path} with more than a name and numbers")
        return state.values()

    def _module(self, value: Inert, state: dict[str, Any]) -> None:
        lacking = {"training", "_modules", *_TENSOR_TABLES} - state.keys()
        if lacking or not isinstance(state["training"], bool):
            raise LoadError(f"a {value.path} lacks its {', '.join(sorted(lacking)) or 'training mode'}")
        for name, child in _entries(state.get("_modules"), value, "_modules"):
            if child is not None and self._kind_of_instance(child) is not Kind.MODULE:
                raise LoadError(f"a {value.path} has {name!r} among its modules, which is not a module")
        for table in _TENSOR_TABLES:
            for name, tensor in _entries(state.get(table), value, table):
                if tensor is not None and self._kind_of_instance(tensor) is not Kind.TENSOR:
                    raise LoadError(f"a {value.path} has {name!r} in its {table}, which is not a tensor")
        self._hooks(value, state)
        cls = self.allowed.find(value.path)
        for name, item in state.items():
            hides = callable(getattr(cls, name, None)) and (
                self._is_code(item) or callable(getattr(nn.Module, name, None))
            )
            if hides and (name, path_of(item)) not in _OURS:
                raise LoadError(f"a {value.path} has its own {name} replaced by what the file names")

    def _hooks(self, value: Inert, state: dict[str, Any]) -> None:
        for table in HOOK_TABLES:
            pairs = pairs_of(state.get(table, {}))
            for _, hook in [(None, None)] if pairs is None else pairs:
                if self._kind_of_instance(hook) is not Kind.HOOK:
                    raise LoadError(f"a {value.path} has its own {table} replaced by what the file names")

    def _kind_of_instance(self, value: Any) -> Kind | None:
        return self.allowed.kind(value.path) if isinstance(value, Inert) else None

    def _is_code(self, value: Any) -> bool:
        codes = (Kind.MODULE, Kind.RECORD, Kind.HOOK, Kind.PARTIAL)
        return is_global(value) or self._kind_of_instance(value) in codes

    def _partial(self, value: Inert) -> Iterable[Any]:
        state = value.state
        if not (isinstance(state, tuple) and len(state) == 4 and value.args == state[:1] and not value.kwargs):
            raise LoadError("holds a damaged functools.partial")
        function, args, kwargs, attributes = state
        known = is_global(function) and self.allowed.kind(function.path) in (Kind.MODULE, Kind.FUNCTION)
        if not (known and isinstance(args, tuple) and isinstance(kwargs, dict) and not attributes):
            raise LoadError("holds a functools.partial of what is not a layer or an activation")
        return (function, *args, *kwargs.values())


def path_of(value: Any) -> str | None:
    """Return the path of a global, or of the class of an instance; None for plain values."""
    return value.path if is_global(value) or isinstance(value, Inert) else None


def looks_like_a_module(value: Any) -> bool:
    """Whether an instance is filled as modules are, whatever its class."""
    state = value.state if isinstance(value, Inert) else None
    return isinstance(state, dict) and {"_modules", "_parameters", "_buffers"} <= state.keys()


def state_of(value: Inert) -> dict[str, Any]:
    """Return the attributes that an instance is filled with.

    Raises:
        LoadError: It is filled with anything but attributes by name.
    """
    state = {} if value.state in (NOT_FILLED, None) else value.state
    if isinstance(state, tuple) and len(state) == 2 and all(part is None or isinstance(part, dict) for part in state):
        state = {**(state[0] or {}), **(state[1] or {})}  # a class with slots
    if isinstance(state, list) and value.path == "normfuse.quantization.quantizing_layer.Precision":
        return {f"field_{index}": item for index, item in enumerate(state)}
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise LoadError(f"holds a {value.path} in a state that is not attributes by name")
    return state


def pairs_of(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the entries of a dictionary, plain or ordered; None for anything else."""
    if isinstance(value, dict):
        return list(value.items())
    if not (isinstance(value, Inert) and value.path == "collections.OrderedDict" and len(value.args) < 2):
        return None
    given = value.args[0] if value.args else []  # protocols 0 and 1 give the entries to the constructor
    if not (isinstance(given, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in given)):
        return None
    return [*map(tuple, given), *value.entries]


def _entries(table: Any, owner: Inert, name: str) -> list[tuple[str, Any]]:
    """Return the entries of a table of modules or tensors, whose keys are plain words."""
    pairs = [] if table is None else pairs_of(table)
    if pairs is None:
        raise LoadError(f"a {owner.path} has a {name} that is not a dictionary")
    for key, _ in pairs:
        if not (isinstance(key, str) and is_word(key)):
            raise LoadError(f"a {owner.path} has an entry in {name} called {key!r:.80}, which is not a plain word")
    return pairs


def _require_attribute(name: str, owner: Inert) -> None:
    if not name.isidentifier() or (name.startswith("__") and name.endswith("__")):
        raise LoadError(f"a {owner.path} has an attribute called {name!r:.80}, which is not one of a layer")


def _deep(values: Iterable[Any]) -> Iterable[Any]:
    """Yield values and what tuples, lists and dictionaries among them hold."""
    todo, seen = list(values), set()
    while todo:
        value = todo.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            todo.extend(parts_of(value))
