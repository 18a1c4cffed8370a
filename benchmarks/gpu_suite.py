"""Everything that needs a GPU, in under eight minutes: the GPU tests, and each benchmark on CUDA.

    python benchmarks/gpu_suite.py [--seconds 460] [--only tune_mode,tests]

Needs torch, torchvision, timm, onnx, click, rich and safetensors; what else a part needs (pytest for the tests,
onnxruntime, TensorRT) it does without, and says so. Each part runs in its own process with its share of the time. What
it wrote stays under ``benchmarks/results/``; ``gpu_suite.json`` there says how each part ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _environment import environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Part(NamedTuple):
    """One process of the suite.

    Attributes:
        command: What Python runs.
        seconds: Its share of the time.
        needs: Packages without which it is left out.
    """

    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()


PARTS = {
    "tests": Part(("-m", "pytest", "-q", "-m", "gpu", "tests"), 100, ("pytest",)),
    "tune_mode": Part(
        (
            "benchmarks/tune_mode.py",
            "--device",
            "cuda",
            "--networks",
            "resnet50,mobilenet_v2",
            "--batch",
            "32",
            "--fresh",
        ),
        120,
    ),
    "folded_latency": Part(
        (
            *("benchmarks/folded_latency.py", "--device", "cuda", "--networks", "resnet50,mobilenet_v2,vit_tiny"),
            *("--backends", "eager,cudagraph", "--batches", "1,64", "--seconds", "1", "--fresh"),
        ),
        120,
    ),
    "unified_latency": Part(
        ("benchmarks/unified_latency.py", "--device", "cuda", "--backends", "eager", "--rounds", "30", "--fresh"), 100
    ),
}


def main() -> int:
    """Run the parts that there is time for; 5 where there is no GPU, 1 where a part failed."""
    options = _options()
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 5
    end = time.monotonic() + options.seconds
    found: dict[str, Any] = {}
    for name in options.only.split(","):
        found[name] = run(PARTS[name], end - time.monotonic())
        print(f"{name}: {found[name]['ended']}, {found[name]['seconds']:.0f} s", flush=True)
        document = {"environment": environment(), "gpu": torch.cuda.get_device_name(), "parts": found}
        (HERE / "results" / "gpu_suite.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(any(part["ended"] not in ("done", "left out") for part in found.values()))


def run(part: Part, left: float) -> dict[str, Any]:
    """Run one part and return how it ended."""
    missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"ended": "left out", "seconds": 0.0, "why": f"{', '.join(missing)} is not installed"}
    if left < 10:
        return {"ended": "left out", "seconds": 0.0, "why": "no time was left"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *part.command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=min(part.seconds, left),
            check=False,
        )
        ended, output = ("done" if done.returncode == 0 else f"exit {done.returncode}"), done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        ended, output = "out of time", (error.stdout or b"").decode(errors="replace")
    return {"ended": ended, "seconds": time.monotonic() - start, "output": output[-2000:]}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="everything that needs a GPU")
    parser.add_argument("--seconds", type=float, default=460.0, help="of everything together (default 460)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
