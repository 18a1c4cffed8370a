"""How long normfuse itself takes: inspecting and folding ResNet-50 on one core, and printing the command's help.

    python benchmarks/speed.py [--rounds 7] [--out benchmarks/results/speed.json]

Inspecting and folding include reading the model, and for folding the copy of it; importing torch and normfuse is not
included, nor is running the result against its source (``benchmarks/verification.py``).
``torch.fx.experimental.optimization.fuse`` is timed beside, in turns. The help is a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torchvision
from torch.fx.experimental import optimization

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import normfuse
from benchmarks._environment import environment
from benchmarks._timing import Latency, interleaved


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description="time inspect, fold and --help")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    result = {"environment": environment(), "threads": 1, "seconds": {}}
    for name, latency in measured(options.rounds).items():
        print(f"{name:<24} {latency}   {latency.ratio:.2f} x the peer")
        result["seconds"][name] = asdict(latency)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(rounds: int) -> dict[str, Latency]:
    """Return the latencies by name; ratios are to the fold of torch.fx."""
    model = torchvision.models.resnet50(weights=None).eval()
    images = torch.randn(1, 3, 224, 224)
    calls: dict[str, Callable[[], object]] = {
        "torch.fx fuse": lambda: optimization.fuse(copy.deepcopy(model)),
        "inspect": lambda: normfuse.inspect(model),
        "inspect, recorded": lambda: normfuse.inspect(model, example_inputs=images),
        "fold_bn": lambda: normfuse.fold_bn(model, verify=False),
        "fold, every exact pass": lambda: normfuse.fold(model, verify=False),
        "normfuse --help": lambda: subprocess.run(
            [sys.executable, "-m", "normfuse", "--help"], check=True, stdout=subprocess.DEVNULL
        ),
    }
    return interleaved(calls, baseline="torch.fx fuse", rounds=rounds, warmup=1)


if __name__ == "__main__":
    main()
