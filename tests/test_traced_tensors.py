"""A tensor of the model that is read twice: both readers see both reads, whoever reads, and however."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse import api
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image

INPUT = image(2, 3, 6, 6)
READERS = pytest.mark.parametrize("inputs", [INPUT, None], ids=["recorded", "traced"])
READS: dict[str, Callable[[Any, Tensor], Any]] = {
    "method": lambda m, x: m.pe.mean((2, 3)),
    "function": lambda m, x: F.relu(m.pe),
    "slice": lambda m, x: m.pe[:, :1],
    "list": lambda m, x: torch.cat([m.pe, m.pe]),
    "data": lambda m, x: m.pe.data.sum(),
    "detach": lambda m, x: x.mean() + m.pe.detach().sum(),
    "transposed": lambda m, x: m.pe.mT.sum((0, 1)),
    "activation": lambda m, x: x[:, :1] * m.pe,
    "number": lambda m, x: x * float(m.pe.sum()),
    "branch": lambda m, x: x if m.pe.sum() > 0 else -x,
    "kept": lambda m, x: m.held[0] + x[:, :1],
}


class AddsTwice(nn.Module):
    """An addend in front of a norm that something else reads as well."""

    pe: Any

    def __init__(self, kind: str, read: Callable[[Any, Tensor], Any] | None) -> None:
        super().__init__()
        self.conv, self.bn, self.read = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), read
        value = torch.randn(1, 4, 6, 6).double()
        if kind == "buffer":
            self.register_buffer("pe", value)
        else:
            self.pe = nn.Parameter(value) if kind == "parameter" else value
        self.held = [self.pe]
        randomize_norms(self.double().eval())

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x) + self.pe)
        return (y, self.read(self, x)) if self.read is not None else y


@READERS
@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
@pytest.mark.parametrize("read", READS)
def test_what_else_reads_an_addend_is_seen(read: str, kind: str, inputs: Tensor | None):
    if kind == "parameter" and inputs is None and read in ("number", "branch"):
        pytest.skip("a parameter is a proxy, which has no value to ask for: the model is traced in parts")
    model = AddsTwice(kind, READS[read])
    result = api.apply(model, api.EXACT_PASSES, example_inputs=inputs)
    (norm,) = result.report.norms
    assert norm.refusal is not None
    assert ("pe is also read by" in norm.refusal.detail) or kind == "attribute"
    assert_parity(model, result.model, INPUT)


@READERS
@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_an_addend_that_only_the_norm_reads_takes_the_map(kind: str, inputs: Tensor | None):
    model = AddsTwice(kind, None)
    model.held.clear()
    result = api.apply(model, api.EXACT_PASSES, example_inputs=inputs)
    assert result.report.applied[0].partners == ("conv", "pe")
    assert_parity(model, result.model, INPUT)


class Counter(nn.Module):
    """A buffer that each call moves on: no constant, though nothing but the model writes to it."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("steps", torch.ones(1, 1, 1, 1))
        randomize_norms(self.double().eval())

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.bn(self.conv(x) * self.steps)


@READERS
def test_a_buffer_that_the_model_writes_to_is_no_constant(inputs: Tensor | None):
    model = Counter()
    folded = api.fold(model, example_inputs=inputs)
    for _ in range(3):
        assert_parity(model, folded, INPUT)
    assert model.steps.item() == folded.steps.item() == 4
