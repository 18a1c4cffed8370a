from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

SHAPE = ("--input-shape", "1,3,8,8")


@pytest.fixture
def wrong_file(model, folder: Path) -> str:
    """The model with weights that are off by a little."""
    model[0].weight.data += 1e-2
    torch.save(model, folder / "wrong.pt")
    return "wrong.pt"


def test_folded_file(run, model_file):
    run("fold", model_file, *SHAPE)
    result = run("verify", model_file, "model.folded.pt", *SHAPE)
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.stdout
    assert "required" in result.stdout


def test_onnx_file(run, model_file):
    run("export", model_file, *SHAPE)
    result = run("verify", model_file, "model.onnx", *SHAPE)
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.stdout


def test_difference_is_exit_1_and_named(run, model_file, wrong_file):
    result = run("verify", model_file, wrong_file, *SHAPE)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "first at 0" in result.stderr


def test_the_required_tolerance_passes(run, model_file, wrong_file):
    first = json.loads(run("verify", model_file, wrong_file, *SHAPE, "--json", "-").stdout)
    needed = first["verify"]["required"]["atol"]
    assert run("verify", model_file, wrong_file, *SHAPE, "--atol", str(needed * 1.01)).exit_code == 0
    assert run("verify", model_file, wrong_file, *SHAPE, "--atol", str(needed * 0.99)).exit_code == 1


def test_cosine(run, model_file, wrong_file):
    args = ("verify", model_file, wrong_file, *SHAPE, "--atol", "10")
    assert run(*args, "--cosine", "0.9").exit_code == 0
    result = run(*args, "--cosine", "1")
    assert result.exit_code == 1
    assert "cosine" in result.stderr


def test_inputs_of_a_file(run, model_file, folder: Path):
    np.savez(folder / "x.npz", input=np.ones((2, 3, 9, 9), np.float32))
    document = json.loads(run("verify", model_file, model_file, "--inputs", "x.npz", "--json", "-").stdout)
    assert document["model"]["inputs"] == [{"name": "input", "shape": [2, 3, 9, 9], "dtype": "float32"}]
    assert document["candidate"]["path"] == model_file


def test_two_onnx_files(run, model_file):
    run("export", model_file, *SHAPE, "--no-fold-bn", "-o", "plain.onnx")
    run("export", model_file, *SHAPE)
    result = run("verify", "plain.onnx", "model.onnx")
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.stdout


def test_two_onnx_files_that_differ(run, model_file, wrong_file):
    run("export", model_file, *SHAPE)
    run("export", wrong_file, *SHAPE)
    result = run("verify", "model.onnx", "wrong.onnx")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


def test_onnx_cannot_judge_a_model(run, refuses, model_file):
    run("export", model_file, *SHAPE)
    assert "B must be one too" in refuses("verify", "model.onnx", model_file, code=2)


def test_missing_candidate(refuses, model_file):
    assert "there is no such file" in refuses("verify", model_file, "nothing.onnx", code=2)
