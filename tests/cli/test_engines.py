"""``normfuse export -o x.engine`` and the options that only narrow types and engines have."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

SHAPE = ("--input-shape", "1,3,8,8")
PROFILE = ("--min-shape", "1x3x8x8", "--max-shape", "4x3x8x8")
TARGET = ("--target", "sm_86,sm_89")


@pytest.fixture
def calibration(folder: Path) -> str:
    np.savez(folder / "data.npz", np.random.default_rng(0).standard_normal((6, 3, 8, 8), dtype=np.float32))
    return "data.npz"


@pytest.mark.tensorrt
def test_one_command_from_a_model_to_an_engine(run, model_file, folder: Path):
    result = run("export", model_file, *SHAPE, *PROFILE, *TARGET, "-o", "model.engine", "--precision", "fp16")
    assert result.exit_code == 0, result.output
    assert "2 of 2" in result.stdout
    assert "PASSED" in result.stdout
    assert "none computes a norm" in result.stdout
    assert "for sm_86, sm_89" in result.stdout
    assert sorted(os.listdir(folder)) == ["model.engine", "model.engine.json", "model.engine.log", "model.pt"]
    described = json.loads(Path("model.engine.json").read_text())
    assert described["norm_layers"] == []
    assert described["target"] == ["sm_86", "sm_89"]
    assert list(described["shapes"].values()) == [[[1, 3, 8, 8], [1, 3, 8, 8], [4, 3, 8, 8]]]
    assert set(described["dtypes"].values()) == {"HALF"}


@pytest.mark.tensorrt
def test_an_engine_of_int8_with_data(run, model_file, calibration, folder: Path):
    options = (*SHAPE, "-o", "model.engine", "--precision", "int8", "--calib", calibration, "--keep-onnx", *TARGET)
    result = run("export", model_file, *options, "--json", "report.json")
    assert result.exit_code == 0, result.output
    assert "QuantizeLinear" in {node.op_type for node in onnx.load("model.onnx").graph.node}
    document = json.loads((folder / "report.json").read_text())
    assert document["verify"]["inputs"] == 6
    assert document["verify"]["cosine"] > 0.9
    assert {entry["name"] for entry in document["ranges"]["weights"]} == {"0", "3", "8"}
    (written,) = document["outputs"]
    assert written["format"] == "TensorRT engine"
    assert written["norm_layers"] == []


@pytest.mark.tensorrt
def test_an_engine_of_an_onnx_file_has_its_norms_folded(run, refuses, model_file, folder: Path):
    run("export", "--no-fold-bn", model_file, *SHAPE, "--dynamic", "0", "--no-verify")
    assert "has axes of any size" in refuses("export", "model.onnx", "-o", "model.engine", code=2)
    assert "keeps its own types" in refuses("export", "model.onnx", "-o", "m.engine", "--precision", "fp16", code=2)
    wrong = ("--min-shape", "4x3x8x8", "--max-shape", "1x3x8x8")
    assert "min <= opt <= max" in refuses("export", "model.onnx", "-o", "model.engine", *wrong, code=2)
    result = run("export", "model.onnx", "-o", "model.engine", *PROFILE, *TARGET)
    assert result.exit_code == 0, result.output
    assert "2 of 2" in result.stdout
    assert "none computes a norm" in result.stdout


def test_int8_onnx(run, model_file, calibration):
    result = run("export", model_file, *SHAPE, "--precision", "int8", "--calib", calibration)
    assert result.exit_code == 0, result.output
    assert "step apart" in result.stdout
    assert "QuantizeLinear" in {node.op_type for node in onnx.load("model.onnx").graph.node}


def test_a_layer_that_is_kept_in_fp32(run, model_file):
    result = run("export", model_file, *SHAPE, "--precision", "mixed", "--keep-fp32", "8")
    assert result.exit_code == 0, result.output
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load("model.onnx").graph.initializer}
    assert kinds["8.weight"] == TensorProto.FLOAT
    assert kinds["0.weight"] == TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--target", "ampere", "-o", "m.engine"), "'ampere' is not a target; write sm_86,sm_89"),
        (("--target", "sm_86"), "--target is for an engine: pass -o NAME.engine"),
        (("--keep-fp32", "0"), "--keep-fp32 needs --precision mixed"),
        (("--precision", "int8"), "--precision int8 needs --calib"),
        (("--qdq", "tensorrt"), "--qdq needs --precision int8"),
        (("--calib", "nowhere"), "'nowhere' does not exist"),
        (("-o", "model.trt"), "should end in .onnx or .engine"),
    ],
)
def test_options_that_do_not_fit(refuses, model_file, options, text):
    assert text in refuses("export", model_file, *SHAPE, *options, code=2)


def test_fp8_is_for_tensorrt(refuses, model_file, calibration):
    assert "fp8 is for TensorRT" in refuses("export", model_file, "--precision", "fp8", "--calib", calibration, code=2)


def test_too_few_samples_for_a_batch(refuses, model_file, calibration):
    shape = ("--input-shape", "8,3,8,8")
    text = refuses("export", model_file, *shape, "--precision", "int8", "--calib", calibration, code=2)
    assert "fewer samples than the 8 of a batch" in text


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--min-shape", "4x3x8x8", "--max-shape", "1x3x8x8"), "min <= opt <= max is not so"),
        (("--min-shape", "1x3x8x8"), "needs the smallest and the largest shape"),
        (("--min-shape", "x:1x3", "--max-shape", "x:4x3"), "profile of 'x': the inputs are input"),
        (("--min-shape", "a:1", "--min-shape", "2"), "name each input once"),
        (("--dynamic", "0"), "axis 0 of 'input' is dynamic: an engine needs its min and max shape"),
    ],
)
def test_profiles_that_do_not_fit(refuses, model_file, options, text):
    line = refuses("export", model_file, *SHAPE, "-o", "model.engine", *options, code=2)
    assert text in line


def test_missing_tensorrt(refuses, model_file, monkeypatch):
    monkeypatch.setattr("normfuse.lowering.tensorrt.installed", lambda: ())
    line = refuses("export", model_file, *SHAPE, "-o", "model.engine", code=5)
    assert "pip install 'normfuse[tensorrt]'" in line


@pytest.mark.tensorrt
def test_a_target_that_does_not_exist(run, model_file, folder: Path):
    result = run("export", model_file, *SHAPE, "-o", "model.engine", "--target", "sm_90", "--num-inputs", "1")
    assert result.exit_code == 1
    assert "no target sm_90: tensorrt_rtx has" in result.stderr
    assert os.listdir(folder) == ["model.pt"]


@pytest.mark.tensorrt
def test_an_operator_that_tensorrt_has_not(refuses, folder: Path):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Bernoulli", ["x"], ["y"], "odd")], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "m.onnx")
    line = refuses("export", "m.onnx", "-o", "m.engine", "--no-fold-bn", code=1)
    assert "TensorRT cannot take Bernoulli (odd)" in line
    assert "it has no such operator; replace that module" in line


@pytest.mark.tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_engine_where_it_cannot_run(run, refuses, model_file, folder: Path):
    assert run("export", model_file, *SHAPE, *TARGET, "-o", "model.engine", "--no-verify").exit_code == 0
    assert "runs on an NVIDIA GPU" in refuses("verify", "model.pt", "model.engine", *SHAPE, code=5)
    description = Path("model.engine.json")
    found = json.loads(description.read_text())
    found["tensorrt"]["version"] = "0.1"
    description.write_text(json.dumps(found))
    assert "built by tensorrt_rtx 0.1" in refuses("verify", "model.pt", "model.engine", *SHAPE, code=4)
    description.unlink()
    assert "there is no file model.engine.json" in refuses("verify", "model.pt", "model.engine", *SHAPE, code=4)


def test_nothing_is_overwritten(refuses, model_file, folder: Path):
    for name in ("model.engine", "model.engine.json"):
        (folder / name).write_text("old")
        assert f"{name} exists; --force" in refuses("export", model_file, *SHAPE, "-o", "model.engine", code=2)
        (folder / name).unlink()
