"""Latency of a transformer with its norms, with UnifiedNorm, folded, and with no norm at all, which is the limit.

    python benchmarks/unified_latency.py [--cases vit-1,decode-1] [--backends eager,compiled,onnxruntime] [--rounds 40]
        [--device cpu|cuda] [--out benchmarks/results/unified_latency-cpu]

Cases are a ViT-tiny of timm on 224x224 pictures, and one step of decoding with 128 tokens before it, each for one
sequence and for more. All variants of a case take turns, one call each per round; ratios are within a round. Time is
process CPU time on one thread, or the clock around a synchronized call on a GPU, where the peak of allocated memory is
recorded too. Every variant is compared with the one it should equal before it is timed. ``OUT.json`` gets one record
per case and backend; those that the file holds already stay, unless ``--fresh``.

Published for the method (arXiv 2208.01313): 31 % faster inference and 18 % less memory on a GPU; which GPU, batch and
model is not known.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import latency_figure
import latency_networks
import torch
from _environment import environment
from _timing import latency, turns
from latency_networks import CASES, LIMIT, Case
from torch import nn

from normfuse.lowering import onnxruntime
from normfuse.lowering.onnx import export_onnx

HERE = Path(__file__).resolve().parent
BACKENDS = ("eager", "compiled", "onnxruntime")
DEFAULT = {"cpu": "decode-1,decode-16,vit-1,vit-8", "cuda": "decode-1,decode-16,vit-1,vit-64"}
TOLERANCE = 1e-4  # in float32, relative to the largest output
Call = Callable[[], Any]


def main() -> None:
    """Measure what is missing, print, and write the result files."""
    options = _options()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    device = torch.device(options.device)
    out = options.out or HERE / "results" / f"unified_latency-{device.type}"
    path = out.with_name(out.name + ".json")
    records = [] if options.fresh or not path.exists() else json.loads(path.read_text(encoding="utf-8"))["records"]
    for name in options.cases.split(","):
        for backend in options.backends.split(","):
            if any((r["case"], r["backend"]) == (name, backend) for r in records):
                continue
            records += measured(CASES[name], backend, device, options.rounds)
            _write(path, records, device)
            for record in records:
                if (record["case"], record["backend"]) == (name, backend):
                    print(_line(record), flush=True)
    latency_figure.draw(out.with_name(out.name + ".png"), records)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="latency with norms, folded, and without any")
    parser.add_argument("--cases", help=f"some of {', '.join(CASES)} (default: as the device bears)")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="result files, without suffix")
    parser.add_argument("--fresh", action="store_true", help="forget what the result file holds")
    options = parser.parse_args()
    options.cases = options.cases or DEFAULT[options.device]
    return options


def measured(case: Case, backend: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return one record per variant of a case on a backend."""
    torch._dynamo.reset()
    models = {name: model.to(device) for name, model in latency_networks.variants(case).items()}
    inputs = tuple(value.to(device) for value in case.inputs())
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        _require_equal(models, inputs)
        made = {
            name: _call(model, inputs, backend, Path(folder) / f"{n}.onnx")
            for n, (name, model) in enumerate(models.items())
        }
        _require_outputs({name: call for name, (call, _) in made.items()}, models, inputs)
        calls = {name: _repeated(call, case) for name, (call, _) in made.items()}
        times = turns(calls, rounds=rounds, warmup=5, clock=_cuda_clock if device.type == "cuda" else time.process_time)
        peaks = {name: _peak(call) for name, call in calls.items()} if device.type == "cuda" else {}
    found = []
    for name, values in times.items():
        one = latency([value / case.calls for value in values], [value / case.calls for value in times[LIMIT]])
        record = {"case": case.name, "backend": backend, "variant": name, **asdict(one), **made[name][1]}
        record["to_norm"] = {
            norm: latency(values, times[norm]).ratio for norm in times if norm in latency_networks.ORIGINALS
        }
        found.append(record | ({"peak_bytes": peaks[name]} if peaks else {}))
    return found


def _repeated(call: Call, case: Case) -> Call:
    """Return what calls so often that a measurement takes milliseconds."""

    def repeat() -> None:
        for _ in range(case.calls):
            call()

    return repeat


def _call(model: nn.Module, inputs: tuple[torch.Tensor, ...], backend: str, path: Path) -> tuple[Call, dict[str, int]]:
    """Return what runs a model once on a backend, and facts of it."""
    if backend == "onnxruntime":
        export_onnx(copy.deepcopy(model).cpu(), path, tuple(value.cpu() for value in inputs))
        providers = ["CUDAExecutionProvider"] if inputs[0].is_cuda else ["CPUExecutionProvider"]
        opened = onnxruntime.session(path, threads=1, providers=providers)
        return onnxruntime.runner(opened, tuple(value.cpu() for value in inputs)), {"nodes": _nodes(path)}
    if backend == "compiled":
        compiled = torch.compile(copy.deepcopy(model), dynamic=False)
        return lambda: compiled(*inputs), {}
    return lambda: model(*inputs), {}


def _nodes(path: Path) -> int:
    import onnx

    return len(onnx.load(path).graph.node)


def _require_equal(models: dict[str, nn.Module], inputs: tuple[torch.Tensor, ...]) -> None:
    """Check the folded network against the one with UnifiedNorm."""
    expected, found = models["UnifiedNorm"](*inputs), models["folded"](*inputs)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < TOLERANCE:
        raise AssertionError(f"the folded network differs by {difference:.1e}")


def _require_outputs(calls: dict[str, Call], models: dict[str, nn.Module], inputs: tuple[torch.Tensor, ...]) -> None:
    """Check what each backend computes against the model itself."""
    for name, call in calls.items():
        expected, found = models[name](*inputs), call()
        found = found[0] if isinstance(found, tuple) else found
        difference = float((found.to(expected) - expected).abs().max() / expected.abs().max())
        if not difference < 10 * TOLERANCE:
            raise AssertionError(f"{name} differs by {difference:.1e} from what it should compute")


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak(call: Call) -> int:
    """Return the most memory that a call allocates, the weights included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _line(record: dict[str, Any]) -> str:
    ratios = "  ".join(f"{ratio:.3f} x {norm}" for norm, ratio in record["to_norm"].items())
    nodes = f"  {record['nodes']} nodes" if "nodes" in record else ""
    spread = f"{1e3 * record['median']:8.3f} ms ({1e3 * record['low']:.3f} to {1e3 * record['high']:.3f})"
    start = f"{record['case']:<10} {record['backend']:<12} {record['variant']:<22}"
    return f"{start} {spread}  {record['ratio']:.3f} x {LIMIT}  {ratios}{nodes}"


def _write(path: Path, records: list[dict[str, Any]], device: torch.device) -> None:
    facts = {
        "environment": environment(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "clock": "wall clock, synchronized" if device.type == "cuda" else "process CPU time",
        "threads": 1,
        "published": {"speed_up": 0.31, "memory_reduction": 0.18, "source": "arXiv 2208.01313, on a GPU"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | {"records": records}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
