"""What folding buys, network by network and backend by backend: ``normfuse.latency`` on six networks.

    python benchmarks/folded_latency.py [--networks resnet50,minilm] [--backends eager,compile,onnxruntime]
        [--batches 1] [--seconds 4] [--device cpu|cuda] [--out benchmarks/results/folded_latency-cpu]

Weights are random, and the statistics of the norms those of random pictures: latency does not depend on them. MiniLM
has no norm with a fixed map; it shows what moving the gains of its LayerNorms buys. ``OUT.json`` gets the rows of a
network as soon as they are measured; networks that it holds are skipped, unless ``--fresh``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import timm
import torch
import torchvision
from _environment import environment
from torch import Tensor, nn

from normfuse import latency
from normfuse.latency import Benchmark, Row, Spread
from normfuse.latency.plot import plot

HERE = Path(__file__).resolve().parent


def _picture() -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)


def _sentence() -> dict[str, Tensor]:
    import sentences  # needs transformers

    return sentences.tokenized(["A folded network computes what the unfolded one computes, with less to do."], 1)[0]


def _minilm() -> nn.Module:
    import sentences

    return sentences.minilm()


Build = tuple[Callable[[], nn.Module], Callable[[], Any]]
NETWORKS: dict[str, Build] = {
    "resnet50": (torchvision.models.resnet50, _picture),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, _picture),
    "densenet121": (torchvision.models.densenet121, _picture),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224"), _picture),
    "repvgg_a0": (lambda: timm.create_model("repvgg_a0"), _picture),
    "minilm": (_minilm, _sentence),
}


def main() -> None:
    """Measure what is missing, print, and write the result files."""
    options = _options()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    out = options.out or HERE / "results" / f"folded_latency-{options.device}"
    path = out.with_name(out.name + ".json")
    document = {} if options.fresh or not path.exists() else json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = document.get("rows", [])
    notes: list[str] = document.get("notes", [])
    for name in options.networks.split(","):
        if any(row["model"] == name for row in rows):
            continue
        found = measured(name, options)
        rows += [row.to_dict() for row in found.rows]
        notes += found.notes
        _write(path, {"environment": environment(), "threads": 1, "rows": rows, "notes": notes})
        print("\n".join("  ".join(f"{cell:>10}" for cell in cells) for cells in found.table()), *found.notes, sep="\n")
    plot(Benchmark(tuple(map(_row, rows)), ()), out.with_name(out.name + ".png"))


def measured(name: str, options: argparse.Namespace) -> Benchmark:
    """Return the rows of one network."""
    build, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model, example = build().to(options.device), inputs()
    _settle(model, example, options.device)
    given = (
        tuple(t.to(options.device) for t in example)
        if isinstance(example, tuple)
        else {key: value.to(options.device) for key, value in example.items()}
    )
    on = options.backends.split(",") if options.backends else None
    batches = [int(size) for size in options.batches.split(",")]
    return latency.measure(model.eval(), given, name=name, on=on, batches=batches, seconds=options.seconds)


def _settle(model: nn.Module, example: Any, device: str) -> None:
    """Give BatchNorms the statistics of the example, so that no value overflows or vanishes on its way."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.cat([example[0], -example[0]]).to(device))


def _row(row: dict[str, Any]) -> Row:
    """Return as much of a stored row as the figure shows."""
    ratio = Spread(row["ratio"]["median"], row["ratio"]["low"], row["ratio"]["high"], 0, 0, 0, row["samples"])
    named = {key: row[key] for key in ("model", "variant", "backend", "precision", "batch", "noise", "max_rel")}
    return Row(**named, seconds=ratio, ratio=ratio, peak_bytes=None, nodes=None, norms=None)


def _write(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="latency of networks, unfolded and folded")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--backends", help="default: all that are here")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each variant (default 4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="result files, without suffix")
    parser.add_argument("--fresh", action="store_true", help="forget what the result file holds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
