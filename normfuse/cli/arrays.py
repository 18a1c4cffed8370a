"""Read ``.npz`` and ``.npy`` files of plain arrays: nothing is unpickled, and no array is larger than its bytes.

numpy takes the memory that a header asks for before it reads; so each header is compared with what follows it first.
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from normfuse.errors import LoadError

if TYPE_CHECKING:
    import numpy

    from normfuse.outputs import Inputs

LARGEST_RATIO = 64
"""How many times its own size a compressed ``.npz`` may unpack to, where that is more than :data:`ALWAYS` bytes."""

ALWAYS = 1 << 28
"""Bytes that an ``.npz`` may unpack to in any case: arrays of zeros compress without end."""


def read_arrays(path: Path) -> Inputs:
    """Return the arrays of a ``.npz`` (by name, or by position if saved so) or ``.npy`` file.

    Raises:
        LoadError: The file is not one of these, is damaged, holds pickled objects, or arrays larger than itself.
    """
    import torch

    require_file(path)
    try:
        with open(path, "rb") as file:
            arrays = _read_zip(file) if file.read(2) == b"PK" else _read_one(file, path.stat().st_size)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except Exception as error:  # numpy's reader of headers, zipfile and zlib each raise kinds of their own
        text = "not a .npz or .npy file of plain arrays, or damaged"
        raise LoadError(f"{path}: {text} ({_first_line(error)})") from error
    if not tensors:
        raise LoadError(f"{path}: holds no array")
    if list(tensors) == [""]:
        return tensors[""]
    if len(tensors) == 1 or all(name.startswith("arr_") for name in tensors):
        return tuple(tensors.values())
    return tensors


def require_file(path: Path) -> None:
    """Refuse what is not an ordinary file: reading a pipe or a device may never end.

    Raises:
        LoadError: It is one, or there is no such file.
    """
    if not path.is_file():
        raise LoadError(f"{path}: {'not an ordinary file' if path.exists() else 'there is no such file'}")


def _read_zip(file: IO[bytes]) -> dict[str, Any]:
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        inside = sum(entry.file_size for entry in archive.infolist())
        if inside > max(LARGEST_RATIO * size, ALWAYS):
            raise ValueError(f"it unpacks to {inside} bytes, more than {LARGEST_RATIO} times its size")
        arrays = {}
        for entry in archive.infolist():
            with archive.open(entry) as stream:
                arrays[entry.filename.removesuffix(".npy")] = _read_array(stream, entry.file_size)
        return arrays


def _read_one(file: IO[bytes], size: int) -> dict[str, Any]:
    file.seek(0)
    return {"": _read_array(file, size)}


def _read_array(stream: IO[bytes], size: int) -> numpy.ndarray[Any, Any]:
    """Return one array of ``size`` bytes with its header."""
    import numpy
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which only a pickle can make")
    asked = math.prod(shape) * dtype.itemsize
    content = stream.read()
    if asked != len(content):
        raise ValueError(f"an array of shape {shape} has {len(content)} bytes where {asked} are due")
    array = numpy.frombuffer(bytearray(content), dtype=dtype)
    array = array.reshape(shape[::-1]).transpose() if by_columns else array.reshape(shape)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
