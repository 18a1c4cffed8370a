"""The picture that the demo ends with: what the network sees, its operators, its latency; before and after folding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _demo_answers import Outputs, likeliest
from _timing import Latency
from real_networks import PICTURE_CLASSES, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
STATES = {"unfolded": "#b8bfca", "folded": "#2563c9"}
OPERATORS = {"Conv": "#2563c9", "BatchNormalization": "#e4572e", "Clip": "#8fb0e6", "Pad": "#c9d8f2", "Add": "#5b6b8c"}
REST = "#d9dde4"
BAR = 0.72  # of the distance between two bars


@dataclass(frozen=True)
class Shown:
    """What the picture shows of one network; the keys are unfolded and folded, and for latencies how it was run.

    Attributes:
        title: Its name.
        operators: How many nodes of each operator its ONNX files have.
        outputs: Its outputs for the pictures.
        latencies: What was measured.
    """

    title: str
    operators: dict[str, Counter[str]]
    outputs: Outputs
    latencies: dict[tuple[str, str], Latency]


def draw(path: Path, shown: Sequence[Shown], machine: str) -> Path:
    """Draw the networks, the first of which names what it sees, and return the path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    colors = {"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": INK}
    style: Any = {"font.size": 10, **colors}
    with pyplot.rc_context(style):
        drawing = pyplot.figure(figsize=(14, 8.4))
        drawing.text(0.03, 0.945, "Before and after folding", fontsize=18, fontweight="bold")
        drawing.text(0.03, 0.912, _subtitle(shown), color=MUTED, fontsize=11)
        _pictures(drawing, drawing.add_gridspec(1, 1, left=0.03, right=0.97, top=0.88, bottom=0.56)[0], shown[0])
        spaces = {"left": 0.115, "right": 0.985, "top": 0.425, "bottom": 0.11, "wspace": 0.42}
        panels = drawing.add_gridspec(1, 1 + len(shown), **spaces)
        _operators(drawing.add_subplot(panels[0]), shown)
        for column, one in enumerate(shown, start=1):
            _latencies(drawing.add_subplot(panels[column]), one)
        drawing.text(0.03, 0.015, _remark(shown), color=MUTED, fontsize=8.5)
        drawing.text(0.97, 0.015, f"{machine}; variants take turns", color=MUTED, fontsize=8.5, ha="right")
        drawing.savefig(path, dpi=130)
        pyplot.close(drawing)
    return path


def _subtitle(shown: Sequence[Shown]) -> str:
    counts = " and ".join(f"{one.operators['unfolded']['BatchNormalization']} of {one.title}" for one in shown)
    left = sum(one.operators["folded"]["BatchNormalization"] for one in shown)
    return f"BatchNorms: {counts}; {left or 'none'} left after folding. Labels are those of {shown[0].title}."


def _remark(shown: Sequence[Shown]) -> str:
    """Say what else the folded files lack: ours is not the credit."""
    pads = [one.operators[state]["Pad"] for one in shown for state in ("unfolded", "folded")]
    return "The exporter merges each Pad into the convolution behind it." if sum(pads[::2]) > sum(pads[1::2]) else ""


def _pictures(drawing: Figure, place: SubplotSpec, shown: Shown) -> None:
    before, after = likeliest(shown.outputs.source), likeliest(shown.outputs.folded)
    panels = place.subgridspec(1, len(PICTURE_CLASSES), wspace=0.06)
    for column, (name, old, new) in enumerate(zip(PICTURE_CLASSES, before, after, strict=True)):
        axes = drawing.add_subplot(panels[column])
        axes.imshow(picture(name).permute(1, 2, 0).numpy())
        axes.set_axis_off()
        for line, (word, label, color) in enumerate((("before", old, MUTED), ("after", new, INK))):
            height = -0.05 - 0.1 * line
            axes.text(0, height, word, transform=axes.transAxes, va="top", color=MUTED)
            axes.text(0.25, height, label, transform=axes.transAxes, va="top", color=color)


def _operators(axes: Axes, shown: Sequence[Shown]) -> None:
    """Draw the nodes of each file as one bar, by operator."""
    names: list[str] = []
    for one in shown:
        for state in STATES:
            _stack(axes, len(names), one.operators[state])
            names.append(f"{one.title}\n{state}" if state == "unfolded" else state)
    from matplotlib.patches import Patch

    _tidy(axes, names, "Nodes of the ONNX file")
    handles = [Patch(color=color, label=name) for name, color in {**OPERATORS, "other": REST}.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.42, -0.08), ncols=3, frameon=False, fontsize=8.5)


def _stack(axes: Axes, row: int, counts: Counter[str]) -> None:
    rest = sum(count for name, count in counts.items() if name not in OPERATORS)
    start = 0
    for color, count in [*((color, counts[name]) for name, color in OPERATORS.items()), (REST, rest)]:
        axes.barh(row, count, left=start, color=color, height=BAR)
        start += count
    axes.text(start, row, f" {start}", va="center")


def _latencies(axes: Axes, shown: Shown) -> None:
    """Draw the median of each variant, its quartiles as a line."""
    names: list[str] = []
    for (how, state), one in shown.latencies.items():
        row = len(names)
        median, low, high = (1e3 * value for value in (one.median, one.low, one.high))
        axes.barh(row, median, color=STATES[state], height=BAR)
        axes.plot((low, high), (row, row), color=INK, linewidth=1.4, solid_capstyle="butt")
        axes.text(max(median, high), row, f"  {median:.0f} ms, ×{one.ratio:.2f}", va="center")
        names.append(f"{how}\n{state}" if state == "unfolded" else state)
    _tidy(axes, names, f"Latency of {shown.title}")
    axes.set_xlabel("ms for one picture; quartiles; × to eager, unfolded", fontsize=8.5, loc="left")


def _tidy(axes: Axes, names: Sequence[str], title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=10)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.5)
    axes.set_xlim(left=0)
    axes.tick_params(length=0)
    axes.xaxis.grid(True, color=GRID)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
