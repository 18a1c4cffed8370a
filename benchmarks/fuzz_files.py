"""Read damaged files of every format, and count what may not happen.

    python benchmarks/fuzz_files.py [--seeds 0:20000] [--kinds pickled,npz] [--out benchmarks/results/fuzz_files.json]

Each format (``tests/damaged/samples.py``) is read in a process of its own, so that one that ends is counted too. What
goes wrong is printed with its seed: errors of other kinds than a NormfuseError of one line, hangs, memory beyond the
limits, values that changed although a checksum or digest covers them. Exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _environment import environment

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # for tests.damaged


def main() -> int:
    """Judge the seeds of every kind, write the summary, and return the exit code."""
    from tests.damaged.samples import SAMPLES

    parser = argparse.ArgumentParser(description="damaged files of every format")
    parser.add_argument("--seeds", default="0:20000", help="first and end of the seeds (default 0:20000)")
    parser.add_argument("--kinds", default=",".join(SAMPLES), help="formats, separated by commas")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fuzz_files.json", help="the summary")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    first, end = map(int, options.seeds.split(":"))
    if options.worker:
        print(json.dumps(judged(options.worker, range(first, end))))
        return 0
    names = [name for name in SAMPLES if name in split(options.kinds, list(SAMPLES))]
    kinds = {name: run(name, options.seeds) for name in names}
    summary = {"environment": environment(), "seeds": [first, end], "kinds": kinds}
    options.out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return int(any(row["wrong"] for row in kinds.values()))


def split(text: str, known: list[str]) -> list[str]:
    """Return the kinds in a list; some have a comma in their name."""
    return [name for name in known if f",{name}," in f",{text},"]


def run(kind: str, seeds: str) -> dict[str, Any]:
    """Return the counts of one kind."""
    command = [sys.executable, __file__, "--worker", kind, "--seeds", seeds]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        row: dict[str, Any] = {"files": 0, "wrong": 1, "problems": {"": f"the process ended with {done.returncode}"}}
    else:
        row = json.loads(done.stdout.strip().splitlines()[-1])
    print(kind, json.dumps(row), flush=True)
    return row


def judged(kind: str, seeds: range) -> dict[str, Any]:
    """Judge every seed of one kind in this process."""
    import torch

    from tests.damaged.judging import Files

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = Files(kind, Path(folder))
        problems = {seed: problem for seed in seeds if (problem := files.judge(seed))}
    seconds = round(time.perf_counter() - begin, 1)
    return {"files": len(seeds), "wrong": len(problems), "seconds": seconds, "problems": problems}


if __name__ == "__main__":
    sys.exit(main())
