"""Tables and the picture of the benchmark on MiniLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK, MUTED, GRID, BLUE, RED = "#1f2430", "#6b7280", "#e5e7eb", "#2563c9", "#e4572e"
Records = Sequence[Mapping[str, Any]]


def line(record: Mapping[str, Any]) -> str:
    """Return one record as a line of text."""
    parts = [
        f"{kind}: Pearson {record[kind]['pearson']:.4f} Spearman {record[kind]['spearman']:.4f} "
        f"cosine {record[kind]['cosine']:.4f} nearest {record[kind]['nearest']:.2f}"
        for kind in ("same", "other")
    ]
    return f"{record['name']:<52} {'   '.join(parts)}   {record['seconds']:.0f} s"


def table(records: Records) -> list[str]:
    """Return the networks with several swapped norms as lines of Markdown."""
    lines = [
        "| swapped | Pearson | Spearman | same nearest neighbour | other text: Pearson | Spearman |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        if not record["name"].startswith("only "):
            same, other = record["same"], record["other"]
            first = f"{same['pearson']:.3f} | {same['spearman']:.3f} | {same['nearest']:.0%}"
            lines.append(f"| {record['name']} | {first} | {other['pearson']:.3f} | {other['spearman']:.3f} |")
    return lines


def short(norm: str) -> str:
    """Return a norm's name without what all of them have in common."""
    return norm.removeprefix("bert.").removeprefix("encoder.").replace(".LayerNorm", "")


def draw(path: Path, records: Records) -> Path:
    """Draw what each norm costs alone, and what is kept when the most sensitive ones stay."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    alone = [record for record in records if record["name"].startswith("only ")]
    style: Any = {"font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED}
    with pyplot.rc_context(style):
        drawing, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
        for place, record in enumerate(reversed(alone)):
            left.barh(place, 1 - record["same"]["spearman"], color=BLUE, height=0.7, zorder=2)
            left.plot(1 - record["other"]["spearman"], place, "o", color=RED, markersize=5, zorder=3)
        left.set_yticks(range(len(alone)), [short(r["name"].removeprefix("only ")) for r in reversed(alone)])
        left.set_xscale("log")
        left.set_xlabel("1 - Spearman of the similarities (bars: docstrings, dots: other text)")
        _tidy(left, "Swapping one norm alone", "x")
        for reconstructed, marker in ((False, "o-"), (True, "s-")):
            found = [r for r in records if r["name"].startswith("all but") and r["reconstructed"] == reconstructed]
            counts = [len(record["stay"]) for record in found]
            label = "reconstructed" if reconstructed else "least squares"
            color = BLUE if reconstructed else MUTED
            right.plot(counts, [r["same"]["spearman"] for r in found], marker, color=color, label=label)
            right.plot(counts, [r["other"]["spearman"] for r in found], marker[0] + ":", color=color, markersize=4)
        right.set_xlabel("most sensitive norms that stay LayerNorm (dotted: other text)")
        right.xaxis.get_major_locator().set_params(integer=True)
        _tidy(right, "Spearman correlation with the similarities of the original", "y")
        right.legend(frameon=False, loc="lower right")
        drawing.savefig(path, dpi=110)
        pyplot.close(drawing)
    return path


def _tidy(axes: Any, title: str, grid: Any) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold")
    axes.grid(True, axis=grid, color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw a result file, also one in part, and print its table."""
    path = Path(sys.argv[1])
    records = json.loads(path.read_text(encoding="utf-8"))["records"]
    draw(path.with_suffix(".png"), records)
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
