from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import normfuse
from normfuse.statistics import reestimate
from tests.statistics.networks import norms_of


@pytest.fixture
def data() -> torch.Tensor:
    x = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 1
    np.save("calib.npy", x.numpy())
    return x


def test_writes_a_file_that_folds(run, model, model_file, data, folder: Path):
    result = run("recalibrate", model_file, "--calib", "calib.npy", "--batch-size", 6)
    assert result.exit_code == 0, result.output
    assert "2 of 2 norms" in result.stdout
    assert "normfuse fold model.recalibrated.pt" in result.stdout
    loaded = normfuse.load("model.recalibrated.pt")
    expected = reestimate(model, [data])
    for one, other in zip(norms_of(expected), norms_of(loaded), strict=True):
        torch.testing.assert_close(one.running_var, other.running_var)
    folded = run("fold", "model.recalibrated.pt", "--require-fold")
    assert folded.exit_code == 0, folded.output
    assert "PASSED" in folded.stdout


def test_a_folded_file_is_refused_with_what_to_do(run, refuses, model_file, data):
    assert run("fold", model_file, "--input-shape", "1,3,8,8").exit_code == 0
    error = refuses("recalibrate", "model.folded.pt", "--calib", "calib.npy", code=4)
    assert "recalibrate before you fold" in error


def test_json_of_each_method(run, model_file, data):
    moved, cosines = [], []
    for method in ("pooled", "alpha", "adabn"):
        result = run("recalibrate", model_file, "--calib", "calib.npy", "--method", method, "--json", "-", "--force")
        document = json.loads(result.stdout)
        assert [pair["action"] for pair in document["pairs"]] == ["applied", "applied"]
        moved.append([pair["moved"] for pair in document["pairs"]])
        cosines.append(document["verify"]["cosine"])
        assert document["outputs"][0]["format"] == "recalibrated"
    assert moved[0] == moved[1]
    assert moved[0][0] == moved[2][0] != moved[2][1]
    assert cosines[1] > cosines[0]


def test_tolerance_and_selection(run, refuses, model_file, data, folder: Path):
    assert run("recalibrate", model_file, "--calib", "calib.npy", "--atol", "1e-9").exit_code == 1
    assert run("recalibrate", model_file, "--calib", "calib.npy", "--exclude", "*").exit_code == 3
    assert not (folder / "model.recalibrated.pt").exists()
    assert run("recalibrate", model_file, "--calib", "calib.npy", "--atol", "100").exit_code == 0


def test_usage(refuses, model_file, data):
    assert "--calib" in refuses("recalibrate", model_file, code=2)
    assert "'sar'" in refuses("recalibrate", model_file, "--calib", "calib.npy", "--method", "sar", code=2)
    np.save("wide.npy", np.zeros((2, 5, 8, 8), dtype=np.float32))
    assert "does not run on" in refuses("recalibrate", model_file, "--calib", "wide.npy", code=4)
