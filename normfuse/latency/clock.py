"""Time calls by turns, on a machine that does other things too.

All calls take one turn per round, in an order that rotates, so that whatever else runs slows all of them alike. A ratio
is taken within a round, and its median over the rounds is steadier than the ratio of two medians. A turn repeats a call
that is too short for the clock; its time is that of one call. On a GPU the time is that between two events.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
_TURN = 1e-3  # seconds; the clock and the loop around a call are then below a thousandth
_LEAST, _MOST = 10, 2000  # rounds


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of one call, or a ratio, over the rounds.

    Attributes:
        median: The median.
        low: The first quartile.
        high: The third quartile.
        p90: The 90th percentile.
        p95: The 95th percentile.
        p99: The 99th percentile.
        samples: How many rounds.
    """

    median: float
    low: float
    high: float
    p90: float
    p95: float
    p99: float
    samples: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return the spread of at least two values."""
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        return Spread(statistics.median(values), cuts[24], cuts[74], cuts[89], cuts[94], cuts[98], len(values))


def take_turns(
    calls: Mapping[str, Call], *, seconds: float, warmup: int, on_gpu: bool = False
) -> dict[str, list[float]]:
    """Return the time of one call, in seconds, for each call and round.

    Args:
        calls: What to time, by name.
        seconds: How long to measure, for each of them; at least ten rounds.
        warmup: How many rounds come before.
        on_gpu: Whether the work is that of a GPU, which is timed by events.
    """
    names, turn = list(calls), _gpu_turn if on_gpu else _cpu_turn
    first = {name: turn(calls[name], 1) for name in names}
    for _ in range(warmup - 1):
        first = {name: turn(calls[name], 1) for name in names}
    repeats = {name: max(1, math.ceil(_TURN / max(first[name], 1e-9))) for name in names}
    slowest = max(first[name] * repeats[name] for name in names)
    rounds = min(max(_LEAST, math.ceil(seconds / slowest)), _MOST)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(turn(calls[name], repeats[name]))
    return times


def ratios(times: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [one / other for one, other in zip(times, baseline, strict=True)]


def _cpu_turn(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _gpu_turn(call: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / repeats
