"""Fold random ONNX graphs around norms and compare each with its source by the reference evaluator.

    python benchmarks/fuzz_onnx.py [--seeds 0:20000] [--lines out/fuzz_onnx.jsonl]
                                   [--out benchmarks/results/fuzz_onnx.json]

The graphs are those of ``tests/lowering/graphs``: opsets 9 to 21, most in float64, where right is within 1e-9 of the
largest element of each output. ``--lines`` gets one line per seed; seeds that it already holds are skipped. What is
wrong or fails is printed as it is found, with the graph as text. Exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from _environment import environment

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # for tests.lowering.graphs

from tests.lowering.graphs.judging import Verdict, judge, random_graph  # noqa: E402

FAILURES = ("wrong", "crash")


def main() -> int:
    """Judge the seeds, write the summary, and return the exit code."""
    parser = argparse.ArgumentParser(description="random ONNX graphs, folded and compared")
    parser.add_argument("--seeds", default="0:20000", help="first and end of the seeds (default 0:20000)")
    parser.add_argument("--lines", type=Path, default=Path("out/fuzz_onnx.jsonl"), help="one line per seed")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fuzz_onnx.json", help="the summary")
    options = parser.parse_args()
    first, end = map(int, options.seeds.split(":"))
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    done = {line["seed"] for line in read(options.lines)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with options.lines.open("a", encoding="utf-8") as file:
        for seed in range(first, end):
            if seed not in done:
                file.write(json.dumps(judged(seed)) + "\n")
                file.flush()
    lines = [line for line in read(options.lines) if first <= line["seed"] < end]
    summary = summarize(lines)
    options.out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))
    return int(any(summary[kind] for kind in FAILURES))


def judged(seed: int) -> dict[str, Any]:
    """Return what became of the graph of one seed, and print it where it is a failure."""
    begin = time.perf_counter()
    made = random_graph(random.Random(seed))
    verdict: Verdict = judge(made)
    if verdict.kind in FAILURES:
        print(f"seed {seed}, {verdict.kind}: {verdict.detail}\n{onnx.printer.to_text(made)}", flush=True)
    result = {"seed": seed, "kind": verdict.kind, "detail": verdict.detail, "opset": made.opset_import[0].version}
    result |= {"norms": verdict.norms, "folded": verdict.folded, "seconds": round(time.perf_counter() - begin, 4)}
    return result | {"operators": sorted({node.op_type for node in made.graph.node})}


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file, none where there is no file; a last line that was cut off is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if line.endswith("}"):
            yield json.loads(line)


def summarize(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of a run."""
    kinds = collections.Counter(line["kind"] for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    return {
        "graphs": len(lines),
        **{kind: kinds[kind] for kind in ("right", "wrong", "crash", "unusable")},
        "failures": [line for line in lines if line["kind"] in FAILURES],
        "norms": sum(line["norms"] for line in lines),
        "folded": sum(line["folded"] for line in lines),
        "by_opset": dict(sorted(collections.Counter(line["opset"] for line in lines).items())),
        "by_operator": dict(collections.Counter(op for line in lines for op in line["operators"]).most_common()),
        "graphs_per_second": round(len(lines) / max(seconds, 1e-9), 1),
        **environment(),
    }


if __name__ == "__main__":
    sys.exit(main())
