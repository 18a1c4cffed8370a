"""What it costs that a fold proves itself: time and peak memory of ``fold`` with and without ``verify``, on one core.

    python benchmarks/verification.py [--rounds 7] [--out benchmarks/results/verification.json]

The two take turns; the ratio of times is the median over the rounds, of the time that the processor spends on this
process. Peak memory is what torch allocates at a time during the call, beside the model itself: without ``verify`` the
copy that is edited, what replaces its tensors, and the values of the recorded run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import normfuse
from benchmarks._environment import environment
from benchmarks._timing import latency, turns
from normfuse.latency.memory import peak_bytes

NETWORKS = ("resnet50", "mobilenetv2_100", "vit_small_patch16_224")  # of timm
INPUTS = ("recorded", "traced")


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description="cost of verifying a fold")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/verification.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    result: dict[str, Any] = {"environment": environment(), "threads": 1, "networks": {}}
    for name in NETWORKS:
        model = with_gains(timm.create_model(name).eval())
        for reader in INPUTS:
            found = measured(model, reader, options.rounds)
            result["networks"][f"{name}, {reader}"] = found
            print(
                f"{name:<22} {reader:<9} time x {found['time']:.2f}   peak memory x {found['memory']:.2f}", flush=True
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def with_gains(model: nn.Module) -> nn.Module:
    """Give every norm a gain and a shift, without which there would be nothing to move in a transformer."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def measured(model: nn.Module, reader: str, rounds: int) -> dict[str, Any]:
    """Return the ratios, with what they are ratios of, for one network read in one of two ways."""
    images = torch.randn(1, 3, 224, 224) if reader == "recorded" else None

    def fold(*, verify: bool) -> nn.Module:
        return normfuse.fold(model, example_inputs=images, verify=verify)

    calls = {"without": lambda: fold(verify=False), "with": lambda: fold(verify=True)}
    times = turns(calls, rounds=rounds, warmup=1, clock=time.process_time)
    seconds = {name: latency(values, times["without"]) for name, values in times.items()}
    peaks = {name: statistics.median(_peak(call) for _ in range(3)) for name, call in calls.items()}
    return {
        "time": seconds["with"].ratio,
        "memory": peaks["with"] / peaks["without"],
        "seconds": {name: asdict(latency) for name, latency in seconds.items()},
        "peak_bytes": peaks,
    }


def _peak(call: Callable[[], object]) -> int:
    """Return the peak memory of a call that starts with nothing left to collect."""
    gc.collect()
    return peak_bytes(call)


if __name__ == "__main__":
    main()
