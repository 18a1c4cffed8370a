"""What a benchmark found: one row per model variant, backend and batch, and what may be concluded from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from normfuse.latency.clock import Spread


@dataclass(frozen=True, slots=True)
class Row:
    """One variant on one backend.

    Attributes:
        model: The name of the model.
        variant: ``"unfolded"``, ``"folded"`` or ``"exact"``.
        backend: A key of :data:`normfuse.latency.BACKENDS`.
        precision: The type of the weights.
        batch: The size of the first axis.
        seconds: Of one call.
        ratio: To the unfolded model on the same backend, within a round.
        noise: How far the ratio of the unfolded model to itself, timed twice in each round, leaves 1: the larger
            distance of its quartiles.
        peak_bytes: The most that one call allocates; None where the backend's memory is not torch's.
        nodes: Operations, kernels, nodes or layers of one call; None where it cannot be told.
        norms: How many of them normalize; None where it cannot be told.
        max_rel: Largest difference to the float64 run of the source, relative to the largest element.
    """

    model: str
    variant: str
    backend: str
    precision: str
    batch: int
    seconds: Spread
    ratio: Spread
    noise: float
    peak_bytes: int | None
    nodes: int | None
    norms: int | None
    max_rel: float

    @property
    def within_noise(self) -> bool:
        """Whether nothing is established: the quartiles of the ratio do not leave what the control shows."""
        return self.ratio.low <= 1 + self.noise and self.ratio.high >= 1 - self.noise

    @property
    def verdict(self) -> str:
        """The comparison with the unfolded model in words."""
        if self.variant == "unfolded":
            return "baseline"
        if self.within_noise:
            return "within the noise"
        faster = self.ratio.median < 1
        percent = 100 * abs(1 - self.ratio.median)
        return f"{percent:.1f} % {'faster' if faster else 'slower'}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; times in milliseconds, sizes in bytes."""
        time = self.seconds
        return {
            "model": self.model,
            "variant": self.variant,
            "backend": self.backend,
            "precision": self.precision,
            "batch": self.batch,
            "median_ms": 1e3 * time.median,
            "iqr_ms": [1e3 * time.low, 1e3 * time.high],
            "p90": 1e3 * time.p90,
            "p95": 1e3 * time.p95,
            "p99": 1e3 * time.p99,
            "throughput": self.batch / time.median,
            "ratio": {key: value for key, value in asdict(self.ratio).items() if key in ("median", "low", "high")},
            "noise": self.noise,
            "verdict": self.verdict,
            "peak_mem": self.peak_bytes,
            "nodes": self.nodes,
            "norms": self.norms,
            "max_rel": self.max_rel,
            "samples": time.samples,
        }

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table; :data:`HEAD` names its columns."""
        time = self.seconds
        memory = "" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.1f}"
        counts = "" if self.nodes is None else f"{self.nodes}" + ("" if self.norms is None else f" ({self.norms})")
        return (
            f"    {self.backend}",
            f"{self.batch}",
            self.variant,
            f"{1e3 * time.median:.2f}",
            f"{1e3 * time.low:.2f} to {1e3 * time.high:.2f}",
            f"{1e3 * time.p95:.2f}",
            f"{self.batch / time.median:.1f}",
            f"{self.ratio.median:.3f}",
            memory,
            counts,
            self.verdict,
        )


HEAD = ("    backend", "batch", "variant", "ms", "quartiles", "p95", "items/s", "ratio", "MiB", "nodes (norms)", "")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All rows of one model.

    Attributes:
        rows: The rows, by backend, batch and variant.
        notes: What could not be measured, and why.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def table(self) -> list[tuple[str, ...]]:
        """Return the head of the table and its rows."""
        return [HEAD, *(row.cells() for row in self.rows)]

    def conclusion(self) -> str:
        """Return in one line what folding buys here, and where nothing."""
        last = {(row.backend, row.batch): row for row in self.rows}  # the form with most passes
        return "; ".join(f"{backend}, batch {batch}: {row.verdict}" for (backend, batch), row in last.items())


def unite(benchmarks: Sequence[Benchmark]) -> Benchmark:
    """Return the benchmarks of several models as one."""
    return Benchmark(
        tuple(row for one in benchmarks for row in one.rows), tuple(note for one in benchmarks for note in one.notes)
    )
