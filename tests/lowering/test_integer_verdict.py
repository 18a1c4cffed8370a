"""Files of integers are held to their direction and to their largest entries, but for what one step explains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import VerificationError
from normfuse.comparison import ANYTHING, Comparison
from normfuse.lowering import Numbers, export, integer_verdict, onnx_qdq, onnx_quantize
from normfuse.lowering.fidelity import judge_quantized
from normfuse.rerun import Samples
from normfuse.verify import verify

ROWS = torch.eye(10) * 5 + torch.rand(10, 10, generator=torch.Generator().manual_seed(0))  # all ten classes


class Scores(nn.Module):
    """Its input, with the largest two of some rows exchanged; they are ``lead`` apart, of a largest element of 6."""

    def __init__(self, wrong: int, lead: float = 0.5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.wrong, self.lead = wrong, lead

    def forward(self, x: Tensor) -> Tensor:
        two = x.topk(2).indices
        x = x.scatter(1, two[:, :1], 6.0).scatter(1, two[:, 1:], 6.0 - self.lead)
        first, second = x[: self.wrong].gather(1, two[: self.wrong]).unbind(1)
        exchanged = x[: self.wrong].scatter(1, two[: self.wrong], torch.stack([second, first], 1))
        return self.scale * torch.cat([exchanged, x[self.wrong :]])


def compared(wrong: int, lead: float) -> Comparison:
    return verify(Scores(0, lead), Scores(wrong, lead), ROWS, tolerance=ANYTHING)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_other_classes_in_a_fifth_of_the_rows_do_not_pass(precision: Any):
    numbers = Numbers(precision, calibration=[ROWS], qdq="tensorrt")
    found = judge_quantized(compared(2, 0.5), numbers)
    assert found.cosine > 0.99
    assert found.top1 == (8, 10)
    assert not found
    assert "top-1 8/10" in found.failure
    assert "at least 90% are asked for" in found.failure
    assert judge_quantized(compared(1, 0.5), numbers)
    looser = Numbers(precision, calibration=[ROWS], qdq="tensorrt", min_top1=0.8)
    assert judge_quantized(compared(2, 0.5), looser)
    assert "same top-1 in 80% of the rows" in judge_quantized(compared(2, 0.5), looser).notes[-1]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_entries_within_one_step_count_as_the_same(precision: Any):
    step = 6.0 * integer_verdict.STEPS[precision]
    numbers = Numbers(precision, calibration=[ROWS], qdq="tensorrt")
    assert judge_quantized(compared(10, 0.99 * step), numbers)
    assert not judge_quantized(compared(10, 1.01 * step), numbers)
    assert compared(10, 0.99 * step).top1 == (0, 10)  # the figure itself hides nothing


def test_an_int8_file_with_exchanged_classes_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nearly parallel outputs, whose direction says nothing of their classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(10))
        model[0].bias.fill_(10.0)
    data = [ROWS.roll(shift, 0) for shift in range(3)]
    numbers = Numbers("int8", calibration=data)
    assert export(model, tmp_path / "right.onnx", example_inputs=ROWS, precision=numbers).comparison

    quantize_file = onnx_quantize.quantize_file

    def exchanging(path: Path, *rest: Any) -> None:
        quantize_file(path, *rest)
        proto = onnx.load(path)
        for tensor in proto.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            if sorted(values.shape) == [10, 10]:
                tensor.CopyFrom(onnx.numpy_helper.from_array(values[:, [1, 0, *range(2, 10)]].copy(), tensor.name))
        onnx.save(proto, path)

    monkeypatch.setattr(onnx_quantize, "quantize_file", exchanging)
    with pytest.raises(VerificationError, match="top-1 24/30"):
        export(model, tmp_path / "wrong.onnx", example_inputs=ROWS, precision=numbers)
    assert [path.name for path in tmp_path.iterdir()] == ["right.onnx"]


def test_a_calibrated_model_is_held_to_its_classes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(10))
        model[0].bias.fill_(10.0)
    quantized = normfuse.quantize(model, calibration=[ROWS])
    normfuse.export(quantized, tmp_path / "m.onnx", example_inputs=ROWS)
    assert onnx_qdq.compare(quantized, tmp_path / "m.onnx", Samples((ROWS,)))
    monkeypatch.setattr(onnx_qdq, "layer_steps", lambda *_: {})
    quantized[0].integers.data = quantized[0].integers[[1, 0, *range(2, 10)]]
    assert "top-1 8/10" in onnx_qdq.compare(quantized, tmp_path / "m.onnx", Samples((ROWS,))).failure
