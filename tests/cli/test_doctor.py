from __future__ import annotations

import json
import sys

import torch

import normfuse


def test_versions_and_devices(run):
    document = json.loads(run("doctor", "--json", "-").stdout)
    assert document["version"] == normfuse.__version__
    assert document["environment"]["torch"] == torch.__version__
    assert document["devices"][0] == "cpu"
    assert document["parts"]["onnxruntime"]["works"] is True


def test_every_part_is_a_line(run):
    result = run("doctor")
    assert result.exit_code == 0
    for part in ("torch", "onnx", "onnxruntime", "timm", "engines", "kernels"):
        assert any(line.split()[0] == part for line in result.stdout.splitlines()), part


def test_missing_part_comes_with_its_remedy(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("doctor")
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if line.split()[0] == "onnxruntime")
    assert "missing" in line
    assert "pip install 'normfuse[onnx]'" in line


def test_kernels_that_are_built_are_named(run, monkeypatch):
    assert "normfuse.build_kernels()" in run("doctor").stdout
    monkeypatch.setattr("normfuse.kernels.built_kernels", lambda: ["tune-mode"])
    assert "compiled for this processor: tune-mode" in run("doctor").stdout
    assert json.loads(run("doctor", "--json", "-").stdout)["kernels"] == ["tune-mode"]
