from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import normfuse
from normfuse import surgery
from normfuse.verify import verify

SHAPE = ("--input-shape", "1,3,8,8")


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_writes_a_folded_file_that_loads_again(run, model, model_file, folder: Path):
    result = run("fold", model_file, *SHAPE)
    assert result.exit_code == 0, result.output
    assert "2 of 2" in result.stdout
    assert "PASSED" in result.stdout
    assert "normfuse export model.folded.pt" in result.stdout
    assert sorted(os.listdir(folder)) == ["model.folded.pt", "model.pt"]
    folded = normfuse.load("model.folded.pt")
    assert not norms(folded)
    assert verify(model, folded, torch.randn(2, 3, 8, 8))


def test_the_file_remembers_the_input(run, model_file):
    run("fold", model_file, *SHAPE)
    document = json.loads(run("inspect", "model.folded.pt", "--json", "-").stdout)
    assert document["model"]["inputs"][0]["shape"] == [1, 3, 8, 8]
    assert document["model"]["inputs_assumed"] is False


def test_folding_a_folded_file_changes_nothing(run, model_file, folder: Path):
    run("fold", model_file, *SHAPE)
    result = run("fold", "model.folded.pt", "-o", "again.pt")
    assert result.exit_code == 0, result.output
    first, second = normfuse.load("model.folded.pt").state_dict(), normfuse.load("again.pt").state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_json_has_verification_and_output(run, model_file):
    document = json.loads(run("fold", model_file, *SHAPE, "--json", "-", "--num-inputs", "3").stdout)
    assert document["verify"]["passed"] is True
    assert document["verify"]["inputs"] == 3
    assert document["verify"]["judge"] == "float64"
    assert document["verification"]["verified"] is True
    assert document["verification"]["dtype"] == "float32"
    assert [(entry["path"], len(entry["sha256"])) for entry in document["outputs"]] == [("model.folded.pt", 64)]
    assert document["next"] == "normfuse export model.folded.pt"


def test_no_verify(run, model_file):
    document = json.loads(run("fold", model_file, *SHAPE, "--json", "-", "--no-verify").stdout)
    assert document["verify"] is None
    assert document["verification"] is None
    assert len(document["outputs"]) == 1


def test_failed_verification_writes_nothing(run, model_file, folder: Path):
    result = run("fold", model_file, *SHAPE, "--atol", "0", "--json", "-")
    assert result.exit_code == 1
    assert "verification failed" in result.stderr
    assert json.loads(result.stdout)["verify"]["passed"] is False
    assert os.listdir(folder) == [model_file]


def test_a_wrong_fold_is_an_error_that_names_the_pass(run, model_file, folder: Path, monkeypatch: pytest.MonkeyPatch):
    assign = surgery.assign

    def wrong(module_of: Any, tensors: Any, *args: Any) -> None:
        assign(module_of, {name: value + 0.1 for name, value in tensors.items()}, *args)

    monkeypatch.setattr(surgery, "assign", wrong)
    result = run("fold", model_file, *SHAPE, "--json", "-")
    assert result.exit_code == 1
    assert "fold-bn changed what the model computes, first at 1: output" in result.stderr
    assert json.loads(result.stdout)["verify"]["passed"] is False
    assert os.listdir(folder) == [model_file]


@pytest.mark.parametrize(("option", "left"), [("--exclude", ["4"]), ("--include", ["1"])])
def test_only_some_norms(run, model_file, option: str, left: list[str]):
    document = json.loads(run("fold", model_file, *SHAPE, option, "4", "--json", "-").stdout)
    refused = [(pair["norm"], pair["reason"]) for pair in document["pairs"] if pair["action"] == "refused"]
    assert refused == [(name, "EXCLUDED") for name in left]
    assert len(norms(normfuse.load("model.folded.pt"))) == 1


def test_require_fold_writes_nothing_where_a_norm_is_left(run, model_file, folder: Path):
    result = run("fold", model_file, *SHAPE, "--exclude", "1", "--require-fold")
    assert result.exit_code == 3
    assert os.listdir(folder) == [model_file]


def test_force_overwrites(run, model_file, folder: Path):
    (folder / "model.folded.pt").write_text("old")
    assert run("fold", model_file, *SHAPE, "--force").exit_code == 0
    assert normfuse.load("model.folded.pt")


def test_output_elsewhere(run, model_file, folder: Path):
    (folder / "out").mkdir()
    assert run("fold", model_file, *SHAPE, "-o", "out/small.pt").exit_code == 0
    assert os.listdir(folder / "out") == ["small.pt"]


def test_checkpoint_and_architecture_to_safetensors(run, folder: Path):
    (folder / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))\n"
    )
    source = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    torch.save(source.state_dict(), folder / "weights.pt")
    result = run("fold", "net:make", "--weights", "weights.pt", "-o", "small.safetensors")
    assert result.exit_code == 0, result.output
    folded = normfuse.load("small.safetensors", arch="net:make")
    assert verify(source, folded, torch.randn(2, 6))
    assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())


def test_exported_program_brings_its_inputs(run, model, folder: Path):
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 10, 12),)), folder / "model.pt2")
    document = json.loads(run("inspect", "model.pt2", "--json", "-").stdout)
    assert document["model"]["inputs"][0]["shape"] == [2, 3, 10, 12]
    assert document["model"]["inputs_from"] == "stored in the file"


@pytest.fixture
def onnx_file(folder: Path) -> str:
    """A graph of Conv, BatchNormalization and Relu with a batch of any size."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = {
        "w": torch.randn(4, 3, 3, 3),
        "gain": torch.randn(4),
        "shift": torch.randn(4),
        "mean": torch.randn(4),
        "var": torch.rand(4) + 0.5,
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["a", "gain", "shift", "mean", "var"], ["b"], name="norm"),
            helper.make_node("Relu", ["b"], ["y"], name="relu"),
        ],
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", kind, ["n", 4, 8, 8])],
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return "model.onnx"


def test_onnx_is_folded_in_its_graph(run, onnx_file, folder: Path):
    result = run("fold", onnx_file)
    assert result.exit_code == 0, result.output
    assert "1 of 1" in result.stdout
    assert "PASSED" in result.stdout
    assert "2 nodes, was 3" in result.stdout
    assert sorted(os.listdir(folder)) == ["model.folded.onnx", "model.onnx"]
    assert [node.op_type for node in onnx.load("model.folded.onnx").graph.node] == ["Conv", "Relu"]


def test_onnx_inspect_changes_nothing(run, onnx_file, folder: Path):
    document = json.loads(run("inspect", onnx_file, "--json", "-").stdout)
    assert [(pair["norm"], pair["action"]) for pair in document["pairs"]] == [("norm", "applied")]
    assert document["model"]["format"] == "ONNX"
    assert os.listdir(folder) == [onnx_file]


def test_onnx_failed_verification_writes_nothing(run, onnx_file, folder: Path):
    assert run("fold", onnx_file, "--atol", "0").exit_code == 1
    assert os.listdir(folder) == [onnx_file]


def test_onnx_with_nan_weights(refuses, onnx_file):
    model = onnx.load(onnx_file)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    weight.CopyFrom(onnx.numpy_helper.from_array(torch.full((4, 3, 3, 3), float("nan")).numpy(), "w"))
    onnx.save(model, onnx_file)
    assert "w" in refuses("fold", onnx_file, code=4)
