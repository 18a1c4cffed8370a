"""Stand-ins for what a pickle may name but must not call.

The unpickler of torch calls every global it was told is safe with whatever arguments the file gives. A module class
needs no call: an ordinary pickle makes an empty instance and fills its ``__dict__``. So the file gets a stand-in that
makes the empty instance and never runs ``__init__``; likewise ``functools.partial``, which some models keep as an
attribute although they never call it again, becomes a record. After loading, :meth:`StandIns.restore` puts real
classes back where a model refers to one, if constructing that class is harmless; other stand-ins stay.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from normfuse.allowed_globals import SAFE_CONSTRUCTORS, is_transformers_config
from normfuse.errors import LoadError


class PartialRecord:
    """A ``functools.partial`` as data: it is not called during loading, and by the model only if restored."""

    def __init__(self, function: Any = None) -> None:
        self.function, self.args, self.keywords = function, (), {}

    def __setstate__(self, state: tuple) -> None:
        self.function, self.args, self.keywords = state[0], tuple(state[1]), dict(state[2] or {})

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Refuse: calling it would run a constructor with arguments that the file chose."""
        raise LoadError("the model calls a functools.partial from its file; --trust-pickle allows that")


def stand_in(real: type) -> type:
    """Return a class that makes empty instances of ``real``: no ``__init__``, no ``__new__`` of it runs."""

    def make(cls: type, *args: object) -> Any:
        if args:
            raise pickle.UnpicklingError(f"the file calls {real.__qualname__} with arguments")
        return object.__new__(real)

    return type(real.__name__, (), {"__new__": make, "__module__": real.__module__, "stands_for": real})


class StandIns:
    """The stand-ins of one file."""

    def __init__(self) -> None:
        self._real: dict[type, type] = {}
        self.modules: list[nn.Module] = []

    def entries(self, allowed: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
        """Yield what :class:`torch.serialization.safe_globals` takes: pairs of an object and its name in the file.

        A module class is listed once more under a name without a dot, which no file can spell (the unpickler joins
        module and name with one): its instances may then be filled, but the class itself cannot be reached.
        """
        yield PartialRecord, "functools.partial"
        for number, (name, found) in enumerate(allowed.items()):
            if not _needs_stand_in(found):
                yield found, name
                continue
            proxy = stand_in(found)
            self._real[proxy] = found
            yield proxy, name
            yield found, f"instances {number}"

    def restore(self, loaded: Any) -> Any:
        """Return the loaded object with real classes where constructing them is harmless; edits it in place.

        Fills :attr:`modules` with every module that the object refers to, registered as a child or not.
        """
        return self._restore(loaded, {})

    def _restore(self, value: Any, seen: dict[int, tuple[Any, Any]]) -> Any:
        """Return ``value`` restored; ``seen`` keeps the original alive beside the result, so that its id stays its."""
        if id(value) not in seen:
            seen[id(value)] = value, value  # containers are edited in place, and may contain themselves
            seen[id(value)] = value, self._restored(value, lambda item: self._restore(item, seen))
        return seen[id(value)][1]

    def _restored(self, value: Any, restore: Callable[[Any], Any]) -> Any:
        if isinstance(value, type):
            return self._restore_class(value)
        if isinstance(value, PartialRecord):
            return self._restore_partial(value, restore)
        if type(value) is tuple:
            return tuple(map(restore, value))
        if isinstance(value, list):
            value[:] = map(restore, value)
        elif isinstance(value, dict):
            _update(value, restore)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
            _update(value.__dict__, restore)
        return value

    def _restore_class(self, value: type) -> type:
        real = self._real.get(value, value)
        return real if f"{real.__module__}.".startswith(SAFE_CONSTRUCTORS) else value

    def _restore_partial(self, record: PartialRecord, restore: Callable[[Any], Any]) -> Any:
        _update(record.keywords, restore)
        record.function, record.args = restore(record.function), restore(record.args)
        harmless = isinstance(record.function, type) and record.function not in self._real
        return functools.partial(record.function, *record.args, **record.keywords) if harmless else record


def _needs_stand_in(found: Any) -> bool:
    """Modules and records that are only ever filled, not called; hooks, enums and functions are used as they are."""
    return isinstance(found, type) and (issubclass(found, nn.Module) or is_transformers_config(found))


def _update(mapping: dict, change: Callable[[Any], Any]) -> None:
    for key, item in list(mapping.items()):
        changed = change(item)
        if changed is not item:
            mapping[key] = changed
