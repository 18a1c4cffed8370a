"""Read a pickle as data: what it asks to be made, of which classes, in which state. Nothing of it is made.

A pickle is a program for a small stack machine, and all that it can run are the globals it names. Here each global is
a class of its own below :class:`Inert`, whatever the file calls it; "calling" it notes the arguments, "filling" it
notes the state. So no code runs but that of this module, and the result can be looked at as a whole, by
:mod:`normfuse.pickles.checks`, before :mod:`normfuse.pickles.objects` makes anything of it.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from normfuse.formats import python3_name

NOT_FILLED = object()
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_EXTENSIONS = frozenset({"EXT1", "EXT2", "EXT4"})


class Inert:
    """An instance as a file describes it; each global that the file names has a subclass.

    Attributes:
        path: What the file calls the class or function: ``"package.module.name"``.
        args: The positional arguments it is called with.
        kwargs: The keyword arguments.
        state: What it is filled with, :data:`NOT_FILLED` if it is not.
        items: What is appended or added to it.
        entries: The pairs of key and value that are set in it.
    """

    path: ClassVar[str] = ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: list[Any]
    entries: list[tuple[Any, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Note the arguments."""
        self = object.__new__(cls)
        self.args, self.kwargs, self.state, self.items, self.entries = args, kwargs, NOT_FILLED, [], []
        return self

    def __setstate__(self, state: Any) -> None:
        if self.state is not NOT_FILLED:
            raise pickle.UnpicklingError(f"{self.path} is filled twice")
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Note a call of what was made: another use of the same global."""
        return type(self)(*args, **kwargs)

    def append(self, item: Any) -> None:
        """Note an item of a list."""
        self.items.append(item)

    add = append

    def extend(self, items: Any) -> None:
        """Note items of a list."""
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries.append((key, value))

    def parts(self) -> Iterator[Any]:
        """Yield everything that the file gave it."""
        yield from self.args
        yield from self.kwargs.values()
        yield from self.items
        for pair in self.entries:
            yield from pair
        if self.state is not NOT_FILLED:
            yield self.state


@dataclass(frozen=True, slots=True, eq=False)
class StorageReference:
    """Memory that tensors of the file lie in.

    Attributes:
        kind: The path of the storage's class, which says the dtype: ``"torch.FloatStorage"``.
        key: The name of the record that holds the bytes.
        count: How many elements there are.
        view: Where in another storage it lies: ``(key, offset, count)``, in files of old versions only.
    """

    kind: str
    key: str
    count: int
    view: tuple[str, int, int] | None = None


class _Reader(pickle.Unpickler):
    """The interpreter of Python itself, with nothing to call."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self._globals: dict[str, type[Inert]] = {}

    def find_class(self, module_name: str, global_name: str) -> type[Inert]:
        """Return the stand-in of a global: always a new class of this module, never what the file names."""
        path = python3_name(f"{module_name}.{global_name}")
        if path not in self._globals:
            self._globals[path] = type("Global", (Inert,), {"path": path, "__slots__": ()})
        return self._globals[path]

    def persistent_load(self, pid: Any) -> Any:
        """Return the reference to a storage, or the class that an old file saved together with its source."""
        kind, *rest = pid if isinstance(pid, tuple) and pid else (None,)
        if kind in ("module", b"module") and rest:
            return rest[0]
        if kind not in ("storage", b"storage") or len(rest) not in (4, 5):
            raise pickle.UnpicklingError("a persistent id that torch does not write")
        storage, key, _, count, *view = rest
        if not (is_global(storage) and type(count) is int and count >= 0):
            raise pickle.UnpicklingError("a damaged reference to a storage")
        return StorageReference(storage.path, str(key), count, _view(view[0] if view else None))


def _view(view: Any) -> tuple[str, int, int] | None:
    if view is None:
        return None
    numbers = view[1:] if isinstance(view, tuple) and len(view) == 3 else ()
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError("a damaged view of a storage")
    return str(view[0]), numbers[0], numbers[1]


def read_inert(file: IO[bytes]) -> Any:
    """Return what one pickle describes: plain values, containers, :class:`Inert` and :class:`StorageReference`.

    Raises:
        pickle.UnpicklingError: It is damaged, or asks for what no file of torch does.
        ValueError: It is not a pickle, or ends early; and whatever else a damaged pickle raises.
    """
    start = file.tell()
    _require_bounded(file)
    file.seek(start)
    return _Reader(file).load()


def _require_bounded(file: IO[bytes]) -> None:
    """Refuse a pickle that makes the interpreter take memory beyond its own size.

    The interpreter has a table of numbered values, as long as the largest number in the file: a number that is larger
    than the count of operations is none that a writer gave.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in _PUTS and isinstance(argument, int) and argument > count:
            raise pickle.UnpicklingError("it numbers its values beyond their count")
        if opcode.name in _EXTENSIONS:
            raise pickle.UnpicklingError("it uses extension codes, which torch does not write")


def is_global(value: Any) -> bool:
    """Whether a value is a class or function that the file only refers to."""
    return isinstance(value, type) and issubclass(value, Inert)


def walk(description: Any) -> Iterator[Any]:
    """Yield every value in a description once, containers before what they hold."""
    seen: set[int] = set()
    todo = [description]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        todo.extend(parts_of(value))


def parts_of(value: Any) -> Iterable[Any]:
    """Return what a value of a description holds directly."""
    if isinstance(value, Inert):
        return value.parts()
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return value if isinstance(value, (list, tuple, set, frozenset)) else ()
