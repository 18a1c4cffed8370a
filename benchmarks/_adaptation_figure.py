"""The picture of ``adaptation.py``: accuracy by method, on shuffled and on class-ordered streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _fine_tune_figure import GRID, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"shuffled": "#8fb0e6", "class-ordered": "#e4572e"}


def draw(path: Path, runs: Sequence[dict[str, Any]]) -> Path:
    """Draw one panel for each corruption, a bar for each method and order, a dot for each seed; return the path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    names = list(runs[0]["accuracy"]["shuffled"])
    style: Any = {"font.size": 9, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED}
    with pyplot.rc_context(style):
        drawing, grid = pyplot.subplots(2, -(-len(names) // 2), figsize=(13, 6.4), layout="constrained", sharey=True)
        for axes, name in zip(grid.flat, names, strict=False):
            _panel(axes, name, runs)
        for axes in grid.flat[len(names) :]:
            axes.axis("off")
        handles = [Patch(color=color) for color in COLORS.values()]
        drawing.legend(handles, list(COLORS), frameon=False, loc="outside upper right", ncols=2)
        drawing.savefig(path, dpi=100)
        pyplot.close(drawing)
    return path


def _panel(axes: Axes, name: str, runs: Sequence[dict[str, Any]]) -> None:
    methods = list(runs[0]["accuracy"]["shuffled"][name])
    for side, (order, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
        for place, method in enumerate(methods):
            values = [100 * run["accuracy"][order][name][method] for run in runs]
            axes.bar(place + side, sum(values) / len(values), 0.38, color=color)
            axes.plot([place + side] * len(values), values, ".", color=INK, markersize=3)
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold")
    axes.set_xticks(range(len(methods)), methods, rotation=40, ha="right")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.grid(True, axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
