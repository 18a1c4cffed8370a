"""Latency of several variants of one computation, on a machine that does other things too.

The variants take turns, so that whatever else runs slows all of them alike. A ratio is the median over the rounds of
the ratio within a round, which is steadier than the ratio of two medians.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Latency:
    """How long one call takes.

    Attributes:
        median: Seconds.
        low: The first quartile, in seconds.
        high: The third quartile, in seconds.
        ratio: Of the time to that of the baseline; below 1 is faster.
        rounds: How often it was measured.
    """

    median: float
    low: float
    high: float
    ratio: float
    rounds: int

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} ms ({1e3 * self.low:.1f} to {1e3 * self.high:.1f})"


def interleaved(
    calls: Mapping[K, Callable[[], object]], *, baseline: K, rounds: int = 30, warmup: int = 3
) -> dict[K, Latency]:
    """Time each call once per round, in an order that rotates from round to round.

    Args:
        calls: What to time, without arguments; each should take a millisecond or more.
        baseline: The key of the call that the ratios refer to.
        rounds: How many rounds are measured; at least 2.
        warmup: How many rounds come before them.
    """
    measured = turns(calls, rounds=rounds, warmup=warmup)
    return {name: latency(values, measured[baseline]) for name, values in measured.items()}


def turns(
    calls: Mapping[K, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    shuffled: bool = False,
) -> dict[K, list[float]]:
    """Return the times of each call in every round, by a clock of seconds; arguments as for :func:`interleaved`.

    ``shuffled`` draws the order of each round anew: in a rotating order a call is always behind the same other one,
    whose traces in the caches a short call would bear.
    """
    names = list(calls)
    times: dict[K, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        start = number % len(names)
        rotated = names[start:] + names[:start]
        for name in random.Random(number).sample(names, len(names)) if shuffled else rotated:
            begin = clock()
            calls[name]()
            times[name].append(clock() - begin)
    return {name: values[warmup:] for name, values in times.items()}


def latency(values: list[float], base: list[float]) -> Latency:
    """Return what the times of a call come to, beside those of the baseline in the same rounds."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    ratio = statistics.median(value / reference for value, reference in zip(values, base, strict=True))
    return Latency(median, low, high, ratio, len(values))
