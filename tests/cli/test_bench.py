from __future__ import annotations

import json
import os
from pathlib import Path

QUICK = ("--input-shape", "1,3,8,8", "--min-time", "0.01", "--warmup", "1")


def test_table_and_json(run, model_file, folder: Path):
    result = run("bench", model_file, *QUICK, "--backend", "eager", "--batch", "1,2", "--json", "bench.json")
    assert result.exit_code == 0, result.output
    assert "baseline" in result.stdout
    document = json.loads(Path("bench.json").read_text())
    rows = document["bench"]
    assert len(rows) == 2 * 3
    assert {"backend", "precision", "batch", "median_ms", "iqr_ms", "p90", "p95", "p99", "throughput"} <= set(rows[0])
    assert {"peak_mem", "samples", "noise", "verdict", "variant", "nodes", "norms"} <= set(rows[0])
    assert document["environment"]["threads"] >= 1
    assert sorted(os.listdir(folder)) == ["bench.json", "model.pt"]


def test_figure_of_two_models(run, model_file, folder: Path):
    result = run("bench", model_file, model_file, *QUICK, "--backend", "eager", "--plot", "bench.png")
    assert result.exit_code == 0, result.output
    assert Path("bench.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input(refuses, run, model_file):
    assert "none of eager" in refuses("bench", model_file, *QUICK, "--backend", "eagre", code=2)
    assert "is not a size" in refuses("bench", model_file, *QUICK, "--batch", "0", code=2)
    assert ".png" in refuses("bench", model_file, *QUICK, "--plot", "x.txt", code=2)
    run("fold", model_file, "--input-shape", "1,3,8,8")
    assert "folded already" in refuses("bench", "model.folded.pt", *QUICK, code=4)


def test_onnx_file(run, refuses, model_file):
    run("export", model_file, "--input-shape", "1,3,8,8")
    result = run("bench", "model.onnx", "--min-time", "0.01", "--warmup", "1", "--json", "-")
    assert [row["variant"] for row in json.loads(result.stdout)["bench"]] == ["unfolded", "folded"]
    assert "runs on onnxruntime" in refuses("bench", "model.onnx", "--backend", "eager", code=2)
