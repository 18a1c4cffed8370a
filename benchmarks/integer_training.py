"""Train networks from scratch on integers: what does it cost in accuracy, beside floating point?

    python benchmarks/integer_training.py [--only resnet/shiftquant-*] [--seconds 300] [--figure]

MNIST, 3000 digits to train and 2000 to test, three seeds (each another split, start and order). Every product of every
convolution and linear layer runs on operands of 8, 6 or 4 bits, forward and backward, and so do the L1 norms:

    float-l2      floating point, BatchNorm or LayerNorm
    float         floating point, L1 norms
    per-tensor    one scale for each operand
    shiftquant    scales a power of two apart, 4 groups along the axis of the sum
    per-channel   a scale for each index of that axis: what no grouping can do better than; not a plain integer product

Each run is written to the result file when it is done, and is not run again: stop and go on as you like. A run whose
values stop being finite is counted as diverged, and its accuracy is that of guessing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import normfuse
from benchmarks import digits
from benchmarks._environment import environment
from benchmarks._integer_nets import ResNet, batch_norm, layer_norm
from benchmarks._per_channel import per_channel
from benchmarks.pre_norm import ViT

OUT = Path(__file__).resolve().parent / "results" / "integer_training.json"
SEEDS = (0, 1, 2)
TRAIN = 3000
GROUPS = 4
STEPS = {"resnet": 160, "vit": 300}
BITS = {"resnet": (8, 6, 4), "vit": (8, 6)}
BASELINES = ("per-tensor", "per-channel")
METHODS = ("per-tensor", "shiftquant", "per-channel")
CHANCE = 0.1
PUBLISHED = {"resnet": {4: 0.92}, "vit": {6: 0.61}}
"""Loss of accuracy in points that arXiv 2411.10948 states in its abstract, for its own networks and data."""


def names() -> list[str]:
    """Return every run but for its seed, ``"resnet/shiftquant-4"``, the most telling first."""
    found = []
    for net, widths in BITS.items():
        found += [(0, f"{net}/float-l2"), (0, f"{net}/float")]
        found += [(1, f"{net}/shiftquant-{bits}") for bits in widths]
        found += [(2 + (bits != min(widths)), f"{net}/{method}-{bits}") for method in BASELINES for bits in widths]
    return [name for _, name in sorted(found, key=lambda pair: pair[0])]


def build(net: str, variant: str) -> nn.Module:
    """Return an untrained network whose products and norms are as the variant says."""
    method, _, number = (
        variant.rpartition("-") if variant[-1:].isdigit() and variant != "float-l2" else (variant, "", "")
    )
    bits = int(number) if number else None
    groups = GROUPS if method == "shiftquant" else 1
    if net == "resnet":
        model: nn.Module = ResNet(nn.BatchNorm2d if method == "float-l2" else batch_norm(bits, groups))
    else:
        norm = nn.LayerNorm if method == "float-l2" else layer_norm(bits, groups)
        model = ViT(norm, width=64, depth=2, patch=7)
    if bits is None:
        return model
    if method == "per-channel":
        return per_channel(model, bits)
    return normfuse.quantize(model, "shiftquant", bits=bits, groups=groups, example_inputs=torch.rand(2, 1, 28, 28))


def train(net: str, variant: str, seed: int) -> dict[str, Any]:
    """Return what one run measured."""
    known, unseen = digits.mnist().split(TRAIN, seed)
    torch.manual_seed(seed)
    model, steps = build(net, variant).train(), STEPS[net]
    if net == "resnet":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    warm = steps // 10
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, cosine], [warm])
    start, losses = time.process_time(), []
    for images, labels in known.batches(steps, seed):
        optimizer.zero_grad()
        try:
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
        except ValueError as error:  # a quantizer has no grid for values that are not finite
            if "NaN or infinity" not in str(error):
                raise
            return {"accuracy": CHANCE, "diverged_at": len(losses), "seconds": time.process_time() - start}
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.process_time() - start
    final = statistics.fmean(losses[-10:])
    accuracy = digits.accuracy(model.eval(), unseen)
    return {"accuracy": accuracy, "loss": final, "seconds": seconds}


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Return mean and spread over the seeds, and the mean loss of accuracy beside ``float`` of the same seeds."""
    table: dict[str, Any] = {}
    for name in names():
        seeds = [seed for seed in SEEDS if f"{name}/{seed}" in runs]
        if not seeds:
            continue
        scores = [100 * runs[f"{name}/{seed}"]["accuracy"] for seed in seeds]
        base = f"{name.partition('/')[0]}/float"
        losses = [
            100 * (runs[f"{base}/{seed}"]["accuracy"] - runs[f"{name}/{seed}"]["accuracy"])
            for seed in seeds
            if f"{base}/{seed}" in runs
        ]
        table[name] = {
            "accuracy": statistics.fmean(scores),
            "range": [min(scores), max(scores)],
            "loss_points": statistics.fmean(losses) if losses else None,
            "seeds": len(seeds),
            "diverged": sum("diverged_at" in runs[f"{name}/{seed}"] for seed in seeds),
        }
    return table


def main() -> None:
    """Run what is missing, write it, and draw."""
    parser = argparse.ArgumentParser(description="train on integers")
    parser.add_argument("--only", default="*", help="glob of runs without their seed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--figure", action="store_true", help="draw only")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"runs": {}}
    started = time.perf_counter()
    chosen = [name for name in names() if fnmatch.fnmatchcase(name, options.only) and not options.figure]
    for name in chosen:
        for seed in SEEDS:
            key = f"{name}/{seed}"
            if key in found["runs"]:
                continue
            if time.perf_counter() - started > options.seconds:
                return
            found["runs"][key] = run = train(name.partition("/")[0], name.partition("/")[2], seed)
            loss = f"loss {run['loss']:.3f}" if "loss" in run else f"diverged at step {run['diverged_at']}"
            print(f"{key:<28} {run['accuracy']:.1%}  {loss}  {run['seconds']:.0f} s", flush=True)
            write(options.out, found["runs"])
    draw(options.out)


def write(path: Path, runs: dict[str, Any]) -> None:
    """Write the result file: protocol, runs, and the table that is read."""
    protocol = {"train": TRAIN, "test": 5000 - TRAIN, "batch": digits.BATCH, "steps": STEPS, "groups": GROUPS}
    protocol["published_loss_points"] = PUBLISHED
    document = {"environment": environment(), "protocol": protocol, "table": summary(runs), "runs": runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def draw(path: Path) -> None:
    """Draw the loss of accuracy over the bits, with the published figure beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    table = json.loads(path.read_text(encoding="utf-8"))["table"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, (net, widths) in zip(axes, BITS.items(), strict=True):
        for method, marker in zip(METHODS, "ovs", strict=True):
            points = [(bits, table[f"{net}/{method}-{bits}"]) for bits in widths if f"{net}/{method}-{bits}" in table]
            axis.plot([b for b, _ in points], [p["loss_points"] for _, p in points], marker=marker, label=method)
        for bits, loss in PUBLISHED[net].items():
            axis.plot([bits], [loss], "k*", label="published (other networks)")
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(title=net, xlabel="bits", xticks=widths)
        axis.invert_xaxis()
        axis.legend(fontsize=8)
    axes[0].set_ylabel("accuracy lost to floating point, points")
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
