from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

SHAPE = ("--input-shape", "1,3,8,8")


def test_lists_every_norm_and_writes_nothing(run, model_file, folder: Path):
    before = (folder / model_file).read_bytes()
    result = run("inspect", model_file, *SHAPE)
    assert result.exit_code == 0, result.output
    assert "0 <- 1 (BatchNorm2d)" in result.stdout
    assert "3 <- 4 (BatchNorm2d)" in result.stdout
    assert "2 of 2" in result.stdout
    assert "normfuse fold model.pt" in result.stdout
    assert os.listdir(folder) == [model_file]
    assert (folder / model_file).read_bytes() == before


def test_json_is_all_that_is_on_standard_output(run, model_file):
    result = run("inspect", model_file, *SHAPE, "--json", "-")
    document = json.loads(result.stdout)
    assert (document["schema_version"], document["tool"], document["command"]) == (1, "normfuse", "inspect")
    assert document["environment"]["torch"] == torch.__version__
    assert document["model"]["format"] == "pickled module"
    assert document["model"]["inputs"] == [{"name": "input", "shape": [1, 3, 8, 8], "dtype": "float32"}]
    assert len(document["model"]["sha256"]) == 64
    assert [(pair["norm"], pair["producer"], pair["action"]) for pair in document["pairs"]] == [
        ("1", ["0"], "applied"),
        ("4", ["3"], "applied"),
    ]


def test_json_to_a_file_beside_the_text(run, model_file, folder: Path):
    result = run("inspect", model_file, *SHAPE, "--json", "report.json")
    assert "2 of 2" in result.stdout
    assert json.loads((folder / "report.json").read_text())["command"] == "inspect"


def test_quiet_prints_nothing(run, model_file):
    assert run("inspect", model_file, *SHAPE, "-q").output == ""


def test_the_guess_of_the_input_is_printed_as_an_assumption(run, model_file):
    result = run("inspect", model_file, "--json", "-")
    document = json.loads(result.stdout)
    assert document["model"]["inputs_assumed"] is True
    assert any("assumption (guessed from 0 (Conv2d))" in note for note in document["notes"])
    assert "assumption" in run("inspect", model_file).stdout


def test_reason_of_what_is_left(run, folder: Path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).eval()
    torch.save(model, folder / "model.pt")
    document = json.loads(run("inspect", "model.pt", *SHAPE, "--json", "-").stdout)
    assert [(pair["action"], pair["reason"]) for pair in document["pairs"]] == [("refused", "BATCH_STATISTICS")]


def test_require_fold(run, refuses, model_file, folder: Path):
    assert run("inspect", model_file, *SHAPE, "--require-fold").exit_code == 0
    left = run("inspect", model_file, *SHAPE, "--require-fold", "--exclude", "4")
    assert left.exit_code == 3
    assert "1 of 2 norms are left (4)" in left.stderr


def test_architecture_of_the_current_folder(run, folder: Path):
    (folder / "my_network.py").write_text(
        "from torch import nn\ndef make(width):\n    return nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4))\n"
    )
    result = run("inspect", "my_network:make", "--arch-kwargs", "width=6")
    assert result.exit_code == 0, result.output
    assert "1x6" in result.stdout
    assert "weights are random" in result.stdout
    assert "1 of 1" in result.stdout
