"""Files of arrays: nothing is unpickled, no array is larger than its bytes, damage is one line."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from normfuse.cli.arrays import read_arrays
from normfuse.errors import LoadError


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "|u1", "|b1", "<f2"])
def test_arrays_are_read_as_numpy_reads_them(dtype: str, order: str, tmp_path: Path):
    array = numpy.asarray(numpy.arange(12).reshape(3, 2, 2), dtype=dtype, order=order)
    numpy.save(tmp_path / "x.npy", array)
    assert numpy.array_equal(read_arrays(tmp_path / "x.npy").numpy(), array)
    numpy.savez(tmp_path / "x.npz", array, array[0])
    numpy.savez_compressed(tmp_path / "y.npz", a=array, b=array[0])
    assert [x.shape for x in read_arrays(tmp_path / "x.npz")] == [(3, 2, 2), (2, 2)]
    assert list(read_arrays(tmp_path / "y.npz")) == ["a", "b"]


@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_small_arrays(shape: tuple[int, ...], tmp_path: Path):
    numpy.save(tmp_path / "x.npy", numpy.zeros(shape))
    assert read_arrays(tmp_path / "x.npy").shape == shape


def _npy(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    numpy.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(16)


def _zip(path: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", content)


def _pickled(path: Path) -> None:
    numpy.save(path, numpy.array([{}], dtype=object), allow_pickle=True)


def _cut(path: Path) -> None:
    numpy.savez(path, x=numpy.zeros((2, 3, 8, 8)))
    path.write_bytes(path.read_bytes()[:300])


def _flipped(path: Path) -> None:
    numpy.savez(path, x=numpy.zeros((2, 3, 8, 8)))
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty.npy": lambda path: path.write_bytes(b""),
    "text.npy": lambda path: path.write_text("hello"),
    "larger.npy": lambda path: path.write_bytes(_npy((1 << 40,))),
    "negative.npy": lambda path: path.write_bytes(_npy((-4,))),
    "longer.npy": lambda path: path.write_bytes(_npy((3,))),
    "pickled.npy": _pickled,
    "cut.npz": _cut,
    "flipped.npz": _flipped,
    "empty.npz": lambda path: zipfile.ZipFile(path, "w").close(),
    "larger.npz": lambda path: _zip(path, _npy((1 << 40,))),
    "bomb.npz": lambda path: _zip(path, bytes(1 << 29), zipfile.ZIP_DEFLATED),
    "code.npy": lambda path: path.write_bytes(_npy((4,)).replace(b"'<f4'", b"exit()")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_arrays(name: str, tmp_path: Path):
    BROKEN[name](tmp_path / name)
    with pytest.raises(LoadError, match=name):
        read_arrays(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_pipes_are_not_read(refuses: Callable[..., str], model_file: str, folder: Path):
    os.mkfifo(folder / "x.npz")
    (folder / "images").mkdir()
    os.mkfifo(folder / "images" / "a.png")
    assert "not an ordinary file" in refuses("inspect", model_file, "--input", "x.npz", code=4)
    assert "no image" in refuses("quantize", model_file, "--calib", "images", code=4)


@pytest.mark.parametrize("command", ["quantize", "recalibrate", "swap"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite(
    command: str, value: float, refuses: Callable[..., str], model_file: str, folder: Path
):
    data = torch.randn(4, 3, 8, 8)
    data[1, :, 2] = value
    torch.save(data, folder / "data.pt")
    options = ("--to", "l1") if command == "swap" else ()
    text = refuses(command, model_file, "--calib", "data.pt", *options, code=4)
    assert "24 of 768 values" in text
