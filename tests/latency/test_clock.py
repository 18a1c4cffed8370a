"""Turns and spreads."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest

from normfuse.latency import clock
from normfuse.latency.clock import Spread, ratios, take_turns


class Ticks:
    """A clock that moves only when told, and notes who moved it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def call(self, name: str, seconds: float) -> Any:
        def run() -> None:
            self.order.append(name)
            self.now += seconds

        return run


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    made = Ticks()
    monkeypatch.setattr(clock, "time", made)
    return made


def test_every_call_takes_a_turn_in_each_round_and_the_order_rotates(ticks: Ticks):
    calls = {name: ticks.call(name, seconds) for name, seconds in (("a", 0.5), ("b", 0.25), ("c", 1.0))}
    times = take_turns(calls, seconds=12.0, warmup=2)
    assert times == {"a": [0.5] * 12, "b": [0.25] * 12, "c": [1.0] * 12}
    rounds = list(itertools.batched(ticks.order, 3)) if hasattr(itertools, "batched") else _threes(ticks.order)
    assert rounds[:2] == [("a", "b", "c")] * 2, "the warm-up"
    assert rounds[2:5] == [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")]


def _threes(names: list[str]) -> list[tuple[str, ...]]:
    return [tuple(names[at : at + 3]) for at in range(0, len(names), 3)]


def test_short_calls_are_repeated_and_rounds_have_a_floor(ticks: Ticks):
    times = take_turns({"short": ticks.call("short", 1e-4), "long": ticks.call("long", 5.0)}, seconds=1.0, warmup=1)
    assert len(times["long"]) == 10
    assert times["short"] == pytest.approx([1e-4] * 10)
    assert ticks.order.count("short") == 1 + 10 * 10


def test_spread():
    values = [float(n) for n in range(101)]
    spread = Spread.of(values)
    found = (spread.median, spread.low, spread.high, spread.p90, spread.p95, spread.p99)
    assert found == pytest.approx((50, 25, 75, 90, 95, 99))
    assert spread.samples == 101


def test_ratios_are_taken_within_a_round():
    assert statistics.median(ratios([2.0, 20.0, 4.0], [1.0, 10.0, 2.0])) == 2.0
