"""UnifiedNorm and PowerNorm in compiled and captured graphs: no wait for the device, the same buffers as in eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.layers.running_norms import DOUBLE, Make, assert_same_state, both, step, unified
from tests.parity import EXACT, error


@both
def test_nothing_waits_for_the_device(make: Make) -> None:
    """On the meta device no value can be read, so none is."""
    norm = make(device="meta")
    y, x_grad = step(norm, *torch.empty(2, 2, 5, 3, device="meta"), torch.empty(2, 5, dtype=torch.bool, device="meta"))
    assert y.shape == x_grad.shape == (2, 5, 3)
    assert norm.eval()(torch.empty(5, 3, device="meta")).shape == (5, 3)


@pytest.mark.gpu
@both
def test_cuda_graph(make: Make) -> None:
    """A captured training step, replayed, is the step itself."""
    eager, captured = make(device="cuda"), make(device="cuda")
    x, grad = torch.randn(2, 64, 3, device="cuda")
    x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured(x).backward(grad)
    torch.cuda.current_stream().wait_stream(stream)
    captured.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured(x).backward(grad)
    for _ in range(8):
        graph.replay()
        eager(x.detach().clone().requires_grad_()).backward(grad)
    for name, value in eager.state_dict().items():
        assert error(value, captured.state_dict()[name]) <= 1e-5, name


@both
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_eager_training(make: Make, backend: str) -> None:
    """One graph, no break; the same buffers after every step: the backward sees values from before the update."""
    options = {"outlier_filtration": True} if make is unified else {}
    eager = nn.Sequential(nn.Linear(3, 3), make(**options)).double()
    model = copy.deepcopy(eager)
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    for index in range(10):
        x = torch.randn(6, 3, dtype=torch.float64) * (20 if index == 8 else 1)
        for module in (eager, compiled):
            module.zero_grad()
            (module(x) ** 3).sum().backward()
        assert_same_state(eager, model, EXACT if backend == "inductor" else 0)


@both
def test_compiled_forwards_before_their_backwards(make: Make) -> None:
    """Each backward reads the gradient statistics that the one before it left, not those of its own forward."""
    eager: nn.Module = make(**DOUBLE)
    model = copy.deepcopy(eager)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        xs = torch.randn(2, 5, 3, dtype=torch.float64)
        for module in (eager, compiled):
            for loss in [(module(x) ** 3).sum() for x in xs]:
                loss.backward()
        assert_same_state(eager, model)
