"""Build TensorRT engines of real networks, ahead of time and without a GPU, in every precision, static and dynamic.

    python benchmarks/engines.py [--only GLOB] [--seconds 300] [--out benchmarks/results/engines]

Each network is folded, written and verified as ``normfuse export -o x.engine`` does it, with real pictures as
calibration data; the static engine is built from the same file with its batch fixed to 1. A row says how large the
engine is, how many layers it has, how many of those still compute a norm, and how far the file that it was built from
is from the float64 run of the source (by ONNX Runtime: nothing here runs an engine). Results that are in the file
already are not made again. ``OUT.jsonl`` gets one line per engine, ``OUT.md`` the table.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import real_networks
import torch
from _environment import environment, version
from torch import Tensor, nn

import normfuse
from normfuse.api import EXACT_PASSES
from normfuse.errors import NormfuseError
from normfuse.lowering import EngineInfo, EngineOptions, Numbers, export
from normfuse.lowering.profiles import ShapeRequest
from normfuse.lowering.tensorrt import build_engine

HERE = Path(__file__).resolve().parent
PRECISIONS = ("fp32", "fp16", "bf16", "mixed", "int8", "fp8")
TARGETS = ("sm_86", "sm_89", "sm_120")
FP8_TARGETS = ("sm_89", "sm_120")
BATCH = 8


def vit_tiny() -> nn.Module:
    """Return timm's ViT-tiny with random weights; no package of the index holds trained ones."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224").eval()


def vit_tiny_unified() -> nn.Module:
    """Return the same with each LayerNorm replaced by a norm that folds, fitted to the pictures."""
    return normfuse.swap_norms(vit_tiny(), "unified", calibration=[real_networks.batch()], progress=False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "EfficientNet-Lite0": real_networks.efficientnet_lite0,
    "MobileNetV2": real_networks.mobilenet_v2,
    "ViT-tiny": vit_tiny,
    "ViT-tiny, UnifiedNorm": vit_tiny_unified,
}


def main() -> None:
    """Build what is missing and write the two files."""
    parser = argparse.ArgumentParser(description="Engines of real networks in every precision")
    parser.add_argument("--only", default="*", help="pattern of NETWORK/PRECISION (commas separate several)")
    parser.add_argument("--seconds", type=float, default=300, help="start no further export after this (default 300)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "engines", help="result files, without suffix")
    options = parser.parse_args()
    lines, end = Path(f"{options.out}.jsonl"), time.monotonic() + options.seconds
    torch.set_num_threads(1)
    done = {(r["network"], r["precision"], r["folded"]) for r in read(lines)}
    for name, precision, folded in cases():
        wanted = any(fnmatch.fnmatch(f"{name}/{precision}", pattern) for pattern in options.only.split(","))
        if wanted and (name, precision, folded) not in done and time.monotonic() < end:
            for row in measure(name, precision, folded):
                with lines.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    Path(f"{options.out}.md").write_text(markdown(read(lines)), encoding="utf-8")


def cases() -> list[tuple[str, str, bool]]:
    """Return network, precision and whether it is folded; unfolded only in fp32, for comparison."""
    folded = [(name, precision, True) for precision in PRECISIONS for name in NETWORKS]
    return folded + [(name, "fp32", False) for name in NETWORKS]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measure(name: str, precision: str, folded: bool) -> list[dict[str, Any]]:
    """Return the rows of one network in one precision: the dynamic engine and the static one."""
    model, pictures = NETWORKS[name](), real_networks.batch()
    targets = FP8_TARGETS if precision == "fp8" else TARGETS
    shape = tuple(pictures.shape[1:])
    shapes = ShapeRequest({None: (1, *shape)}, {}, {None: (BATCH, *shape)})
    about = {"network": name, "precision": precision, "folded": folded, "targets": targets}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.engine")
        try:
            result = export(
                model,
                path,
                example_inputs=pictures[:1],
                fold_bn=folded,
                fold=_folder(pictures[:1]),
                precision=Numbers(precision, calibration=[p[None] for p in pictures], qdq="tensorrt"),  # type: ignore[arg-type]
                engine=EngineOptions(targets=targets, shapes=shapes, keep_onnx=True),
                num_inputs=2,
            )
        except NormfuseError as error:
            return [about | {"shapes": "dynamic", "error": str(error)}]
        fixed = _fixed(path.with_suffix(".onnx"))
        static = build_engine(fixed, Path(folder, "static.engine"), options=EngineOptions(targets=targets))
    assert result.engine is not None
    assert result.comparison is not None
    fidelity = {"cosine": result.comparison.cosine, "max_rel": result.comparison.max_rel}
    about |= fidelity | {"inputs_compared": result.comparison.inputs}
    return [
        about | {"shapes": "dynamic"} | _of(result.engine),
        about | {"shapes": "static"} | _of(static),
    ]


def _folder(example: Tensor) -> Callable[[nn.Module], Any]:
    return lambda model: normfuse.apply(model, EXACT_PASSES, example_inputs=example)


def _fixed(path: Path) -> Path:
    """Return the file with every axis of any size fixed to 1."""
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = 1
    del model.graph.value_info[:]
    onnx.save(model, path.with_name("static.onnx"))
    return path.with_name("static.onnx")


def _of(engine: EngineInfo) -> dict[str, Any]:
    sidecar = engine.sidecar
    norms = {norm for layer in sidecar.norm_layers for norm in layer["norms"]}
    return {
        "megabytes": round(engine.size_bytes / 1e6, 1),
        "layers": len(sidecar.layers),
        "norm_layers": len(sidecar.norm_layers),
        "norms": len(norms),
        "types": sorted(set(sidecar.dtypes.values())),
        "package": "{package} {version}".format(**sidecar.tensorrt),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the results as a table."""
    facts: Any = environment()
    built = [row for row in rows if "error" not in row]
    failed = [f"{row['network']} in {row['precision']}: {row['error']}" for row in rows if "error" in row]
    lines = [
        "# TensorRT engines of real networks, built ahead of time",
        "",
        f"{facts['date']}, {facts['processor']}, no GPU, tensorrt_rtx {version('tensorrt-rtx')}, "
        f"torch {facts['packages'].get('torch')}, onnx {facts['packages'].get('onnx')}.",
        "",
        f"{len(built)} engines for {', '.join(TARGETS)} (fp8: {', '.join(FP8_TARGETS)}); batch 1, or 1 to {BATCH}.",
        "The cosine and the largest difference, relative to the largest output, are those of the ONNX file that the",
        "engine was built from, run by ONNX Runtime, to the float64 run of the source. No engine was run.",
        "",
        "| network | precision | shapes | folded | MB | layers | with a norm | norms | cosine | max rel |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in built:
        folded = "yes" if r["folded"] else "no"
        lines.append(
            f"| {r['network']} | {r['precision']} | {r['shapes']} | {folded} | {r['megabytes']} "
            f"| {r['layers']} | {r['norm_layers']} | {r['norms']} | {r['cosine']:.5f} | {r['max_rel']:.1e} |"
        )
    lines += ["", "Not built:", "", *(f"- {text}" for text in failed)] if failed else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
