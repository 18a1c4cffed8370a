"""Fold random networks through each reader and judge every result by its source; print what is wrong as Python.

    python benchmarks/fuzz_networks.py [--seeds 0:20000] [--processes 1] [--lines out/fuzz_networks.jsonl]
                                       [--against OTHER.jsonl] [--out benchmarks/results/fuzz_networks.json]

The networks are those of ``tests/networks``. ``--lines`` gets one line per seed; seeds that it already holds are
skipped. ``--against`` is such a file of another version, with which it is compared. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import json
import logging
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from _environment import environment

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # for tests.networks

from tests.networks.network import Network  # noqa: E402
from tests.networks.oracles import Verdict, check  # noqa: E402
from tests.networks.programs import network  # noqa: E402
from tests.networks.shrinking import shrink  # noqa: E402

FAILURES = ("wrong", "crash")
CHUNK = 20  # seeds that a process takes at a time
FEATURES = {  # what networks are made with, by what their source shows
    "functional calls on weights": r"(F|torch)\.(conv|linear|embedding|addmm)|_conv_forward",
    "functional norms": r"(F|torch)\.(batch|layer|group|instance|rms)_norm",
    "norms written out": r"running_var.*(sqrt|\*\* 0\.5)",
    "layers held outside of the module tree": r"self\.kept_",
    "containers": r"nn\.(Sequential|ModuleList|ModuleDict)\(",
    "spellings of NumPy": r"axis=|axes=|keepdims=|concatenate|swapaxes|moveaxis",
    "buffers": r"register_buffer",
    "in-place operations": r"\.(mul|add|sub|div|copy|relu)_\(|inplace=True|v\d+ [+*]= ",
    "parametrizations": r"nn\.utils\.",
    "shared layers and tied weights": r"alias|weight = net|twin",
    "hooks": r"register_\w*hook",
    "instance patches": r"parts\.patch",
    "hooks of all modules": r"inside of",
    "several examples": r"an example too",
    "attention and recurrence": r"self\.attention",
    "training mode": r"net\.train\(\)",
    "branches": r"use_norm|domain|shape\[0\] < 3",
    "norms that are asked": r"isinstance\(self|\.num_features|\.eps$|weight\.dtype",
    "several outputs": r"return (\(|\[|\{|parts\.Output|\w+, )",
    "transposed convolutions": r"ConvTranspose",
    "paddings that are not zero": r"padding_mode",
    "without a batch": r"x=torch\.randn\(\d, ",
}

REFUSE_NOW = ("norms that are asked", "hooks of all modules", "instance patches")


def main() -> int:
    """Run the seeds, write the summary, and return the exit code."""
    options = _options()
    first, _, end = options.seeds.partition(":")
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    done = {line["seed"] for line in read(options.lines)}
    seeds = [seed for seed in range(int(first), int(end)) if seed not in done]
    with options.lines.open("a", encoding="utf-8") as file:
        for line in _judged(seeds, options.processes):
            file.write(json.dumps(line) + "\n")
            file.flush()
            for verdict in line["verdicts"]:
                if verdict["kind"] in FAILURES:
                    print(
                        f"seed {line['seed']}, {verdict['reader']}: {verdict['detail']}\n{line['network']}", flush=True
                    )
    lines = [line for line in read(options.lines) if int(first) <= line["seed"] < int(end)]
    summary = summarize(lines, read(options.against) if options.against else [])
    print(json.dumps(summary, indent=2))
    options.out.write_text(json.dumps({**environment(), "seeds": options.seeds, **summary}, indent=2) + "\n", "utf-8")
    return int(any(n for r in summary["verdicts"].values() for k, n in r.items() if k in FAILURES))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fold random networks and judge every result by its source")
    parser.add_argument("--seeds", default="0:20000", help="first and last, the last left out (default 0:20000)")
    parser.add_argument("--processes", type=int, default=1, help="networks at the same time (default 1)")
    parser.add_argument("--lines", type=Path, default=Path("out/fuzz_networks.jsonl"), help="one line per seed")
    parser.add_argument("--against", type=Path, help="the lines of another version, to compare what was folded")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fuzz_networks.json", help="the summary")
    return parser.parse_args()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a result file; none if there is no such file, and not one that was cut off."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _judged(seeds: list[int], processes: int) -> Iterator[dict[str, Any]]:
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    if processes == 1:
        _prepare()
        yield from (line for chunk in chunks for line in _chunk(chunk))
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, initializer=_prepare) as pool:
        yield from (line for some in pool.map(_chunk, chunks) for line in some)


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("normfuse", "torch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _chunk(seeds: list[int]) -> list[dict[str, Any]]:
    return [line(seed) for seed in seeds]


def line(seed: int) -> dict[str, Any]:
    """Judge the network of one seed; a failure comes with a small network that fails in the same way."""
    net = network(seed)
    readers = ("recorded", "traced") + (("exported",) if seed % 20 == 0 else ())
    extras = seed % 10 == 0
    verdicts = check(net, readers, extras=extras)
    failed = next((v for v in verdicts if v.kind in FAILURES), None)
    shown = str(shrink(net, failed, extras=extras)[0]) if failed else None
    return {"seed": seed, "verdicts": [vars(v) for v in verdicts], "features": features(net), "network": shown}


def features(net: Network) -> list[str]:
    """Return what a network is made with."""
    text = str(net)
    return [name for name, pattern in FEATURES.items() if re.search(pattern, text, re.MULTILINE)]


def summarize(lines: Iterable[dict[str, Any]], others: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return counts of verdicts, norms and features, and how another version compares."""
    verdicts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    made_with: dict[int, list[str]] = {}
    now: dict[tuple[int, str], Verdict] = {}
    for entry in lines:
        made_with[entry["seed"]] = entry["features"]
        for verdict in (Verdict(**v) for v in entry["verdicts"]):
            now[entry["seed"], verdict.reader] = verdict
            verdicts[verdict.reader].update({verdict.kind: 1, "norms": verdict.norms, "norms folded": verdict.folded})
    features_seen = collections.Counter(name for names in made_with.values() for name in names)
    summary = {
        "networks": len(made_with),
        "verdicts": {reader: dict(sorted(counts.items())) for reader, counts in verdicts.items()},
        "made with": {name: features_seen[name] for name in FEATURES},
    }
    before = {(other["seed"], v["reader"]): Verdict(**v) for other in others for v in other["verdicts"]}
    return summary | ({"beside another version": _compared(now, before, made_with)} if before else {})


def _compared(
    now: dict[tuple[int, str], Verdict], before: dict[tuple[int, str], Verdict], made_with: dict[int, list[str]]
) -> dict[str, Any]:
    """Return how often each version folded more, and the seeds of which the other did by what refuses a fold now."""
    both = [(key, before[key], now[key]) for key in sorted(now.keys() & before.keys())]
    less: dict[str, list[str]] = {name: [] for name in (*REFUSE_NOW, "others")}
    for (seed, reader), old, new in both:
        if old.kind == "right" and new.folded < old.folded:
            cause = next((name for name in REFUSE_NOW if name in made_with[seed]), "others")
            less[cause].append(f"{seed} {reader}")
    return {
        "readings compared": len(both),
        "it was wrong or crashed": sum(old.kind in FAILURES for _, old, _ in both),
        "folded more": sum(new.folded > old.folded for _, old, new in both),
        "folded less": less,
    }


if __name__ == "__main__":
    sys.exit(main())
