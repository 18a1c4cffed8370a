"""Fold every network of the zoo with normfuse and with two peers, in float64, and write what came out.

    python benchmarks/zoo.py [--only GLOB] [--jobs 2] [--timeout 300] [--out benchmarks/results/zoo] [--fresh]

Each network runs in its own process, forked from one that imported everything, with one thread and a time limit.
``OUT.jsonl`` gets one line per network (networks that it already holds are skipped, unless ``--fresh``), ``OUT.json``
the machine and versions, ``OUT.md`` the summary.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fnmatch
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import zoo_networks
import zoo_summary
import zoo_tools
import zoo_worker
from _environment import environment

HERE = Path(__file__).resolve().parent
# Networks whose float64 copies fill the memory of a small machine: they run alone, after the others.
LARGE = ("torchvision/regnet_y_128gf", "torchvision/vit_h_14", "torchvision/vit_l_*")


def main() -> None:
    """Run the chosen networks and write the three files."""
    options = _options()
    lines, facts = (Path(f"{options.out}{suffix}") for suffix in (".jsonl", ".json"))
    lines.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        lines.unlink(missing_ok=True)
    if not options.summary:
        torch.set_num_threads(1)
        zoo_tools.preload()
        facts.write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        _run_all(_chosen(options.only, _done(lines)), lines, options)
    summary = zoo_summary.markdown(read(lines), json.loads(facts.read_text(encoding="utf-8")))
    Path(f"{options.out}.md").write_text(summary, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fold every network of the zoo, beside two peers")
    parser.add_argument(
        "--only", default="*", help="pattern of network names, such as 'timm/*' (commas separate several)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="networks at the same time (default 2)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per network (default 300)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "zoo", help="result files, without suffix")
    parser.add_argument("--fresh", action="store_true", help="forget the networks that the result file holds")
    parser.add_argument("--summary", action="store_true", help="only write the summary of the result file again")
    return parser.parse_args()


def _chosen(patterns: str, done: set[str]) -> list[str]:
    chosen = [n for n in zoo_networks.networks() if any(fnmatch.fnmatch(n, p) for p in patterns.split(","))]
    return [name for name in chosen if name not in done]


def _run_all(names: list[str], lines: Path, options: argparse.Namespace) -> None:
    large = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in LARGE)]
    lock = threading.Lock()
    count = iter(range(1, len(names) + 1))

    def run(name: str) -> None:
        result = _measured(name, options.timeout)
        with lock, lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
            print(f"[{next(count)}/{len(names)}] {zoo_summary.line(result)}", flush=True)

    for jobs, part in ((options.jobs, [name for name in names if name not in large]), (1, large)):
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, part))


def _measured(name: str, timeout: float) -> dict[str, Any]:
    """Return one network's merged result; what a killed or crashed process left behind still counts."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        process = multiprocessing.get_context("fork").Process(target=_measure, args=(name, record))
        process.start()
        process.join(timeout)
        end = f"exit {process.exitcode}" if process.exitcode else "done"
        if process.is_alive():
            process.kill()
            process.join()
            end = f"stopped after {timeout:.0f} s"
        merged: dict[str, Any] = {"network": name}
        for part in read(record):
            merged |= part
    return merged | ({} if end == "done" else {"ended": end})


def _measure(name: str, record: Path) -> None:
    """Measure in this process, and leave the reason where that fails."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            zoo_worker.measure(name, record)
        except Exception as error:
            zoo_worker.append(record, {"message": zoo_tools.one_line(error)})
            raise SystemExit(1) from error


def _done(lines: Path) -> set[str]:
    """Return the networks that need no further run, and drop the others (stopped before our result) from the file."""
    results = [result for result in read(lines) if "ours" in result]
    lines.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    return {result["network"] for result in results}


def read(lines: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file, none where it does not exist."""
    text: Iterable[str] = lines.read_text(encoding="utf-8").splitlines() if lines.exists() else ()
    return [json.loads(line) for line in text if line.strip()]


if __name__ == "__main__":
    main()
