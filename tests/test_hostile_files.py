"""A model file that is damaged, or could run code, is an error with its reason."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.errors import LoadError
from normfuse.saving import FOLDED_KEY, MODULE_KEY
from normfuse.serialize import load, read, save
from tests.saved_net import ARCH, SUFFIXES, folded, unfolded

# damaged and hostile files


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folded_file_with_a_tensor_missing(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    save(folded(), path)
    if suffix == ".safetensors":
        safetensors = pytest.importorskip("safetensors")
        with safetensors.safe_open(path, "pt") as file:
            metadata, keys = file.metadata(), list(file.keys())
            tensors = {key: file.get_tensor(key) for key in keys if key != "conv1.bias"}
        safetensors.torch.save_file(tensors, path, metadata)
    else:
        entries = torch.load(path, weights_only=True)
        del entries["conv1.bias"]
        torch.save(entries, path)
    with pytest.raises(LoadError, match=r"conv1\.bias"):
        load(path, model=unfolded())


def _with_manifest(path: Path, change: Callable[[dict], Any]) -> None:
    entries = torch.load(path, weights_only=True)
    manifest = json.loads(entries[FOLDED_KEY])
    change(manifest)
    entries[FOLDED_KEY] = json.dumps(manifest)
    entries.pop(MODULE_KEY, None)
    torch.save(entries, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=99), "update normfuse"),
        (lambda m: m.pop("edits"), "damaged"),
        (lambda m: m["edits"].append({"op": "explode"}), "does not fit"),
        (lambda m: m["edits"][0].update(path="nowhere"), "does not fit"),
        (lambda m: m["edits"][0].update(module={"class": "os.system", "kwargs": {"command": "true"}}), "cannot build"),
    ],
)
def test_damaged_manifest(change: Callable[[dict], Any], message: str, tmp_path: Path) -> None:
    save(folded(), tmp_path / "m.pt")
    _with_manifest(tmp_path / "m.pt", change)
    with pytest.raises(LoadError, match=message):
        load(tmp_path / "m.pt", model=unfolded())


@pytest.mark.parametrize("arch", [ARCH, "os:system", "torch.hub:load", "timm:hf-hub:someone/model"])
def test_a_file_cannot_choose_what_is_imported_and_called(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    save(folded(), tmp_path / "m.pt", arch=arch)
    monkeypatch.setattr("normfuse.architectures.build", lambda *_: pytest.fail("it was built"))
    with pytest.raises(LoadError, match="--arch"):
        load(tmp_path / "m.pt")


def test_architecture_of_the_file_if_trusted(tmp_path: Path) -> None:
    save(folded(), tmp_path / "m.pt", arch=ARCH)
    assert read(tmp_path / "m.pt", trust_pickle=True).arch == ARCH
    with pytest.raises(LoadError, match=f"--arch {ARCH}"):
        read(tmp_path / "m.pt", allow_globals=[ARCH.replace(":", ".")])  # which opens a class, not what builds it
    assert read(tmp_path / "m.pt", arch=ARCH).arch == ARCH


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_hostile_module_inside_a_normfuse_file(tmp_path: Path) -> None:
    save(nn.Linear(2, 2), tmp_path / "m.pt")
    entries = torch.load(tmp_path / "m.pt", weights_only=True)
    buffer = io.BytesIO()
    torch.save(Touch(tmp_path / "touched"), buffer)
    entries[MODULE_KEY] = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    torch.save(entries, tmp_path / "m.pt")
    with pytest.raises(LoadError, match="Path"):
        load(tmp_path / "m.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"PK\x03\x04 and then nothing", "truncated"), (b"hello", "not a model file")],
)
def test_refused_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(LoadError, match=message):
        load(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_says_what_to_do(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"TorchScript.*state_dict.*--arch"):
        load(tmp_path / "m.pt")
