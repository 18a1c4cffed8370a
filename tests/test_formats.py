"""Files are told apart by their content; nothing in them runs."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from normfuse.errors import LoadError
from normfuse.formats import Format, pickle_globals, sniff


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def _safetensors(path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": torch.ones(3)}, path)


def _onnx(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [value])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


def _torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(net(), torch.ones(1, 3, 5, 5)), path)


def _exported(path: Path) -> None:
    with open(path, "wb") as file:
        torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(2),)), file)


def _legacy(path: Path) -> None:
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False)


WRITERS: dict[Format, Callable[[Path], object]] = {
    Format.STATE_DICT: lambda path: torch.save({"model": net().state_dict(), "epoch": 3}, path),
    Format.PICKLED_MODULE: lambda path: torch.save(net(), path),
    Format.LEGACY: _legacy,
    Format.TORCHSCRIPT: _torchscript,
    Format.EXPORTED: _exported,
    Format.SAFETENSORS: _safetensors,
    Format.ONNX: _onnx,
    Format.PICKLE: lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    Format.EMPTY: lambda path: path.write_bytes(b""),
    Format.UNKNOWN: lambda path: path.write_text("not a model"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("expected", WRITERS, ids=lambda fmt: fmt.name)
def test_sniff_ignores_the_extension(expected: Format, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    WRITERS[expected](path)
    assert sniff(path) is expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("keep", [0.5, 0.9])
@pytest.mark.parametrize(
    "fmt", [Format.STATE_DICT, Format.PICKLED_MODULE, Format.TORCHSCRIPT, Format.EXPORTED, Format.SAFETENSORS]
)
def test_truncated(fmt: Format, keep: float, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    WRITERS[fmt](path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    assert sniff(path) is Format.TRUNCATED


def test_truncated_onnx(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    _onnx(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert sniff(path) is Format.TRUNCATED


def test_truncated_legacy(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    _legacy(path)
    path.write_bytes(path.read_bytes()[:200])
    assert sniff(path) is Format.TRUNCATED


def test_zip_of_something_else_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert sniff(path) is Format.UNKNOWN


@pytest.mark.parametrize("zip_format", [True, False])
def test_sniffing_runs_nothing(zip_format: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "model.pt", tmp_path / "touched"
    torch.save({"x": Touch(target)}, path, _use_new_zipfile_serialization=zip_format)
    assert sniff(path) is (Format.PICKLED_MODULE if zip_format else Format.LEGACY)
    assert not target.exists()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="No such file"):
        sniff(tmp_path / "none.pt")
    with pytest.raises(LoadError, match="directory"):
        sniff(tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_globals_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps([Touch, len], protocol=protocol))
    with open(path, "rb") as file:
        assert pickle_globals(file) == {f"{Touch.__module__}.Touch", "builtins.len"}


def test_safetensors_whose_length_begins_like_a_pickle(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x80)
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    assert path.read_bytes()[:1] == b"\x80"
    assert sniff(path) is Format.SAFETENSORS
