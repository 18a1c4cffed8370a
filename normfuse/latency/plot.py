"""A figure of a benchmark: the time of each form, beside that of the unfolded model."""

from __future__ import annotations

import os
from pathlib import Path

from normfuse.atomic_files import staged
from normfuse.errors import MissingDependencyError
from normfuse.latency.results import Benchmark, Row

INSTALL = "matplotlib is not installed: pip install 'normfuse[report]'"
COLOURS = {"unfolded": "#8c8c8c", "folded": "#4c78a8", "exact": "#f58518"}


def plot(benchmark: Benchmark, path: str | os.PathLike[str]) -> Path:
    """Draw the medians with their quartiles, one panel per model, one group of bars per backend and batch.

    Args:
        benchmark: What to draw.
        path: ``.png``, ``.svg`` or ``.pdf``; it appears only when it is complete.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(INSTALL) from error
    models = list(dict.fromkeys(row.model for row in benchmark.rows))
    figure = Figure(figsize=(max(6.0, 1.3 * len(benchmark.rows) / max(len(models), 1)), 3.2 * len(models)))
    FigureCanvasAgg(figure)
    for number, model in enumerate(models, 1):
        _panel(figure.add_subplot(len(models), 1, number), model, [r for r in benchmark.rows if r.model == model])
    figure.tight_layout()
    with staged(path) as target:
        figure.savefig(target, dpi=120)
    return Path(path)


def _panel(axes: object, model: str, rows: list[Row]) -> None:
    groups = list(dict.fromkeys((row.backend, row.batch) for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))
    width = 0.8 / len(variants)
    for row in rows:
        at = groups.index((row.backend, row.batch)) + (variants.index(row.variant) - (len(variants) - 1) / 2) * width
        ratio = row.ratio
        error = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        axes.bar(at, ratio.median, width, yerr=error, color=COLOURS[row.variant], capsize=2)  # type: ignore[attr-defined]
    noise = max(row.noise for row in rows)
    axes.axhspan(1 - noise, 1 + noise, color="#8c8c8c", alpha=0.25, lw=0)  # type: ignore[attr-defined]
    axes.set_xticks(range(len(groups)), [f"{backend}\nbatch {batch}" for backend, batch in groups])  # type: ignore[attr-defined]
    axes.set_ylabel("time / unfolded")  # type: ignore[attr-defined]
    axes.set_title(f"{model}: {', '.join(variants)}; band: the unfolded model against itself", fontsize=9)  # type: ignore[attr-defined]
