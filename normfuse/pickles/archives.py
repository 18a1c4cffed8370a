"""The two containers of ``torch.save``: where the pickle is, and the bytes of each storage.

A *zip* holds ``NAME/data.pkl`` and a record ``NAME/data/KEY`` for each storage; each record's checksum is compared
when it is read. A *legacy* file is five pickles (magic number, version, system, the object, keys) and then, for each
key, a count of eight bytes and the raw elements; it has no checksums.

Limits, before memory is taken: the records of a zip hold at most :data:`LARGEST_RATIO` times the bytes of the file
itself, and a legacy storage no more than what is left of the file.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import IO, Any, Protocol

import torch

from normfuse.errors import LoadError
from normfuse.formats import Format, sniff_stream
from normfuse.pickles.inert import StorageReference, read_inert, walk

LARGEST_RATIO = 8
"""How many times its own size a zip may unpack to; what torch writes is not compressed at all."""

_STORAGES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
    **{"QUInt8": torch.quint8, "QInt8": torch.qint8, "QInt32": torch.qint32, "QUInt4x2": torch.quint4x2},
    **{"QUInt2x4": torch.quint2x4, "Untyped": torch.uint8},
}
DTYPES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
DTYPES["torch.storage.UntypedStorage"] = torch.uint8
"""The dtype of the elements of a storage, by the path of its class."""


class Archive(Protocol):
    """An open file of torch."""

    description: Any
    """What its pickle describes, inert."""

    def bytes_of(self, reference: StorageReference) -> torch.UntypedStorage:
        """Return the memory of a storage: the same one for the same key."""
        ...


def open_archive(file: IO[bytes]) -> Archive:
    """Return the archive in an open file.

    Raises:
        LoadError: It is damaged, or larger inside than outside.
        pickle.UnpicklingError: Its pickle is damaged, as are others of :func:`normfuse.pickles.inert.read_inert`.
    """
    return LegacyArchive(file) if sniff_stream(file) is Format.LEGACY else ZipArchive(file)


class ZipArchive:
    """A file of torch 1.6 and later."""

    def __init__(self, file: IO[bytes]) -> None:
        size = file.seek(0, os.SEEK_END)
        self._zip = zipfile.ZipFile(file)
        inside = sum(entry.file_size for entry in self._zip.infolist())
        if inside > LARGEST_RATIO * size:
            raise LoadError(f"unpacks to {inside} bytes, more than {LARGEST_RATIO} times its size")
        self._records = {name.partition("/")[2]: name for name in self._zip.namelist()}
        if self._records.get("byteorder") and self._zip.read(self._records["byteorder"]) != b"little":
            raise LoadError("written on a machine with another order of bytes; save it on one like this")
        self.description = read_inert(io.BytesIO(self._zip.read(self._records["data.pkl"])))
        self._memory: dict[str, torch.UntypedStorage] = {}

    def bytes_of(self, reference: StorageReference) -> torch.UntypedStorage:
        """Return the memory of a storage; reading it compares its checksum."""
        if reference.key not in self._memory:
            record = self._records.get(f"data/{reference.key}")
            if record is None:
                raise LoadError(f"has no record for storage {reference.key}")
            content = bytearray(self._zip.getinfo(record).file_size)
            with self._zip.open(record) as stream:
                count = stream.readinto(content)  # type: ignore[attr-defined]
                if count != len(content) or stream.read(1):
                    raise LoadError(f"storage {reference.key} has another length than its record says")
            self._memory[reference.key] = as_memory(content)
        return self._memory[reference.key]


class LegacyArchive:
    """A file of torch before 1.6, or one written without zip."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._size = file, file.seek(0, os.SEEK_END)
        file.seek(0)
        _, _, system, self.description, keys = (read_inert(file) for _ in range(5))
        if not (isinstance(system, Mapping) and system.get("little_endian", True) and isinstance(keys, list)):
            raise pickle.UnpicklingError("its system information is damaged, or of another order of bytes")
        self._start, self._keys = file.tell(), [str(key) for key in keys]
        self._memory: dict[str, torch.UntypedStorage] | None = None
        self._sizes = _element_sizes(self.description)

    def bytes_of(self, reference: StorageReference) -> torch.UntypedStorage:
        """Return the memory of a storage, or of the part of another that it is a view of."""
        if self._memory is None:
            self._memory = self._read_all()
        if reference.key not in self._memory:
            raise LoadError(f"has no bytes for storage {reference.key}")
        whole = self._memory[reference.key]
        if reference.view is None:
            return whole
        _, offset, count = reference.view
        width = self._sizes[reference.key]
        return whole[offset * width : (offset + count) * width]  # type: ignore[return-value]

    def _read_all(self) -> dict[str, torch.UntypedStorage]:
        """Read the storages, which stand one behind the other."""
        self._file.seek(self._start)
        memory: dict[str, torch.UntypedStorage] = {}
        for key in self._keys:
            (count,) = struct.unpack("<q", self._file.read(8))
            length = count * self._sizes.get(key, 1)
            if not 0 <= length <= self._size - self._file.tell():
                raise LoadError("ends in the middle of a tensor")
            content = bytearray(length)
            if self._file.readinto(content) != length:  # type: ignore[attr-defined]
                raise LoadError("ends in the middle of a tensor")
            memory[key] = as_memory(content)
        return memory


def _element_sizes(description: Any) -> dict[str, int]:
    """Return the bytes of an element of each storage that a description refers to."""
    return {ref.key: dtype_of(ref).itemsize for ref in walk(description) if isinstance(ref, StorageReference)}


def dtype_of(reference: StorageReference) -> torch.dtype:
    """Return the dtype of a storage's elements.

    Raises:
        LoadError: torch has no such storage.
    """
    if reference.kind not in DTYPES:
        raise LoadError(f"holds a storage of kind {reference.kind}, which torch does not have")
    return DTYPES[reference.kind]


def as_memory(content: bytearray) -> torch.UntypedStorage:
    """Return bytes as the memory of a storage, without a copy."""
    if not content:
        return torch.UntypedStorage(0)
    return torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
