"""The picture of the latency benchmark: each variant relative to the network without norms."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = {
    "RMSNorm, written out": "#c9cdd4",
    "RMSNorm": "#9ca3af",
    "LayerNorm": "#4b5563",
    "UnifiedNorm": "#f0a58f",
    "folded": "#2563c9",
}


def draw(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Draw the ratios of every case and backend as bars, and return the path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    backends = list(dict.fromkeys(record["backend"] for record in records))
    cases = list(dict.fromkeys(record["case"] for record in records))
    style: Any = {"font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": INK}
    with pyplot.rc_context(style):
        drawing, panels = pyplot.subplots(
            1, len(backends), figsize=(4.6 * len(backends), 4), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, backend in zip(panels[0], backends, strict=True):
            for place, case in enumerate(cases):
                found = {r["variant"]: r["ratio"] for r in records if (r["case"], r["backend"]) == (case, backend)}
                shown = [name for name in COLORS if name in found]
                for number, name in enumerate(shown):
                    left = place + 0.16 * (number - (len(shown) - 1) / 2)
                    axes.bar(left, found[name], 0.15, color=COLORS[name], zorder=2)
            axes.axhline(1, color=INK, linewidth=1, zorder=3)
            axes.set_xticks(range(len(cases)), cases)
            axes.set_title(backend, loc="left", fontsize=11.5, fontweight="bold")
            axes.grid(True, axis="y", color=GRID, zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
        highest = max(record["ratio"] for record in records)
        panels[0][0].set_ylim(0.8, max(1.1, highest + 0.03))
        panels[0][0].set_ylabel("time, relative to no norm at all")
        handles = [Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
        drawing.legend(handles, list(COLORS), frameon=False, loc="outside lower center", ncols=len(COLORS))
        drawing.savefig(path, dpi=110)
        pyplot.close(drawing)
    return path


def main() -> None:
    """Draw a result file, also one in part."""
    path = Path(sys.argv[1])
    draw(path.with_suffix(".png"), json.loads(path.read_text(encoding="utf-8"))["records"])


if __name__ == "__main__":
    main()
