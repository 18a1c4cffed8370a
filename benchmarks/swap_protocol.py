"""What both quality benchmarks of UnifiedNorm do: train, swap, reconstruct, fine-tune, fold, and measure on test data.

Every seed has a split, a network and batches of its own. Fine-tuning settings are chosen per variant on the validation
data of seed 0, learning rate first, then statistics; test data takes part in no choice. Records are written as they are
made, and a run that is started again goes on where it stopped; trained networks are kept in ``out/``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import swap_figure
import torch
from _environment import environment
from as_batch_norm import as_batch_norm
from pre_norm import MakeNorm, OverTokens
from swap_task import STATISTICS, Data, Setting, Task, evaluate, fine_tune, train
from torch import nn

import normfuse
from normfuse import norms
from normfuse.capture import capture
from normfuse.layers import UnifiedNorm
from normfuse.passes.swap_unified import Start, SwapUnified

HERE = Path(__file__).resolve().parent
RATES = (3e-4, 1e-3)


@dataclass(frozen=True)
class Variant:
    """What is fine-tuned: the norm, how it started, and whether the network was reconstructed before.

    Without a start the network is trained from scratch with that norm; ``"layer"`` is the original.
    """

    norm: str
    start: Start | None = None
    reconstructed: bool = False


VARIANTS: dict[str, Variant] = {
    "LayerNorm": Variant("layer"),
    "LayerNorm, trained on": Variant("layer", "copy"),
    "UnifiedNorm, copied": Variant("unified", "copy"),
    "UnifiedNorm, least squares": Variant("unified", "least-squares"),
    "UnifiedNorm, copied, reconstructed": Variant("unified", "copy", True),
    "UnifiedNorm, least squares, reconstructed": Variant("unified", "least-squares", True),
    "BatchNorm, least squares": Variant("batch", "least-squares"),
    "BatchNorm, least squares, reconstructed": Variant("batch", "least-squares", True),
    "BatchNorm, from scratch": Variant("batch"),
    "UnifiedNorm, from scratch": Variant("unified"),
}
ORIGINAL = "LayerNorm"


def options(task: str) -> argparse.Namespace:
    """Read the command line of a quality benchmark."""
    parser = argparse.ArgumentParser(description=f"{task}: LayerNorm to UnifiedNorm, fine-tuned and folded")
    parser.add_argument("--seeds", default="0,1,2", help="which seeds to run, seed 0 first (default 0,1,2)")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="names, separated by semicolons (default all)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / task, help="result files, without suffix")
    parser.add_argument("--kept", type=Path, default=HERE.parent / "out" / task, help="folder of trained networks")
    parser.add_argument("--fresh", action="store_true", help="forget what the result file holds")
    return parser.parse_args()


def run(task: Task, given: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing of a task, and return the result."""
    torch.set_num_threads(1)
    path = given.out.with_name(given.out.name + ".json")
    result: dict[str, Any] = {"trials": [], "chosen": {}, "runs": []}
    if path.exists() and not given.fresh:
        result = json.loads(path.read_text(encoding="utf-8"))
    result |= {"environment": environment(), "threads": 1, "metric": task.metric, "task": task.facts}
    given.kept.mkdir(parents=True, exist_ok=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in map(int, given.seeds.split(",")):
        seeded = Seeded(task, seed, given.kept)
        for name in given.variants.split(";"):
            if any((r["seed"], r["variant"]) == (seed, name) for r in result["runs"]):
                continue
            if VARIANTS[name].start and name not in result["chosen"]:
                for trial in _choose(Seeded(task, 0, given.kept) if seed else seeded, name, result):
                    print(f"seed 0  {name:<42} {trial['setting']}  validation {trial['validation']['loss']:.4f}")
                    _write(path, result)
            result["runs"].append(seeded.record(name, result["chosen"].get(name)))
            _write(path, result)
            print(swap_figure.line(result["runs"][-1], task.metric), flush=True)
    swap_figure.draw(given.out.with_name(given.out.name + ".png"), result)
    for line in swap_figure.table(result):
        print(line)
    return result


def _write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _choose(seeded: Seeded, name: str, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Try settings on validation data, the learning rate first, and enter the best into the result."""
    trials = [trial for trial in result["trials"] if trial["variant"] == name]

    def tried(setting: Setting) -> float:
        for trial in trials:
            if trial["setting"] == asdict(setting):
                return trial["validation"]["loss"]
        trials.append(seeded.trial(name, setting))
        result["trials"].append(trials[-1])
        return trials[-1]["validation"]["loss"]

    done = len(trials)
    best = min((Setting(lr) for lr in RATES), key=tried)
    if VARIANTS[name].norm != "layer":
        allowed = STATISTICS if VARIANTS[name].norm == "unified" else STATISTICS[:2]
        best = min((Setting(best.lr, statistics) for statistics in allowed), key=tried)
    result["chosen"][name] = asdict(best)
    yield from trials[done:]


class Seeded:
    """One seed of a task: its data, its original network, and what is made of that."""

    def __init__(self, task: Task, seed: int, kept: Path) -> None:
        self.task, self.seed, self.kept = task, seed, kept
        self.data: Data = task.data(seed)
        self.seconds: dict[str, float] = {}
        self.starts: dict[Variant, nn.Module] = {}

    def record(self, name: str, chosen: dict[str, Any] | None) -> dict[str, Any]:
        """Return all that is measured of a variant."""
        variant = VARIANTS[name]
        if variant.start is None:
            model, seconds = self.trained(variant.norm)
            found = {"steps": self.task.steps, "train_seconds": seconds}
        else:
            assert chosen is not None
            model = self.started(variant)
            found = {"steps": self.task.fine_tuning, "setting": chosen, "before": self._measured(model)}
            if variant.reconstructed:
                found["reconstruction_seconds"] = self.seconds[f"{variant.start} reconstruction"]
            found["train_seconds"] = fine_tune(model, self.data, self.task, Setting(**chosen), self.seed)
        found["after"] = self._measured(model)
        if variant.norm != "layer":
            found["folded"] = self._folded(model)
        return {"seed": self.seed, "variant": name, **found}

    def trial(self, name: str, setting: Setting) -> dict[str, Any]:
        """Fine-tune a variant with a setting, and return what the validation data says."""
        model = self.started(VARIANTS[name])
        fine_tune(model, self.data, self.task, setting, self.seed)
        validation = evaluate(model, self.data.validation)
        return {"variant": name, "seed": self.seed, "setting": asdict(setting), "validation": validation}

    def _measured(self, model: nn.Module) -> dict[str, Any]:
        return {split: evaluate(model.eval(), getattr(self.data, split)) for split in ("validation", "test")}

    def _folded(self, model: nn.Module) -> dict[str, Any]:
        """Fold, and return the test result, the largest difference of an output, and how many norms are left."""
        inputs = self.data.test.inputs[:16]
        folded = normfuse.fold(model, example_inputs=inputs)
        with torch.no_grad():
            expected, found = model(inputs), folded(inputs)
        difference = float((found - expected).abs().max() / expected.abs().max())
        left = len(norms.find_norms(capture(folded, inputs)))
        return {"test": evaluate(folded, self.data.test), "difference": difference, "norms_left": left}

    # networks

    def trained(self, norm: str) -> tuple[nn.Module, float]:
        """Return the network that was trained from scratch with a norm, and the CPU seconds that took."""
        torch.manual_seed(self.seed)
        model = self.task.build(self._make(norm))
        path = self.kept / f"seed{self.seed}-{norm}.pt"
        seconds = train(model.train(), self.data, self.task.steps, self.task.lr, self.seed, checkpoint=path)
        return model.eval(), seconds

    def _make(self, norm: str) -> MakeNorm:
        warmup = self.task.steps // 10
        return {
            "layer": nn.LayerNorm,
            "batch": OverTokens,
            "unified": lambda width: UnifiedNorm(
                width, warmup_steps=warmup, outlier_filtration=self.task.filtration, scaling_start=warmup
            ),
        }[norm]

    def started(self, variant: Variant) -> nn.Module:
        """Return a network to fine-tune, a copy for each call."""
        if variant not in self.starts:
            model, _ = self.trained("layer")
            if variant.norm != "layer":
                model = self._swapped(model, variant)
            self.starts[variant] = as_batch_norm(model, self.data.calibration) if variant.norm == "batch" else model
        return copy.deepcopy(self.starts[variant])

    def _swapped(self, original: nn.Module, variant: Variant) -> nn.Module:
        assert variant.start is not None
        calibration = self.data.calibration
        swap = SwapUnified(calibration, start=variant.start)
        model = normfuse.apply(original, [swap], example_inputs=calibration[0]).model
        if variant.reconstructed:
            self._reconstruct(original, model, variant.start)
        return model

    def _reconstruct(self, original: nn.Module, model: nn.Module, start: str) -> None:
        """Reconstruct in place; what it takes the first time is kept beside its checkpoint."""
        path = self.kept / f"seed{self.seed}-{start}.fit"
        before = time.process_time()
        normfuse.reconstruct(
            original, model, self.data.calibration, seed=self.seed, checkpoint=path, **self.task.reconstruction
        )
        note = path.with_suffix(".json")
        if not note.exists():
            note.write_text(json.dumps(time.process_time() - before), encoding="utf-8")
        self.seconds[f"{start} reconstruction"] = json.loads(note.read_text(encoding="utf-8"))
