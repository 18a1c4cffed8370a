"""Fine-tune one network in four modes on the same batches: how far they part from Eval, and what they keep.

    python benchmarks/fine_tune.py [--seeds 3] [--steps 100] [--out benchmarks/results]

A network that was trained on one set of digits is fine-tuned on another (``digits.py``). After every step the models
are compared by the weights that they would have when folded, ``a W`` and ``beta - a mean``, which all of them have. For
a measure of what rounding alone does, Eval runs a second time with every parameter moved by its last bit. The folder
gets ``fine_tune.json`` with everything measured, and ``fine_tune.png``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import _fine_tune_figure as figure
import digits
import torch
import torch.nn.functional as F
from _environment import environment
from digits import Digits, Net
from torch import Tensor, nn

import normfuse

OUT = Path(__file__).resolve().parent / "results"
LEARNING_RATE, MOMENTUM = 0.02, 0.9
PRETRAINING = 2500  # digits
FINE_TUNING = 400


def eval_mode(model: nn.Module) -> nn.Module:
    """Put the norms into eval mode, and the rest into training mode."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@torch.no_grad()
def nudged_eval_mode(model: nn.Module) -> nn.Module:
    """Move every parameter by one unit in the last place, away from zero, and put the norms into eval mode."""
    for parameter in model.parameters():
        parameter.copy_(torch.nextafter(parameter, 2 * parameter))
    return eval_mode(model)


MODES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "train": lambda model: model.train(),
    "eval": eval_mode,
    "eval, last bit": nudged_eval_mode,
    "tune": lambda model: normfuse.tune_mode(model).train(),
    "deploy": lambda model: normfuse.fold(model.eval()),
}


def main() -> int:
    """Run every seed, print the table, draw the picture; return the exit status."""
    options = _options()
    torch.set_num_threads(1)
    try:
        mnist, scanned = digits.mnist(), digits.scanned()
    except ModuleNotFoundError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    runs = [_run(mnist, scanned, seed, options) for seed in range(options.seeds)]
    for line in summary(runs):
        print(line)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": options.steps, "pretraining_steps": options.pretraining_steps, "rate": LEARNING_RATE}
    document = {"environment": environment(), "settings": settings | {"momentum": MOMENTUM}, "runs": runs}
    (options.out / "fine_tune.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    path = figure.draw(options.out / "fine_tune.png", runs)
    print(f"\nCurves: {os.path.relpath(path)}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fine-tune one network in four modes")
    parser.add_argument("--seeds", type=int, default=3, help="networks, each with batches of its own (default 3)")
    parser.add_argument("--steps", type=int, default=100, help="steps of fine-tuning (default 100)")
    parser.add_argument("--pretraining-steps", type=int, default=200, help="steps of training before (default 200)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for what is measured")
    return parser.parse_args()


def _run(mnist: Digits, scanned: Digits, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain one network and fine-tune it in every mode, in float32 and in float64; return what was measured."""
    known, unseen = mnist.split(PRETRAINING, seed)
    train, test = scanned.split(FINE_TUNING, seed)
    source = digits.pretrained(known, options.pretraining_steps, seed)
    squares = squared_scales(source)
    start = {"mnist": digits.accuracy(source, unseen), "scanned": digits.accuracy(source, test)}
    print(
        f"seed {seed}: pretrained; {start['mnist']:.1%} of unseen MNIST, {start['scanned']:.1%} of the scanned digits"
    )
    batches = list(train.batches(options.steps, seed))
    return {
        "seed": seed,
        "pretrained": start,
        "squared_scales": {"least": squares.min().item(), "largest": squares.max().item()},
        "saved_bytes": {mode: saved_bytes(_in_mode(source, mode, torch.float32), batches[0]) for mode in MODES},
        "float32": fine_tune(source, batches, torch.float32, test),
        "float64": fine_tune(source, batches, torch.float64, test),
    }


def _in_mode(source: nn.Module, mode: str, dtype: torch.dtype) -> nn.Module:
    return MODES[mode](copy.deepcopy(source).to(dtype))


def fine_tune(source: Net, batches: Sequence[Digits], dtype: torch.dtype, test: Digits) -> dict[str, dict[str, Any]]:
    """Train a copy of the network in each mode, all on the same batch at each step.

    Returns:
        For each mode the losses, the shares of test digits recognized before the first step and every tenth of the way,
        and the differences to Eval after each step: of the effective weights, relative to their norm.
    """
    models = {mode: _in_mode(source, mode, dtype) for mode in MODES}
    settings: dict[str, Any] = {"lr": LEARNING_RATE, "momentum": MOMENTUM}
    optimizers = {mode: torch.optim.SGD(model.parameters(), **settings) for mode, model in models.items()}
    found: dict[str, dict[str, Any]] = {mode: {"loss": [], "accuracy": [], "difference": []} for mode in MODES}
    every = max(5, len(batches) // 10)
    for number, batch in enumerate(batches):
        for mode, model in models.items():
            if number % every == 0:
                found[mode]["accuracy"].append([number, _tested(model, test)])
            found[mode]["loss"].append(_step(model, optimizers[mode], batch))
        target = effective_weights(models["eval"])
        for mode, model in models.items():
            difference = (effective_weights(model) - target).norm() / target.norm()
            found[mode]["difference"].append(difference.item())
    for mode, model in models.items():
        found[mode]["accuracy"].append([len(batches), _tested(model, test)])
    return found


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Digits) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch.images.to(next(model.parameters()).dtype)), batch.labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def _tested(model: nn.Module, test: Digits) -> float:
    return digits.accuracy(copy.deepcopy(model).eval(), test)


@torch.no_grad()
def effective_weights(model: nn.Module) -> Tensor:
    """Return what the network multiplies by and adds, its norms folded by the formula, as one vector in float64."""
    found: list[Tensor] = []
    for block in model.get_submodule("blocks").children():
        conv, norm = block.get_submodule("conv"), block.get_submodule("norm")
        assert isinstance(conv, nn.Conv2d)
        if isinstance(norm, nn.BatchNorm2d):
            scale = _scale(norm)
            found += [conv.weight.double() * scale[:, None, None, None], _shift(norm, scale)]
        else:
            found += [conv.weight.double(), conv.bias.double()]  # type: ignore[union-attr]
    found += [parameter.double() for parameter in model.get_submodule("head").parameters()]
    return torch.cat([tensor.flatten() for tensor in found])


def _scale(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    return norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()


def _shift(norm: nn.BatchNorm2d, scale: Tensor) -> Tensor:
    assert norm.running_mean is not None
    return norm.bias.double() - scale * norm.running_mean.double()


@torch.no_grad()
def squared_scales(model: nn.Module) -> Tensor:
    """Return ``a^2`` of every channel: how far Eval and Tune step where Deploy steps 1."""
    return torch.cat([_scale(module) ** 2 for module in model.modules() if isinstance(module, nn.BatchNorm2d)])


def saved_bytes(model: nn.Module, batch: Digits) -> int:
    """Return how much memory is kept for backward beside parameters and buffers, each part of it counted once."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    kept: dict[int, Tensor] = {}  # which keeps their memory from being used again

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(batch.images), batch.labels)
    del loss
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def summary(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of modes as lines of Markdown: median and range of the accuracy, largest differences."""
    lines = [
        "",
        "| mode | kept for backward | accuracy | difference to Eval: first step | last step | last step, float64 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for mode in MODES:
        kept = f"{runs[0]['saved_bytes'][mode] / 2**20:.2f} MiB"
        ends = [run["float32"][mode]["accuracy"][-1][1] for run in runs]
        share = f"{statistics.median(ends):.1%} ({min(ends):.1%} to {max(ends):.1%})"
        first, last, exact = (
            max(run[dtype][mode]["difference"][at] for run in runs)
            for dtype, at in (("float32", 0), ("float32", -1), ("float64", -1))
        )
        lines.append(f"| {mode.capitalize()} | {kept} | {share} | {first:.1e} | {last:.1e} | {exact:.1e} |")
    least = min(run["squared_scales"]["least"] for run in runs)
    largest = max(run["squared_scales"]["largest"] for run in runs)
    return [*lines, "", f"a^2, over all channels: {least:.2g} to {largest:.2g}"]


if __name__ == "__main__":
    sys.exit(main())
