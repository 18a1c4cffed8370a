"""The picture of the Tune mode benchmark: time and memory of each mode, relative to Deploy, which is the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, LIMIT = "#1f2430", "#6b7280", "#e5e7eb", "#111827"
COLORS = {
    "train": "#c9cdd4",
    "eval": "#8f96a3",
    "mmengine": "#e4572e",
    "tune": "#2563c9",
    "tune-kernels": "#10357a",
    "compiled-eval": "#5b6b8c",
    "compiled-tune": "#8fb0e6",
    "inductor-pass": "#f0a58f",
}
TITLES = {
    "train": "Train",
    "eval": "Eval",
    "mmengine": "Tune of MMEngine",
    "tune": "Tune of normfuse",
    "tune-kernels": "Tune of normfuse, with kernels built",
    "compiled-eval": "Eval, compiled",
    "compiled-tune": "Tune of normfuse, compiled",
    "inductor-pass": "Eval, compiled with Inductor's pass",
}
SETTINGS = {"all": "Everything trained", "last-stage": "Last stage trained", "norm-only": "Norms trained"}
ROWS = {"time": "Time of a step", "saved": "Saved for backward", "peak": "Peak memory"}


def line(record: Mapping[str, Any], deploy: Mapping[str, Any]) -> str:
    """Return one record as a line of text."""
    start = f"{record['network']:<24} {record['setting']:<10} {record['mode']:<14}"
    if "message" in record:
        return f"{start} {record['message']}"
    time, ratio = record["seconds"], record["to_deploy"]
    text = f"{1e3 * time['median']:7.0f} ms  x{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
    text += f"  x{record['to_eval']['median']:.2f} Eval"
    for key in ("saved_bytes", "peak_bytes"):
        text += f"  {key[:5]} {record[key] / 2**20:6.1f} MiB x{record[key] / deploy[key]:.3f}"
    return f"{start} {text}  {record.get('difference', {}).get('gradient', 0):.0e}"


def draw(path: Path, result: Mapping[str, Any]) -> Path:
    """Draw every record of a result file, and return the path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    records = [record for record in result["records"] if "seconds" in record]
    networks = list(dict.fromkeys(record["network"] for record in records))
    settings = [name for name in SETTINGS if any(record["setting"] == name for record in records)]
    style: Any = {"font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED}
    with pyplot.rc_context(style):
        drawing, panels = pyplot.subplots(
            len(ROWS), len(settings), figsize=(1.5 + 4.2 * len(settings), 10.5), squeeze=False, sharey="row"
        )
        for row, kind in enumerate(ROWS):
            for column, setting in enumerate(settings):
                chosen = [record for record in records if record["setting"] == setting]
                _panel(panels[row][column], chosen, kind, networks)
                panels[row][column].set_title(f"{ROWS[kind]}: {SETTINGS[setting].lower()}", loc="left", fontsize=10.5)
        drawing.suptitle("A training step on fixed statistics, relative to the folded network", x=0.02, ha="left")
        handles, labels = _legend(panels)
        drawing.legend(
            handles, labels, loc="lower left", ncols=4, frameon=False, fontsize=9, bbox_to_anchor=(0.01, 0.025)
        )
        drawing.text(0.02, 0.01, _remark(result), color=MUTED, fontsize=8.5)
        drawing.tight_layout(rect=(0, 0.075, 1, 0.985))
        drawing.savefig(path, dpi=120)
        pyplot.close(drawing)
    return path


def _panel(axes: Axes, records: Sequence[Mapping[str, Any]], kind: str, networks: Sequence[str]) -> None:
    """Draw one dot per network and mode; for times a line from the least to the greatest ratio."""
    modes = [mode for mode in COLORS if any(record["mode"] == mode for record in records)]
    deploy = {record["network"]: record for record in records if record["mode"] == "deploy"}
    for record in records:
        if record["mode"] not in modes:
            continue
        offset = (modes.index(record["mode"]) - (len(modes) - 1) / 2) * 0.7 / max(len(modes), 1)
        y, color = networks.index(record["network"]) + offset, COLORS[record["mode"]]
        if kind == "time":
            ratio = record["to_deploy"]
            axes.plot((ratio["low"], ratio["high"]), (y, y), color=color, linewidth=1.5)
            value = ratio["median"]
        else:
            value = record[f"{kind}_bytes"] / deploy[record["network"]][f"{kind}_bytes"]
        axes.plot(value, y, "o", color=color, markersize=5, label=TITLES[record["mode"]])
    axes.axvline(1, color=LIMIT, linewidth=1.2, linestyle="--", label="Deploy: the limit")
    axes.set_yticks(range(len(networks)), networks, fontsize=9)
    axes.set_ylim(len(networks) - 0.45, -0.55)
    axes.xaxis.grid(True, color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _legend(panels: Any) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = [label for label in (*TITLES.values(), "Deploy: the limit") if label in found]
    return [found[label] for label in labels], labels


def _remark(result: Mapping[str, Any]) -> str:
    machine = result["environment"]["processor"] if result["device"] == "cpu" else result["device"]
    threads = f", {result['threads']} thread" if result["device"] == "cpu" else ""
    rounds = sorted({record["rounds"] for record in result["records"]})
    count = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return (
        f"{machine}{threads}, torch {result['environment']['packages']['torch']}; {result['clock']}, "
        f"{count} rounds in turns; dots are medians of ratios within a round, lines their quartiles."
    )
