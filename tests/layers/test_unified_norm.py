"""UnifiedNorm is the algorithm of its paper, step by step, as ``literal_unified_norm`` writes it out."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from normfuse.layers import UnifiedNorm
from tests.layers.literal_unified_norm import LiteralUnifiedNorm
from tests.parity import EXACT, error

WARMUP, START = 6, 8


def pair(
    channels: int, *, window: int, filtration: bool, warmup: int = WARMUP, start: int = START, momentum: float = 0.9
) -> tuple[UnifiedNorm, LiteralUnifiedNorm]:
    """Return the layer, with gains of both signs, and its transcription."""
    norm = UnifiedNorm(
        channels,
        window=window,
        warmup_steps=warmup,
        scaling_start=start,
        outlier_filtration=filtration,
        momentum=momentum,
        dtype=torch.float64,
    )
    torch.nn.init.uniform_(norm.weight, -2, 2)
    torch.nn.init.uniform_(norm.bias, -1, 1)
    literal = LiteralUnifiedNorm(
        channels, window=window, warmup=warmup, start=start, filtration=filtration, momentum=momentum
    )
    return norm, literal


def step(norm: UnifiedNorm, literal: LiteralUnifiedNorm, x: Tensor, grad: Tensor) -> None:
    """Run one step of both and assert that outputs, gradients and state agree."""
    norm.zero_grad()
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(grad)
    rows = (x.detach().reshape(-1, norm.num_features).tolist(), grad.reshape(-1, norm.num_features).tolist())
    y_rows = literal.forward(rows[0], norm.weight.tolist(), norm.bias.tolist())
    x_grad, weight_grad, bias_grad = literal.backward(rows[1])
    for name, found, expected in (
        ("y", y, y_rows),
        ("x.grad", x.grad, x_grad),
        ("weight.grad", norm.weight.grad, weight_grad),
        ("bias.grad", norm.bias.grad, bias_grad),
        ("running_second_moment", norm.running_second_moment, literal.nu_hat),
        ("running_gradient_statistic", norm.running_gradient_statistic, literal.psi),
        ("second_moment_window", norm.second_moment_window, literal.F),
        ("gradient_statistic_window", norm.gradient_statistic_window, literal.Q),
    ):
        wanted = torch.tensor(expected, dtype=torch.float64).reshape(found.shape)
        assert error(wanted, found.detach()) <= EXACT, f"{name} at step {literal.t}"
    assert (int(norm.step), int(norm.skipped_steps)) == (literal.t, literal.skipped)


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 4), (2, 2, 3, 2), (9, 1)])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("filtration", [False, True])
def test_training_is_the_literal_algorithm(shape: tuple[int, ...], window: int, filtration: bool) -> None:
    """Past the warm-up and several windows, with outliers before and after it."""
    norm, literal = pair(shape[-1], window=window, filtration=filtration)
    for index in range(1, max(WARMUP, START) + 4 * window + 12):
        noise, grad = torch.randn(2, *shape, dtype=torch.float64)
        x = noise.sign() * (1 + noise / 10) * torch.linspace(1, 3, shape[-1])  # second moments that vary little
        step(norm, literal, 10 * x if index in (3, 13, 14, 21) else x, grad)
    if filtration and window > 1:
        assert 0 < literal.skipped < literal.t - WARMUP
    else:
        assert literal.skipped == 0


def test_the_ratio_is_bounded_both_ways() -> None:
    """Second moments that jump far up and far down: r is 5, then 1/5, and the backward pass shows it."""
    norm, literal = pair(2, window=2, filtration=False)
    ratios = []
    for scale in [1.0] * 10 + [1e3] * 3 + [1e-4] * 8:
        x, grad = torch.randn(2, 6, 2, dtype=torch.float64)
        step(norm, literal, scale * x, grad)
        ratios += literal.saved[2]
    assert {1.0, 5.0, 0.2} <= set(ratios)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    window=st.integers(1, 5),
    warmup=st.integers(0, 8),
    start=st.integers(0, 8),
    filtration=st.booleans(),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    scales=st.lists(st.sampled_from([0.01, 0.5, 1.0, 2.0, 50.0]), min_size=12, max_size=20),
    seed=st.integers(0, 2**16),
)
def test_any_schedule_is_the_literal_algorithm(
    window: int, warmup: int, start: int, filtration: bool, momentum: float, scales: list[float], seed: int
) -> None:
    torch.manual_seed(seed)
    norm, literal = pair(3, window=window, filtration=filtration, warmup=warmup, start=start, momentum=momentum)
    for scale in scales:
        x, grad = torch.randn(2, 4, 3, dtype=torch.float64)
        step(norm, literal, scale * x, grad)


def test_default_schedule() -> None:
    """The published defaults; r stays 1 for 1000 steps where the warm-up is shorter."""
    norm = UnifiedNorm(2)
    found = (norm.eps, norm.momentum, norm.window, norm.warmup_steps, norm.outlier_filtration, norm.scaling_start)
    assert found == (1e-5, 0.9, 4, 4000, False, 1000)
    norm, literal = pair(2, window=2, filtration=False, warmup=3, start=1000)
    norm.step.fill_(990)
    literal.t = 990
    for index in range(20):
        x, grad = torch.randn(2, 6, 2, dtype=torch.float64)
        step(norm, literal, (1 + index % 3) * x, grad)
        assert (literal.saved[2] == [1.0, 1.0]) == (literal.t <= 1000)


def test_warm_up_gradient_is_that_of_the_normalization() -> None:
    """With momentum 0 and within the warm-up, psi is q, and the backward pass is the true derivative."""
    norm = UnifiedNorm(3, momentum=0.0, dtype=torch.float64)
    torch.nn.init.uniform_(norm.weight, -2, 2)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return weight * x / (x.square().mean(0) + norm.eps).sqrt() + bias

    x, grad = torch.randn(2, 6, 3, dtype=torch.float64)
    given: list[Any] = [x.requires_grad_(), norm.weight, norm.bias]
    expected = torch.autograd.grad(function(*given), given, grad)
    found = torch.autograd.grad(norm(x), given, grad)
    assert all(error(a, b) <= EXACT for a, b in zip(expected, found, strict=True))


def test_reset_step_starts_the_warm_up_again() -> None:
    """After the reset the first batches are normalised by their own second moment, not by a window of old ones."""
    norm, _ = pair(2, window=2, filtration=False)
    for _ in range(12):
        norm(torch.randn(5, 2, dtype=torch.float64))
    x = 10 * torch.randn(5, 2, dtype=torch.float64)
    own = (norm.weight * x / (x.square().mean(0) + norm.eps).sqrt() + norm.bias).detach()
    kept = norm.running_second_moment.clone()
    norm.reset_step()
    assert torch.equal(norm.running_second_moment, kept)
    assert error(own, norm(x).detach()) <= EXACT
    for _ in range(12):
        norm(torch.randn(5, 2, dtype=torch.float64))
    assert error(own, norm(x).detach()) > 0.1


def test_a_window_of_one_filters_nothing() -> None:
    norm, _ = pair(2, window=1, filtration=True, warmup=0)
    for index in range(10):
        norm(torch.full((3, 2), math.pi * 10.0**index, dtype=torch.float64))
    assert norm.skipped_steps == 0


def test_every_state_is_a_buffer() -> None:
    names = ["running_second_moment", "running_gradient_statistic", "second_moment_window", "gradient_statistic_window"]
    assert set(UnifiedNorm(2).state_dict()) == {"weight", "bias", *names, "step", "skipped_steps"}


def test_arguments() -> None:
    assert "window=2, outlier_filtration=True" in repr(UnifiedNorm(2, window=2, outlier_filtration=True))
    for options in ({"window": 0}, {"scaling_start": -1}):
        with pytest.raises(ValueError, match="give window"):
            UnifiedNorm(2, **options)
