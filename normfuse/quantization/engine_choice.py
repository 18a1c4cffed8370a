"""Which engine multiplies integers: the fastest of those that prove exact on this machine.

Both are found out by trying, once per process for each kind of problem: device, number of threads, limits ``qa`` and
``qb`` of the operands, and size up to a power of four. An engine is exact if it equals the int64 definition, at its
full depth and at small ones, on operands that hold every combination of the extremes: all largest, all smallest,
alternating, and random. That is where saturation shows. Rounding shows in sums that are odd, as large as they can be.
An engine that takes long over a tiny product is not tried on a larger one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from normfuse.quantization.integer_engines import ENGINES, INT64, Engine, reference

TINY_SECONDS = 0.02
"""What a product of a few thousand multiplications may take, in the best of three runs: the machine may be busy."""
GIVEN_UP_SECONDS = 0.5
"""What one of them may take before no other is tried."""
PROBES = ((5, 1, 3), (1, 2, 1), (1, 8, 3), (6, 64, 9), (70, 256, 33))
"""Shapes ``(M, K, N)`` of the trial products, besides those of full depth."""
LARGEST = (256, 1024, 256)
"""Bounds of the product that is timed."""


LIMITS = (3, 7, 15, 31, 64, 127)
"""The limits that are tried out; 64 is that of a digit."""


def limit_class(limit: int) -> int:
    """Return the least of the limits tried out that covers ``limit``, at most 127."""
    return next(most for most in LIMITS if limit <= most)


def choose(device: torch.device, qa: int, qb: int, shape: tuple[int, int, int], *, packed: bool) -> Engine:
    """Return the engine for a product of shape ``(M, K, N)`` of integers up to ``qa`` and ``qb``.

    Args:
        device: Where the operands are.
        qa: Largest magnitude in the left operand.
        qb: Largest magnitude in the right operand.
        shape: ``(M, K, N)``.
        packed: Whether the right operand is packed once and used often, so that packing costs nothing.
    """
    m, k, n = (min(_power_of_four(size), most) for size, most in zip(shape, LARGEST, strict=True))
    settings = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    return _choose(str(device), settings, qa, qb, (m, k, n), packed)


def exact_engines(device: torch.device, qa: int, qb: int) -> list[Engine]:
    """Return the engines that prove exact on ``device`` for integers up to ``qa`` and ``qb``."""
    return [e for e in ENGINES if e.device in (None, device.type) and is_exact(e, device, qa, qb)]


def is_exact(engine: Engine, device: torch.device, qa: int, qb: int) -> bool:
    """Return whether an engine runs on ``device``, quickly, and equals the definition up to its depth."""
    return _is_exact(engine, str(device), torch.get_float32_matmul_precision(), qa, qb)


@functools.cache
def _choose(
    device: str, settings: tuple[int, str], qa: int, qb: int, shape: tuple[int, int, int], packed: bool
) -> Engine:
    a, b = extremes(shape[0], shape[1], qa, device), extremes(shape[2], shape[1], qb, device)
    best, least = INT64, float("inf")
    with torch.inference_mode():
        for engine in exact_engines(torch.device(device), qa, qb):
            run = _job(engine, a, b, qa, qb, packed)
            run()
            seconds = min(_seconds(run, device, runs=3, limit=3 * least))
            if seconds < least:
                best, least = engine, seconds
    return best


@functools.cache
def _is_exact(engine: Engine, device: str, precision: str, qa: int, qb: int) -> bool:
    depth = engine.depth(qa, qb)
    if depth == 0:
        return False
    deep = (depth, max(1, depth - 1))
    shapes = [(m, min(k, depth), n) for m, k, n in PROBES] + [(5, deep[0], 9), (1, deep[1], 4)]
    try:
        with torch.inference_mode():
            return (
                _is_quick(engine, device)
                and all(_equals_reference(engine, shape, qa, qb, device) for shape in shapes)
                and all(_keeps_odd_sums(engine, columns, qa, qb, device) for columns in deep)
            )
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):  # torch lacks a kernel, a device a dtype
        return False


def _equals_reference(engine: Engine, shape: tuple[int, int, int], qa: int, qb: int, device: str) -> bool:
    m, k, n = shape
    for seed in range(2):  # another seed begins with another pattern, which matters for a single row
        a, b = extremes(m, k, qa, device, first=seed), extremes(n, k, qb, device)
        if not torch.equal(engine.multiply(a, engine.pack(b), qa).cpu().double(), reference(a, b).double()):
            return False
    return True


def _keeps_odd_sums(engine: Engine, columns: int, qa: int, qb: int, device: str) -> bool:
    a, b = (operand.to(device) for operand in odd_sums(columns, qa, qb))
    expected = reference(a, b).double()
    for rows in (1, 17):  # kernels for few rows and for many
        found = engine.multiply(a.repeat(rows, 1), engine.pack(b), qa)
        if not torch.equal(found.cpu().double(), expected.repeat(rows, 1)):
            return False
    return True


def _is_quick(engine: Engine, device: str) -> bool:
    a, b = extremes(4, 64, 3, device), extremes(8, 64, 3, device)
    run = _job(engine, a, b, 3, 3, packed=False)
    run()  # the first call also builds kernels
    return min(_seconds(run, device, runs=3, limit=GIVEN_UP_SECONDS)) < TINY_SECONDS


def extremes(rows: int, columns: int, limit: int, device: str = "cpu", *, first: int = 0) -> Tensor:
    """Return int8 ``(rows, columns)`` whose rows are, in turn, all ``limit``, all ``-limit``, alternating, random.

    The first begins with ``limit - 1``, for sums that no rounding to fewer bits leaves alone.
    """
    generator = torch.Generator().manual_seed(first)
    values = torch.randint(-limit, limit + 1, (rows, columns), generator=generator, device="cpu")
    pattern = (torch.arange(rows, device="cpu") + first) % 4
    sign = 1 - 2 * (torch.arange(columns, device="cpu") % 2)
    values[pattern == 0], values[pattern == 1], values[pattern == 2] = limit, -limit, limit * sign
    values[pattern == 0, :1] = limit - 1
    return values.to(torch.int8).to(device)


def odd_sums(columns: int, qa: int, qb: int) -> tuple[Tensor, Tensor]:
    """Return int8 ``a (2, columns)`` and ``b (6, columns)``, all but one element of a row at its limit.

    Beyond 2^24 float32 holds no odd number, and what is rounded may be the sum of ``a b`` or that of ``(a + c) b`` with
    an offset c. Among the products of these rows is one whose sum is odd, for each parity of ``columns``, ``qa``,
    ``qb`` and c: of the left rows none or the second element is one below its limit, of the right rows none, the first
    or the second. The last three of ``b`` are the first three with the other sign.
    """
    a = _below_limit(columns, qa, (None, 1))
    b = _below_limit(columns, qb, (None, 0, 1))
    return a, torch.cat([b, -b])


def _below_limit(columns: int, limit: int, places: tuple[int | None, ...]) -> Tensor:
    rows = torch.full((len(places), columns), limit, dtype=torch.int8, device="cpu")
    for row, place in enumerate(places):
        if place is not None:
            rows[row, place : place + 1] -= 1
    return rows


def _job(engine: Engine, a: Tensor, b: Tensor, qa: int, qb: int, packed: bool) -> Callable[[], object]:
    """Return the call to time, cut to the depth of the engine as a real product is."""
    depth = engine.depth(qa, qb)
    parts = [(a[:, i : i + depth], b[:, i : i + depth]) for i in range(0, a.shape[1], depth)]
    if not packed:
        return lambda: [engine.multiply(x, engine.pack(y), qa).to(torch.int32) for x, y in parts]
    ready = [(x, engine.pack(y)) for x, y in parts]
    return lambda: [engine.multiply(x, y, qa).to(torch.int32) for x, y in ready]


def _seconds(run: Callable[[], object], device: str, *, runs: int, limit: float) -> list[float]:
    """Return the times of at most ``runs`` calls; one that takes longer than ``limit`` is the last."""
    times: list[float] = []
    while len(times) < runs and (not times or times[-1] < limit):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _power_of_four(size: int) -> int:
    power = 1
    while power < size:
        power *= 4
    return power
