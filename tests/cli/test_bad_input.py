"""Bad files: each one clear line, its exit code, and no file left behind."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

COMMANDS = ("inspect", "fold", "export")


class Hostile:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kept", [0, 4, 300])
def test_truncated(refuses, model, folder: Path, command: str, kept: int):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    (folder / "model.pt").write_bytes(buffer.getvalue()[:kept])
    assert "model.pt" in refuses(command, "model.pt", code=4)


def test_empty_says_so(refuses, folder: Path):
    (folder / "model.pt").touch()
    assert "empty" in refuses("fold", "model.pt", code=4)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", [b"hello, world", b"\x89PNG\r\n\x1a\n" + bytes(100), b"{}", bytes(64)])
def test_wrong_type(refuses, folder: Path, command: str, content: bytes):
    (folder / "model.pt").write_bytes(content)
    assert "model.pt" in refuses(command, "model.pt", code=4)


def test_not_a_model(refuses, folder: Path):
    torch.save([1, 2, 3], folder / "model.pt")
    assert "list" in refuses("fold", "model.pt", code=4)


@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_pickle_does_not_execute(refuses, folder: Path, tmp_path_factory, command: str):
    marker = tmp_path_factory.mktemp("elsewhere") / "executed"
    torch.save({"model": Hostile(marker)}, folder / "model.pt")
    line = refuses(command, "model.pt", code=4)
    assert not marker.exists()
    assert "--trust-pickle" in line


def test_hostile_plain_pickle_does_not_execute(refuses, folder: Path, tmp_path_factory):
    marker = tmp_path_factory.mktemp("elsewhere") / "executed"
    (folder / "model.pt").write_bytes(pickle.dumps(Hostile(marker)))
    refuses("fold", "model.pt", code=4)
    assert not marker.exists()


def test_hostile_pickle_in_a_module_does_not_execute(refuses, model, folder: Path, tmp_path_factory):
    marker = tmp_path_factory.mktemp("elsewhere") / "executed"
    model.secret = Hostile(marker)
    torch.save(model, folder / "model.pt")
    refuses("export", "model.pt", code=4)
    assert not marker.exists()


def test_class_that_is_not_allowed_is_named_with_the_ways_out(refuses, folder: Path, monkeypatch):
    (folder / "some_project.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(folder)
    torch.save(importlib.import_module("some_project").Net(2, 2), folder / "model.pt")
    monkeypatch.delitem(sys.modules, "some_project")
    line = refuses("fold", "model.pt", code=4)
    assert "some_project.Net" in line
    assert "--allow-global" in line
    assert "some_project" not in sys.modules  # not even imported


def test_state_dict_asks_for_its_architecture(refuses, model, folder: Path):
    torch.save(model.state_dict(), folder / "model.pt")
    assert "--arch" in refuses("fold", "model.pt", code=4)


@pytest.mark.parametrize("arch", ["timm:resnet_eighteen", "nothing_here:make", "resnet18", "os:getcwd"])
def test_wrong_architecture(refuses, model, folder: Path, arch: str):
    torch.save(model.state_dict(), folder / "model.pt")
    assert arch.partition(":")[0] in refuses("inspect", "model.pt", "--arch", arch, code=4)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_numbers_are_named(refuses, model, folder: Path, command: str, value: float):
    model[0].weight.data[0, 0, 0, 0] = value
    model[4].running_var.data[1] = value
    torch.save(model, folder / "model.pt")
    line = refuses(command, "model.pt", code=4)
    assert "0.weight, 4.running_var" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_shape(refuses, model_file, command: str):
    line = refuses(command, model_file, "--input-shape", "1,7,8,8", code=4)
    assert "1x7x8x8" in line


def test_wrong_number_of_axes(refuses, model_file):
    assert "does not run" in refuses("fold", model_file, "--input-shape", "3", code=4)


def test_input_file_that_is_none(refuses, model_file, folder: Path):
    (folder / "x.npz").write_text("not an archive")
    assert "x.npz" in refuses("fold", model_file, "--input", "x.npz", code=4)


def test_no_input_can_be_guessed(refuses, folder: Path):
    torch.save(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)), folder / "model.pt")
    assert "--input-shape" in refuses("fold", "model.pt", code=4)


@pytest.mark.parametrize("command", ["fold", "inspect"])
def test_damaged_onnx(refuses, folder: Path, command: str):
    (folder / "model.onnx").write_bytes(b"\x08\x07\x12\x04test\x3a\x50" + bytes(80))
    assert "model.onnx" in refuses(command, "model.onnx", code=4)


def test_training_mode_is_folded_as_eval_with_a_note(run, model, folder: Path):
    torch.save(model.train(), folder / "model.pt")
    result = run("fold", "model.pt", "--input-shape", "1,3,8,8")
    assert result.exit_code == 0, result.output
    assert "training mode" in result.stdout
    assert "2 of 2" in result.stdout
