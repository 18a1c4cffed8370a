"""The error bounds hold, and errors fall as groups are added."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfuse.quantization import ShiftQuant, bounds
from normfuse.quantization.shiftquant import channel_ranges
from tests.quantization.operands import RANGES, spread

ROUNDING = 1 + 1e-9


def brute_force(ranges: torch.Tensor, groups: int) -> float:
    """Try every assignment of channels to groups."""
    squares = ranges.square().tolist()
    best = float("inf")
    for of in itertools.product(range(groups), repeat=len(squares)):
        members = [[s for s, g in zip(squares, of, strict=True) if g == group] for group in range(groups)]
        best = min(best, sum(len(m) * max(m) for m in members if m))
    return best


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_optimum_is_that_of_all_partitions(groups: int, seed: int):
    ranges = spread(1, 7, seed)[0].abs()
    assert bounds.optimal_variance(ranges, groups) == pytest.approx(brute_force(ranges, groups), rel=1e-12)


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, 40), groups=st.integers(1, 9), octaves=st.floats(0, 12), seed=st.integers(0, 999))
def test_order_of_bounds(count: int, groups: int, octaves: float, seed: int):
    ranges = channel_ranges(spread(3, count, seed, octaves=octaves), 1)
    largest = float(ranges.max()) ** 2
    v, optimum = bounds.variance_proxy(ranges, groups), bounds.optimal_variance(ranges, groups)
    bound = bounds.variance_bound(ranges, groups)
    assert float(ranges.square().sum()) <= optimum * ROUNDING
    assert optimum <= v * ROUNDING
    assert v <= min(bound, count * largest) * ROUNDING
    assert bound <= (4 * optimum + count * largest * 4.0 ** (1 - groups)) * ROUNDING


def test_log_uniform_ranges_come_close_to_the_optimum():
    """Ranges log-uniform over 6 nats: the loss to the best partition is below 1.4 from three groups on."""
    ranges = torch.exp(-6 * torch.rand(96, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for groups in (3, 4, 5):
        assert 1 < bounds.variance_proxy(ranges, groups) / bounds.optimal_variance(ranges, groups) < 1.4
    per_tensor = bounds.variance_proxy(ranges, 1)
    assert per_tensor == pytest.approx(96 * float(ranges.max()) ** 2)
    assert bounds.variance_proxy(ranges, 3) < 0.2 * per_tensor


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_squared_error_is_within_its_bound(ranges: str, rounding: str):
    """For nearest always; for stochastic in expectation, so up to a tenth here, where errors are many."""
    x = RANGES[ranges](200, 30)
    generator = torch.Generator().manual_seed(0) if rounding == "stochastic" else None
    q = ShiftQuant(5, 4, rounding)(x, generator=generator)
    error = float((q.dequantize() - x).square().sum())
    assert error <= bounds.squared_error_bound(q) * (ROUNDING if rounding == "nearest" else 1.1)
    v = bounds.variance_proxy(channel_ranges(x, 1), 4)
    assert bounds.squared_error_bound(q) == pytest.approx(200 * v / (4 * 15**2), rel=1e-12, abs=1e-280)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_error_falls_with_groups(bits: int):
    x = spread(300, 64, octaves=8)
    errors = [float((ShiftQuant(bits, groups)(x).dequantize() - x).square().sum()) for groups in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0]


@pytest.mark.parametrize("bits", [3, 8])
def test_one_group_is_quantization_per_tensor(bits: int):
    x, limit = spread(20, 30), 2 ** (bits - 1) - 1
    scale = x.abs().max() / limit
    q = ShiftQuant(bits, 1)(x)
    assert torch.equal(q.values.double(), (x / scale).round())
    assert torch.equal(q.dequantize(), (x / scale).round() * scale)
    assert bool((q.shift == 0).all())


def test_nothing_to_bound():
    for function in (bounds.variance_proxy, bounds.variance_bound, bounds.optimal_variance):
        assert function(torch.zeros(0), 3) == 0


@pytest.mark.parametrize("ranges", [torch.tensor([-1.0]), torch.ones(2, 2)])
def test_not_ranges(ranges: torch.Tensor):
    with pytest.raises(ValueError, match="vector"):
        bounds.optimal_variance(ranges, 2)
