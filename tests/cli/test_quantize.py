from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normfuse
from normfuse.quantization.calibrated import CalibratedLayer
from tests.quantization.operands import image


@pytest.fixture
def data_file(model_file, folder: Path) -> str:
    np.save("calib.npy", image(20, 3, 8, 8, dtype=torch.float32).numpy())
    return "calib.npy"


def quantize(run, *args: object):
    return run("quantize", "model.pt", "--calib", "calib.npy", *args)


def count(model: nn.Module) -> int:
    return sum(isinstance(module, CalibratedLayer) for module in model.modules())


def test_writes_a_quantized_file_that_exports(run, data_file, folder: Path):
    result = quantize(run)
    assert result.exit_code == 0, result.output
    assert "3 of 3 layers" in result.stdout
    assert "range ratio" in result.stdout
    assert "normfuse export model.quantized.pt" in result.stdout
    assert sorted(os.listdir(folder)) == ["calib.npy", "model.pt", "model.quantized.pt"]
    assert count(normfuse.load("model.quantized.pt")) == 3
    exported = run("export", "model.quantized.pt")
    assert exported.exit_code == 0, exported.output
    assert "PASSED" in exported.stdout
    assert "quantization" in exported.stdout or "steps off" in exported.stdout
    verified = run("verify", "model.quantized.pt", "model.quantized.onnx")
    assert verified.exit_code == 0, verified.output


def test_json(run, data_file):
    document = json.loads(quantize(run, "--json", "-", "--keep-last", "--bits", 6, "--groups", 3).stdout)
    assert document["quantized"] == 2
    pairs = {pair["subject"]: pair for pair in document["pairs"]}
    assert pairs["8"]["reason"] == "EXCLUDED"
    assert all(0 < pairs[name]["error"] < 0.2 and 1 <= pairs[name]["groups"] <= 3 for name in ("0", "3"))
    assert pairs["0"]["range_ratio"] >= 1
    assert 0.9 < document["verify"]["cosine"] <= 1
    assert document["next"] == "normfuse export model.quantized.pt"


def test_more_bits_and_groups_come_nearer(run, data_file):
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(0, -2, 8).view(-1, 1, 1, 1))  # channels of ranges that differ
    torch.save(model, "model.pt")

    def cosine(*args: object) -> float:
        return json.loads(quantize(run, "--json", "-", "--force", *args).stdout)["verify"]["cosine"]

    assert cosine("--bits", 4) < cosine("--bits", 8)
    assert cosine("--bits", 5, "--method", "per-tensor") < cosine("--bits", 5, "--groups", 6)


def test_every_layer_on_request(run, data_file):
    assert "largest first" in quantize(run, "-v", "--percentile", 99.9).stdout


def test_for_training(run, data_file):
    result = run("quantize", "model.pt", "--for-training", "--bits", 6, "--grad-bits", 8, "--input-shape", "2,3,8,8")
    assert result.exit_code == 0, result.output
    assert "normfuse.load" in result.stdout
    model = normfuse.load("model.quantized.pt")
    assert "grad_bits=8" in repr(model)
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()


def test_requirement_and_tolerance(run, data_file, folder: Path):
    assert quantize(run, "--require-all", "--exclude", "8").exit_code == 0
    assert quantize(run, "--force", "--atol", "1e-9").exit_code == 1
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3))
    torch.save(layers, "transposed.pt")
    result = run("quantize", "transposed.pt", "--calib", "calib.npy", "--require-all")
    assert result.exit_code == 3
    assert "unsupported layer" in result.stdout
    assert not (folder / "transposed.quantized.pt").exists()


@pytest.mark.parametrize(
    ("args", "text", "code"),
    [
        ((), "--calib DATA", 2),
        (("--calib", "calib.npy", "--for-training"), "--calib DATA", 2),
        (("--for-training", "--method", "per-channel"), "per-channel is for trained models", 2),
        (("--calib", "calib.npy", "--grad-bits", 8), "--grad-bits is for --for-training", 2),
        (("--calib", "nothing.npy"), "does not exist", 2),
        (("--calib", "calib.npy", "--bits", 2), "2 is not in the range", 2),
        (("--calib", "calib.npy", "--percentile", 0), "0 is not in the range", 2),
        (("--calib", "calib.npy", "-o", "out.onnx"), "should end in", 2),
        (("--calib", "text.npy"), "not a .npz or .npy file", 4),
        (("--calib", "wide.npy"), "does not run on", 4),
    ],
)
def test_bad_input_is_one_line(refuses, data_file, args: tuple[object, ...], text: str, code: int):
    np.save("wide.npy", np.zeros((2, 7, 9, 9), dtype=np.float32))
    Path("text.npy").write_text("no array")
    assert text in refuses("quantize", "model.pt", *args, code=code)


def test_existing_file_and_onnx(refuses, data_file, folder: Path):
    (folder / "model.quantized.pt").touch()
    assert "--force" in refuses("quantize", "model.pt", "--calib", "calib.npy", code=2)
    onnx = pytest.importorskip("onnx")
    header = '<ir_version: 8, opset_import: ["": 17]>'
    onnx.save(onnx.parser.parse_model(f"{header} g (float[1] x) => (float[1] y) {{ y = Relu(x) }}"), "m.onnx")
    assert "quantize the torch model" in refuses("quantize", "m.onnx", "--calib", "calib.npy", "-o", "o.pt", code=4)
