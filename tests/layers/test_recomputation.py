"""Checkpointed norms train like the others, or say that they cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfuse.errors import NormfuseError
from normfuse.layers import PowerNorm, UnifiedNorm, replayed_statistics

REMEDY = "context_fn=normfuse.layers.replayed_statistics"


class Block(nn.Module):
    """Two norms, one of them called twice; checkpointed where asked, one level in another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), UnifiedNorm(3, window=2, warmup_steps=2, scaling_start=3))
        self.power = PowerNorm(3, warmup_steps=2)

    def forward(self, x: Tensor, nested: bool = False) -> Tensor:
        inner: Any = (lambda x: replaying(self.inner, x)) if nested else self.inner
        return self.power(inner(torch.tanh(inner(x))))


def replaying(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, context_fn=replayed_statistics)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("nested", [False, True])
def test_checkpointed_training_is_training(nested: bool) -> None:
    plain = Block().double()
    checked = copy.deepcopy(plain)
    for _ in range(8):
        x = torch.randn(5, 3, dtype=torch.float64)
        plain.zero_grad()
        checked.zero_grad()
        (plain(x) ** 3).sum().backward()
        (replaying(checked, x, nested) ** 3).sum().backward()
        assert_same(plain, checked)
    assert plain.power.step == 8


def test_several_checkpoints_in_flight_and_run_twice() -> None:
    """Two forwards before their backwards, and one backward called twice."""
    plain = Block().double()
    checked = copy.deepcopy(plain)
    xs = torch.randn(2, 5, 3, dtype=torch.float64)
    for model, run in ((plain, plain), (checked, lambda x: replaying(checked, x))):
        losses = [(run(x) ** 3).sum() for x in xs]
        losses[0].backward(retain_graph=True)
        losses[1].backward()
        losses[0].backward()
        assert model.power.step == 2
    assert_same(plain, checked)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [UnifiedNorm, PowerNorm])
def test_recomputation_without_replay_is_refused(make: Any, reentrant: bool) -> None:
    norm = make(3)
    y = checkpoint(norm, torch.randn(5, 3, requires_grad=True), use_reentrant=reentrant)
    with pytest.raises(NormfuseError, match=REMEDY):
        y.sum().backward()
    assert norm.step == 1


def test_recomputation_in_eval_mode_needs_no_replay() -> None:
    norm = UnifiedNorm(3).eval()
    x = torch.randn(5, 3, requires_grad=True)
    checkpoint(norm, x, use_reentrant=False).sum().backward()
    assert x.grad is not None


def test_recomputation_inside_a_compiled_graph_is_refused() -> None:
    """Compiled around the checkpoint, and inside it."""
    norms = UnifiedNorm(3), UnifiedNorm(3)
    x = torch.randn(5, 3, requires_grad=True)
    around = torch.compile(lambda x: checkpoint(norms[0], x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    inside = torch.compile(norms[1], backend="aot_eager", fullgraph=True)
    for y in (around(x), checkpoint(inside, x, use_reentrant=False)):
        with pytest.raises(NormfuseError, match=REMEDY):
            y.sum().backward()


def test_another_order_of_calls_is_refused() -> None:
    norms = nn.ModuleList([UnifiedNorm(3), UnifiedNorm(3)])
    order = [[0, 1], [1, 0]]

    def run(x: Tensor) -> Tensor:
        for index in order.pop(0):
            x = norms[index](x)
        return x

    y = replaying(run, torch.randn(5, 3, requires_grad=True))
    with pytest.raises(NormfuseError, match="in another order"):
        y.sum().backward()
