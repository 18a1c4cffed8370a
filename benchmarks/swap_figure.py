"""Tables and pictures of the quality benchmarks of UnifiedNorm.

python benchmarks/swap_figure.py benchmarks/results/unified_vit.json    # of a result file that is there, also in part
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = {"L": "#111827", "U": "#2563c9", "B": "#e4572e"}
ORIGINAL = "LayerNorm"


def line(record: Mapping[str, Any], metric: str) -> str:
    """Return one record as a line of text."""
    before = f"{record['before']['test'][metric]:8.2f}" if "before" in record else "        "
    text = f"seed {record['seed']}  {record['variant']:<42} {before} -> {record['after']['test'][metric]:8.2f}"
    if "folded" in record:
        folded = record["folded"]
        text += f"  folded {folded['test'][metric]:.2f} ({folded['difference']:.0e}, {folded['norms_left']} norms left)"
    return text


def count(result: Mapping[str, Any], variant: str) -> int:
    """Return with how many seeds a variant was measured."""
    return sum(record["variant"] == variant for record in result["runs"])


def values(result: Mapping[str, Any], variant: str, stage: str = "after") -> list[float]:
    """Return the test metric of a variant, seed by seed; empty where it was not measured."""
    found = [record for record in result["runs"] if record["variant"] == variant and stage in record]
    metric = result["metric"]
    if stage == "folded":
        return [record["folded"]["test"][metric] for record in found]
    return [record[stage]["test"][metric] for record in found]


def gaps(result: Mapping[str, Any], variant: str, stage: str = "after") -> list[float]:
    """Return how far a variant is behind the original of its seed: points of accuracy, or percent of perplexity."""
    originals = {r["seed"]: r["after"]["test"][result["metric"]] for r in result["runs"] if r["variant"] == ORIGINAL}
    seeds = [r["seed"] for r in result["runs"] if r["variant"] == variant and stage in r]
    pairs = zip(values(result, variant, stage), [originals[seed] for seed in seeds], strict=True)
    if result["metric"] == "accuracy":
        return [original - found for found, original in pairs]
    return [100 * (found / original - 1) for found, original in pairs]


def variants(result: Mapping[str, Any]) -> list[str]:
    """Return the names of the variants that were measured, in order."""
    return list(dict.fromkeys(record["variant"] for record in result["runs"]))


def table(result: Mapping[str, Any]) -> list[str]:
    """Return the results as lines of Markdown: medians and ranges of the seeds."""
    unit = "points" if result["metric"] == "accuracy" else "%"
    lines = [
        f"| network | after the swap | {result['metric']} at the end | behind LayerNorm | fine-tuned with | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in variants(result):
        before, after = values(result, name, "before"), values(result, name)
        gap = "–" if name == ORIGINAL else f"{_spread(gaps(result, name))} {unit}"
        columns = (name, _spread(before), _spread(after), gap, _setting(result, name), str(count(result, name)))
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def _spread(found: Sequence[float]) -> str:
    if not found:
        return "–"
    median = f"{statistics.median(found):.2f}"
    return median if len(found) == 1 else f"{median} ({min(found):.2f} to {max(found):.2f})"


def _setting(result: Mapping[str, Any], variant: str) -> str:
    chosen = result["chosen"].get(variant)
    return f"{chosen['lr']:g}, {chosen['statistics']}" if chosen else "–"


def draw(path: Path, result: Mapping[str, Any]) -> Path:
    """Draw the loss against the original of every variant and seed, before and after fine-tuning."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = [name for name in variants(result) if name != ORIGINAL][::-1]
    style: Any = {"font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED}
    with pyplot.rc_context(style):
        drawing, axes = pyplot.subplots(figsize=(10, 0.5 + 0.45 * (len(names) + 2)), layout="constrained")
        for row, name in enumerate(names):
            for stage, fill in (("before", "none"), ("after", COLORS[name[0]])):
                found = gaps(result, name, stage)
                axes.scatter(found, [row] * len(found), s=46, facecolors=fill, edgecolors=COLORS[name[0]], zorder=3)
        target = 0.3 if result["metric"] == "accuracy" else 2.0
        axes.axvspan(0, target, color=GRID, zorder=0)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xscale("symlog", linthresh=target)
        axes.set_yticks(range(len(names)), names)
        what = "points of test accuracy" if result["metric"] == "accuracy" else "percent of test perplexity"
        axes.set_xlabel(f"behind LayerNorm, {what} (symmetric logarithmic scale; shaded: the target)")
        axes.set_title("Hollow: after the swap.  Filled: fine-tuned.  One dot per seed.", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        drawing.savefig(path, dpi=110)
        pyplot.close(drawing)
    return path


def main() -> None:
    """Draw a result file and print its table."""
    path = Path(sys.argv[1])
    result = json.loads(path.read_text(encoding="utf-8"))
    draw(path.with_suffix(".png"), result)
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
