"""Train random networks in Tune mode and by eval mode's norms, with random operations between steps, and compare.

    python benchmarks/fuzz_tune_mode.py [--seeds 0:2000] [--lines out/fuzz_tune_mode.jsonl]
                                        [--out benchmarks/results/fuzz_tune_mode.json]

The loops are those of ``tests/loops``: in float64, right is within 1e-9 of the largest element of each parameter,
buffer, gradient and output, after every step. Every second seed runs by the compiled kernels, where they are built.
``--lines`` gets one line per seed; seeds that it already holds are skipped. What is wrong or fails is printed as it is
found. Exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _environment import environment

from normfuse.layers.normalized_convolution import kernels

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # for tests.loops

from tests.loops.running import run_loop  # noqa: E402

KINDS = ("right", "wrong", "crash", "refused", "invalid")
FAILURES = ("wrong", "crash", "refused")


def main() -> int:
    """Run the seeds, write the summary, and return the exit code."""
    parser = argparse.ArgumentParser(description="random training loops in Tune mode, compared with eval mode")
    parser.add_argument("--seeds", default="0:2000", help="first and end of the seeds (default 0:2000)")
    parser.add_argument("--lines", type=Path, default=Path("out/fuzz_tune_mode.jsonl"), help="one line per seed")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fuzz_tune_mode.json", help="the summary")
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
                file.write(json.dumps(run(seed)) + "\n")
                file.flush()
    summary = summarize([line for line in read(options.lines) if first <= line["seed"] < end])
    options.out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))
    return int(any(summary[kind] for kind in FAILURES))


def run(seed: int) -> dict[str, Any]:
    """Return the verdict on one loop; print it where it is a failure."""
    by_kernels = seed % 2 == 1 and kernels.get() is not None
    with contextlib.nullcontext() if by_kernels else kernels.unused():
        line = {**asdict(run_loop(seed)), "kernels": by_kernels}
    if line["kind"] in FAILURES:
        print(json.dumps(line), flush=True)
    return line


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, none where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarize(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the result file says: counts of verdicts, of pairs, and of each operation and kind of step."""
    kinds = collections.Counter(line["kind"] for line in lines)
    steps = collections.Counter(step.removesuffix(", clipped") for line in lines for step in line["steps"])
    return {
        "environment": environment(),
        "loops": len(lines),
        **{kind: kinds[kind] for kind in KINDS},
        "norms applied by a product": sum(line["pairs"] for line in lines),
        "loops by compiled kernels": sum(line["kernels"] for line in lines),
        "steps": dict(sorted(steps.items())),
        "failures": [line for line in lines if line["kind"] in FAILURES],
    }


if __name__ == "__main__":
    sys.exit(main())
