"""The curves of fine-tuning in four modes: loss, digits recognized, and how far each mode is from Eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = {"train": "#8fb0e6", "eval, last bit": "#b8bfca", "eval": INK, "tune": "#2563c9", "deploy": "#e4572e"}
DASHES: dict[str, Any] = {"tune": (0, (4, 4))}  # on top of Eval, which shows between
LEAST = 1e-18  # what a difference of zero is drawn as


def draw(path: Path, runs: Sequence[dict[str, Any]]) -> Path:
    """Draw what ``fine_tune.py`` measured, one line for each mode and seed, and return the path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED}
    with pyplot.rc_context(style):
        drawing, (losses, shares, differences) = pyplot.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
        for run in runs:
            for mode, color in COLORS.items():
                line: dict[str, Any] = {"color": color, "linestyle": DASHES.get(mode, "-"), "linewidth": 1.2}
                found = run["float32"][mode]
                losses.plot(found["loss"], **line)
                shares.plot(*zip(*found["accuracy"], strict=True), **line)
                if mode != "eval":
                    _differences(differences, run, mode)
        _tidy(losses, "Loss of each batch")
        _tidy(shares, "Share of test digits recognized")
        _tidy(differences, "Difference of the weights to Eval\n(thick: float32, thin: float64)")
        losses.set_yscale("log")
        differences.set_yscale("log")
        _legend(shares)
        drawing.savefig(path, dpi=110)
        pyplot.close(drawing)
    return path


def _differences(axes: Axes, run: dict[str, Any], mode: str) -> None:
    for dtype, width in (("float32", 1.8), ("float64", 0.7)):
        values = [max(value, LEAST) for value in run[dtype][mode]["difference"]]
        axes.plot(range(1, len(values) + 1), values, color=COLORS[mode], linewidth=width)


def _legend(axes: Axes) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, linestyle=DASHES.get(mode, "-")) for mode, c in COLORS.items()]
    axes.legend(handles, [mode.capitalize() for mode in COLORS], frameon=False, loc="lower right")


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold")
    axes.set_xlabel("steps")
    axes.grid(True, color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
