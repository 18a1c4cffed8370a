"""What a benchmark measures, what it refuses, and what it concludes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import latency
from normfuse.errors import MissingDependencyError, VerificationError
from normfuse.latency import Row, Spread, backends, measuring
from normfuse.latency.memory import peak_bytes
from normfuse.latency.plot import plot
from normfuse.outputs import resized
from tests.parity import randomize_norms

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
QUICK = {"seconds": 0.01, "warmup": 1}


@pytest.fixture
def model() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return randomize_norms(nn.Sequential(*layers).eval())


def test_every_form_on_every_backend(model: nn.Module):
    found = latency.measure(model, X, on=["eager", "onnxruntime"], batches=[1, 3], **QUICK)
    assert [(r.backend, r.batch, r.variant) for r in found.rows] == [
        (backend, batch, variant)
        for backend in ("eager", "onnxruntime")
        for batch in (1, 3)
        for variant in ("unfolded", "folded", "exact")
    ]
    for row in found.rows:
        assert row.seconds.median > 0
        assert row.seconds.samples >= 10
        assert row.max_rel < 1e-5
        assert (row.peak_bytes is None) == (row.backend == "onnxruntime")
    norms = {row.variant: row.norms for row in found.rows if row.backend == "eager"}
    assert norms == {"unfolded": 1, "folded": 0, "exact": 0}
    assert all(row.norms == 0 for row in found.rows if row.backend == "onnxruntime"), "the runtime folds by itself"
    assert not found.notes
    assert len(found.table()) == 1 + len(found.rows)


def test_the_model_is_not_changed(model: nn.Module):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    latency.measure(model, X, on=["eager"], **QUICK)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_a_form_that_computes_something_else_is_not_timed(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    def wrong(source: nn.Module, passes: Any, inputs: Any) -> nn.Module:
        made = normfuse.fold(source)
        with torch.no_grad():
            made[0].weight.mul_(1 + 1e-3)  # type: ignore[index, union-attr]
        return made

    monkeypatch.setattr(measuring, "_form", wrong)
    with pytest.raises(VerificationError, match="unfolded on eager"):
        latency.measure(model, X, on=["eager"], **QUICK)


def test_a_backend_that_fails_is_noted_unless_it_was_named(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    def missing(*_: Any, **__: Any) -> Any:
        raise MissingDependencyError("no such runtime here")

    monkeypatch.setitem(backends.BACKENDS, "onnxruntime", missing)
    monkeypatch.setattr(backends, "present", lambda _: ["eager", "onnxruntime"])
    found = latency.measure(model, X, name="net", **QUICK)
    assert {row.backend for row in found.rows} == {"eager"}
    assert found.notes == ("net, onnxruntime, batch 2: no such runtime here",)
    with pytest.raises(MissingDependencyError):
        latency.measure(model, X, on=["onnxruntime"], **QUICK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["cudagraph", "tensorrt"])
def test_backends_that_need_a_gpu(model: nn.Module, backend: str):
    with pytest.raises(MissingDependencyError):
        latency.measure(model, X, on=[backend], **QUICK)


@pytest.mark.parametrize("wrong", [{"on": ["onnx"]}, {"variants": ["fused"]}])
def test_words_that_are_not_known(model: nn.Module, wrong: dict[str, Any]):
    with pytest.raises(ValueError, match="is none of"):
        latency.measure(model, X, **wrong)


def test_a_folded_model_has_nothing_to_compare_with(model: nn.Module):
    with pytest.raises(ValueError, match="folded already"):
        latency.measure(normfuse.fold(model), X)


def test_resized_repeats_rows_of_what_has_the_batch():
    inputs = {"x": torch.arange(6).view(2, 3), "table": torch.ones(5, 3), "number": torch.tensor(1)}
    found = resized(inputs, 3)
    assert found["x"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert found["table"].shape == (5, 3)
    assert found["number"].dim() == 0


def row(low: float, median: float, high: float, noise: float) -> Row:
    spread = Spread(median, low, high, high, high, high, 10)
    return Row("net", "folded", "eager", "float32", 1, spread, spread, noise, 0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (row(0.90, 0.92, 0.94, 0.05), "8.0 % faster"),
        (row(1.06, 1.10, 1.20, 0.05), "10.0 % slower"),
        (row(0.90, 0.94, 0.96, 0.05), "within the noise"),
        (row(0.90, 1.00, 1.10, 0.00), "within the noise"),
    ],
)
def test_a_difference_counts_where_it_leaves_what_the_control_shows(found: Row, verdict: str):
    assert found.verdict == verdict
    assert dataclasses.replace(found, variant="unfolded").verdict == "baseline"


def test_peak_memory_of_a_call():
    def call() -> Tensor:
        first = torch.empty(1 << 20)
        second = torch.empty(1 << 20)
        del first
        return second

    assert 8 << 20 <= peak_bytes(call) < 9 << 20


def test_onnx_file(model: nn.Module, tmp_path: Path):
    path = tmp_path / "net.onnx"
    normfuse.export(model, path, example_inputs=X, fold_bn=False, dynamic_axes=["input:0"])
    found = latency.measure_file(path, {"input": X}, batches=[1, 4], **QUICK)
    assert [(r.model, r.batch, r.variant) for r in found.rows] == [
        ("net", batch, variant) for batch in (1, 4) for variant in ("unfolded", "folded")
    ]
    assert all(row.norms == 0 and row.max_rel < 1e-5 for row in found.rows), "the runtime folds by itself"
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_figure(tmp_path: Path):
    pytest.importorskip("matplotlib")
    rows = tuple(dataclasses.replace(row(0.9, 0.95, 1.0, 0.1), variant=v) for v in ("unfolded", "folded"))
    path = plot(latency.Benchmark(rows, ()), tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
