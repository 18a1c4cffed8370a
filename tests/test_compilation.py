"""``normfuse.compile``: the same values, in the same structure, on the backend that was asked for or is fastest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import compilation
from normfuse.errors import LoweringError, MissingDependencyError, VerificationError
from normfuse.latency import backends
from tests.parity import randomize_norms


class TwoHeads(nn.Module):
    """Takes two inputs and returns a mapping with a tuple inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Any]:
        features = self.norm(self.conv(image)).relu()
        return {"logits": self.head(features.mean((2, 3))) * scale, "maps": (features, features * 2)}


X = {"image": torch.randn(2, 3, 8, 8), "scale": torch.tensor([2.0])}
Y = {"image": torch.randn(2, 3, 8, 8), "scale": torch.tensor([-1.0])}


@pytest.fixture
def model() -> nn.Module:
    return randomize_norms(TwoHeads().eval())


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_values_and_structure(model: nn.Module, backend: str):
    made = normfuse.compile(model, X, backend=backend)
    assert made.backend == backend
    assert made.comparison is not None
    assert made.comparison.passed
    assert [o.subject for o in made.report.applied] == ["norm"]
    expected = model(**Y)
    for found in (made(**Y), made(*Y.values())):
        assert list(found) == ["logits", "maps"]
        assert isinstance(found["maps"], tuple)
        torch.testing.assert_close(found["logits"], expected["logits"].detach())
        torch.testing.assert_close(found["maps"][1], expected["maps"][1].detach())


@pytest.mark.slow
def test_torch_compile(model: nn.Module):
    made = normfuse.compile(model, X, backend="compile")
    torch.testing.assert_close(made(**Y)["logits"], model(**Y)["logits"].detach())


def test_the_fastest_is_taken(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "present", lambda _: ["eager", "onnxruntime", "compile"])

    def failing(*_: Any, **__: Any) -> Any:
        raise LoweringError("no compiler")

    monkeypatch.setitem(backends.BACKENDS, "compile", failing)
    monkeypatch.setattr(compilation, "_seconds", lambda made, _: {n: 1.0 - (n == "onnxruntime") / 2 for n in made})
    made = normfuse.compile(model, X)
    assert made.backend == "onnxruntime"
    assert made.seconds == {"eager": 1.0, "onnxruntime": 0.5}
    assert made.notes == ("compile: no compiler",)


def test_measured_times(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "present", lambda _: ["eager", "onnxruntime"])
    monkeypatch.setattr(compilation, "_TRIAL", 0.001)
    made = normfuse.compile(model, X)
    assert made.backend == min(made.seconds, key=lambda name: made.seconds[name])


def test_a_folded_model_is_taken_as_it_is(model: nn.Module):
    made = normfuse.compile(normfuse.fold(model), X, backend="eager")
    torch.testing.assert_close(made(**Y)["logits"], model(**Y)["logits"].detach())
    assert not made.report.outcomes


def test_what_it_refuses(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="is none of eager"):
        normfuse.compile(model, X, backend="cudagraph")
    if not torch.cuda.is_available():
        with pytest.raises(MissingDependencyError):
            normfuse.compile(model, X, backend="tensorrt")

    def wrong(source: nn.Module, inputs: Any, verify: bool) -> Any:
        folded = normfuse.fold(source)
        with torch.no_grad():
            folded.head.bias.add_(1)
        return folded, normfuse.Report(())

    monkeypatch.setattr(compilation, "_folded", wrong)
    with pytest.raises(VerificationError, match="eager does not reproduce the model"):
        normfuse.compile(model, X, backend="eager")
    assert normfuse.compile(model, X, backend="eager", verify=False).comparison is None


def test_other_shapes_than_the_file_takes(model: nn.Module):
    made = normfuse.compile(model, X, backend="onnxruntime")
    with pytest.raises(LoweringError, match="ONNX Runtime failed"):
        made(image=torch.randn(1, 3, 8, 8), scale=torch.tensor([1.0]))
