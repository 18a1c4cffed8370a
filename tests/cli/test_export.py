from __future__ import annotations

import json
import os
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

SHAPE = ("--input-shape", "1,3,8,8")


def operators(path: str) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_as_typed_in_the_documentation(run, model_file, folder: Path):
    result = run("export", "--fold-bn", model_file)
    assert result.exit_code == 0, result.output
    assert "2 of 2" in result.stdout
    assert "PASSED" in result.stdout
    assert "assumption" in result.stdout
    assert "normfuse verify model.pt model.onnx" in result.stdout
    assert sorted(os.listdir(folder)) == ["model.onnx", "model.pt"]
    assert "BatchNormalization" not in operators("model.onnx")


@pytest.mark.models
@pytest.mark.slow
def test_pickled_torchvision_resnet(run, folder: Path):
    import torchvision

    torch.save(torchvision.models.resnet18(num_classes=3), folder / "model.pt")
    result = run("export", "--fold-bn", "model.pt", *SHAPE[:1], "1,3,32,32", "--num-inputs", "2")
    assert result.exit_code == 0, result.output
    assert "20 of 20" in result.stdout
    assert "BatchNormalization" not in operators("model.onnx")


def test_a_file_that_fold_wrote(run, model_file, folder: Path):
    run("fold", model_file, *SHAPE)
    result = run("export", "--fold-bn", "model.folded.pt")
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.stdout
    assert "assumption" not in result.stdout
    assert (folder / "model.onnx").exists()


def test_no_fold_keeps_the_norms(run, model_file):
    result = run("export", "--no-fold-bn", model_file, *SHAPE)
    assert result.exit_code == 0, result.output
    assert operators("model.onnx").count("BatchNormalization") == 2


def test_json(run, model_file):
    document = json.loads(run("export", model_file, *SHAPE, "--json", "-").stdout)
    assert document["verify"]["passed"] is True
    (written,) = document["outputs"]
    assert written["path"] == "model.onnx"
    assert written["nodes"] == sum(written["operators"].values()) == len(operators("model.onnx"))
    assert written["opset"] >= 18


def test_dynamic_axis(run, model_file):
    result = run("export", model_file, *SHAPE, "--dynamic", "0=batch", "--opset", "18")
    assert result.exit_code == 0, result.output
    exported = onnx.load("model.onnx")
    assert exported.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert exported.opset_import[0].version == 18


def test_half_precision(run, model_file):
    result = run("export", model_file, *SHAPE, "--precision", "fp16")
    assert result.exit_code == 0, result.output
    assert onnx.load("model.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_onnx_input_points_to_fold(run, refuses, model_file):
    run("export", model_file, *SHAPE)
    assert "normfuse fold" in refuses("export", "model.onnx", "-o", "b.onnx", code=2)


def test_require_fold_writes_nothing_where_a_norm_is_left(run, folder: Path):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), folder / "model.pt")
    result = run("export", "model.pt", *SHAPE, "--require-fold")
    assert result.exit_code == 3
    assert os.listdir(folder) == ["model.pt"]


def test_what_cannot_be_exported_leaves_nothing(run, folder: Path):
    (folder / "odd.py").write_text(
        "import torch\n"
        "class Odd(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x)[: int(x.sum() > 0) + 1]\n"
        "def make():\n"
        "    return torch.nn.Sequential(Odd(4, 4), torch.nn.Tanh())\n"
    )
    result = run("export", "odd:make", "-o", "odd.onnx")
    assert result.exit_code == 1, result.output
    assert "cannot be written as ONNX" in result.stderr
    assert not (folder / "odd.onnx").exists()
