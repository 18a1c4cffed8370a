"""Tell model files apart by their content; nothing in them is executed.

The extension says little (``.pt`` is used for state dicts, pickled modules and TorchScript alike), so :func:`sniff`
looks inside:

==================  ==================================================================================
format              tell
==================  ==================================================================================
``STATE_DICT``      zip with ``*/data.pkl`` that names only tensors and plain containers
``PICKLED_MODULE``  zip with ``*/data.pkl`` that names anything else
``TORCHSCRIPT``     zip with ``*/code/`` or ``*/constants.pkl``
``EXPORTED``        zip with ``*/archive_format`` or ``serialized_exported_program.json``
``LEGACY``          the magic number that ``torch.save`` wrote before it wrote zip files
``SAFETENSORS``     an 8-byte length and a JSON object of that length
``ONNX``            a protobuf message with the fields of ``ModelProto``
==================  ==================================================================================

Pickles are read as a list of opcodes with :mod:`pickletools`, which builds no object. This file imports no torch.
"""

from __future__ import annotations

import enum
import io
import json
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from normfuse.errors import LoadError

LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""LONG1 opcode with torch's magic number, then STOP; the two bytes before it name the pickle protocol."""

FRAME = b"\x95"

LEGACY_PICKLES = 5
"""A legacy file is magic number, protocol version, system information, the object, storage keys; then raw storages."""

DATA_PREFIXES = ("torch._utils._rebuild_", "torch.storage.", "torch.nn.parameter.", "torch._tensor._rebuild_")
DATA_GLOBALS = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "torch.serialization._get_layout",
        "_codecs.encode",
        "builtins.set",
        "builtins.bytearray",
        "builtins.complex",
    }
)


class Format(enum.Enum):
    """What a file holds; the value is the word used in reports and errors."""

    STATE_DICT = "state_dict"
    PICKLED_MODULE = "pickled module"
    LEGACY = "legacy torch file"
    TORCHSCRIPT = "TorchScript"
    EXPORTED = "ExportedProgram"
    SAFETENSORS = "safetensors"
    ONNX = "ONNX"
    PICKLE = "plain pickle"
    EMPTY = "empty"
    TRUNCATED = "truncated"
    UNKNOWN = "unknown"


def sniff(path: str | Path) -> Format:
    """Return what the file holds, judged by its content alone; executes nothing.

    Args:
        path: The file; its extension is not looked at.

    Raises:
        LoadError: There is no such file, or it cannot be opened.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe may never end
        raise LoadError(f"{path}: a {'directory' if os.path.isdir(path) else 'pipe or a device'}, not a file")
    try:
        with open(path, "rb") as file:
            return sniff_stream(file)
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}") from error


def sniff_stream(file: IO[bytes]) -> Format:
    """Return what an open file holds; leaves it at its start. See :func:`sniff`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    found = _sniff(file, size)
    file.seek(0)
    return found


def _sniff(file: IO[bytes], size: int) -> Format:
    head = file.read(32)
    file.seek(0)
    if not head:
        return Format.EMPTY
    if head.startswith(b"PK"):
        return _sniff_zip(file)
    found = _sniff_safetensors(file, size)  # before pickles: the length of its header may begin with their first byte
    file.seek(0)
    if found is None and head[:1] == b"\x80":
        return _sniff_pickle(file, head)
    return found or _sniff_onnx(file, size) or Format.UNKNOWN


def _sniff_zip(file: IO[bytes]) -> Format:
    try:
        with zipfile.ZipFile(file) as archive:
            first = min((entry.header_offset for entry in archive.infolist()), default=0)
            return _sniff_archive(archive) if first == 0 else Format.TRUNCATED  # else: a zip inside a cut-off zip
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError):
        return Format.TRUNCATED


def _sniff_archive(archive: zipfile.ZipFile) -> Format:
    inside = {name.partition("/")[2]: name for name in archive.namelist()}
    if "archive_format" in inside or "serialized_exported_program.json" in archive.namelist():
        return Format.EXPORTED
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        return Format.TORCHSCRIPT
    if "data.pkl" not in inside:
        return Format.UNKNOWN
    names = pickle_globals(io.BytesIO(archive.read(inside["data.pkl"])))
    return Format.STATE_DICT if all(map(is_data, names)) else Format.PICKLED_MODULE


def _sniff_pickle(file: IO[bytes], head: bytes) -> Format:
    unframed = head[11:] if head[2:3] == FRAME else head[2:]  # protocol 4 writes how long it is
    legacy = unframed.startswith(LEGACY_MAGIC)
    try:
        legacy_globals(file) if legacy else pickle_globals(file)
    except ValueError:
        return Format.TRUNCATED
    return Format.LEGACY if legacy else Format.PICKLE


def is_data(name: str) -> bool:
    """Whether a global of a pickle is a tensor, a storage, a dtype or a plain container."""
    torch_name = name.startswith("torch.") and name.count(".") == 1
    return torch_name or name in DATA_GLOBALS or name.startswith(DATA_PREFIXES)


def pickle_globals(file: IO[bytes]) -> set[str]:
    """Return the globals that one pickle asks for, as ``"module.name"``, without building any object.

    Raises:
        ValueError: The bytes are not a complete pickle.
    """
    found: set[str] = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(python3_name(str(argument).replace(" ", ".", 1)))
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return found


def legacy_globals(file: IO[bytes]) -> set[str]:
    """Return the globals of the pickles at the start of a legacy torch file; see :func:`pickle_globals`."""
    return set().union(*(pickle_globals(file) for _ in range(LEGACY_PICKLES)))


def python3_name(name: str) -> str:
    """Return the present name of what a pickle of Python 2 names."""
    for old, new in (("__builtin__.", "builtins."), ("copy_reg.", "copyreg.")):
        name = new + name.removeprefix(old) if name.startswith(old) else name
    return name


def _sniff_safetensors(file: IO[bytes], size: int) -> Format | None:
    file.seek(0)
    prefix = file.read(9)
    if len(prefix) < 9 or prefix[8:] != b"{":
        return None
    length = struct.unpack("<Q", prefix[:8])[0]
    if length > size - 8:
        return Format.TRUNCATED if length < 100_000_000 else None  # the limit of the format itself
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        end = max(_offsets_end(header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    return Format.SAFETENSORS if 8 + length + end <= size else Format.TRUNCATED


def _offsets_end(entries: Iterable[dict]) -> Iterable[int]:
    return (int(entry["data_offsets"][1]) for entry in entries if "data_offsets" in entry)


ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""Field number to wire type (0 varint, 2 length-delimited) of ``ModelProto``, from onnx.proto."""
ONNX_GRAPH = 7


def _sniff_onnx(file: IO[bytes], size: int) -> Format | None:
    """Walk the top-level fields; each must be one of ``ModelProto`` and the last must end with the file."""
    file.seek(0)
    seen: set[int] = set()
    while file.tell() < size:
        tag = _varint(file)
        number, wire = (tag >> 3, tag & 7) if tag is not None else (0, 0)
        if ONNX_FIELDS.get(number) != wire:
            return None
        value = _varint(file)
        if value is None or (wire == 2 and file.tell() + value > size):
            return Format.TRUNCATED if 1 in seen else None
        file.seek(value if wire == 2 else 0, os.SEEK_CUR)
        seen.add(number)
    return Format.ONNX if ONNX_GRAPH in seen else None


def _varint(file: IO[bytes]) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
