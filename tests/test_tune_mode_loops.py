"""Random training loops: whatever is done between steps, Tune mode trains what eval mode's norms train."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import normfuse
from normfuse.layers.kept import Look
from tests.loops import losses, operations
from tests.loops.running import _compare, _Differs, run_loop
from tests.loops.sides import Side

pytestmark = pytest.mark.filterwarnings("ignore")  # of operations, such as anomaly detection


@pytest.mark.parametrize("first", range(10_000, 10_060, 20))
def test_loops(first: int, form: str):
    """After every step parameters, buffers, gradients, outputs and what hooks have seen are within 1e-9."""
    for seed in range(first, first + 20):
        verdict = run_loop(seed)
        assert verdict.kind == "right", verdict
    assert run_loop(first).steps == run_loop(first).steps, "a seed makes one loop"


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_kind_of_step_trains(name: str):
    """None of them is an idle one that all models pass."""
    side = Side(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double(), inputs, "SGD", tuned=False)
    before = [p.detach().clone() for p in side.model.parameters()]
    side.step(inputs(0), 0, losses.LOSSES[name], None)
    assert all(not torch.equal(b, p) for b, p in zip(before, side.model.parameters(), strict=True))


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_stale_value_is_found():
    """The comparison tells two models apart of which one has missed a write."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    tune = Side(normfuse.tune_mode(copy.deepcopy(model)), inputs, "SGD", tuned=True)
    plain = Side(model, inputs, "SGD", tuned=False)
    _compare(plain.state(), tune.state())
    operations.write_data(plain, random.Random(0))
    with pytest.raises(_Differs):
        _compare(plain.state(), tune.state())


def test_a_fault_that_is_put_in_is_found(monkeypatch: pytest.MonkeyPatch):
    """Vectors that are kept without a look at what they were made from."""
    monkeypatch.setattr(Look, "is_that_of", lambda look, tensor: True)
    assert "wrong" in {run_loop(seed).kind for seed in range(10_000, 10_040)}
