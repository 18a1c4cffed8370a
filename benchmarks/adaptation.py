"""Accuracy of a classifier on corrupted digits, by where the statistics of its BatchNorms come from.

    python benchmarks/adaptation.py [--seeds 3] [--seconds S] [--fresh] [--out benchmarks/results]

A network is trained on 2500 MNIST digits and tested on the 2500 others, clean and corrupted (`_corruptions.py`), as
streams of batches of 64: shuffled, and ordered by class, as a camera sees things. Each method starts from the trained
network, adapts to each batch as it is tested on it, and keeps what it learned for the next batch of the same stream.
Writes ``adaptation.json`` with everything measured, and ``adaptation.png``. What the file holds is not measured again;
after ``--seconds`` no further corruption is started, and another run goes on. UnMix-TNS, whose components move slowly,
is also run on 8 such rounds of noisy digits one after the other.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics as stdlib_statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import _adaptation_figure as figure
import digits
import torch
from _corruptions import CORRUPTIONS
from _environment import environment
from digits import Digits
from torch import Tensor, nn

import normfuse.statistics as statistics

RESULTS = Path(__file__).resolve().parent / "results"
TRAINING, STEPS, ROUNDS, LONG, BATCH = 2500, 300, 1, 8, 64
RATE = 1e-2
"""Of SAR: a tenth of the rate of training. The authors' 2.5e-4 is for ResNet-50 on ImageNet, over 50000 pictures."""
ORDERS = ("shuffled", "class-ordered")


class Adapted:
    """A network that adapts without a step of its own: being called is all."""

    def __init__(self, adapt: Callable[[nn.Module], nn.Module]) -> None:
        self.adapt = adapt

    def __call__(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        adapted = self.adapt(model).eval()

        @torch.no_grad()
        def predict(images: Tensor) -> Tensor:
            return adapted(images)

        return predict


def sar(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return SAR on batch statistics, all norms trained: the network has no stage to leave out."""
    return statistics.SAR(model, _optimizer)


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9)


METHODS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "source": Adapted(lambda model: model),
    "batch": Adapted(statistics.batch_statistics),
    "alpha-BN 0.1": Adapted(statistics.alpha_bn),
    "alpha-BN 0.5": Adapted(lambda model: statistics.alpha_bn(model, 0.5)),
    "UnMix-TNS": Adapted(statistics.unmix_tns),
    "SAR": sar,
}


def main() -> int:
    """Run the seeds, write what was measured, draw it, print the means; return the exit status."""
    options = _options()
    torch.set_num_threads(1)
    try:
        data = digits.mnist()
    except ModuleNotFoundError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    path = options.out / "adaptation.json"
    runs = _read(path) if path.exists() and not options.fresh else {}
    start = time.monotonic()
    for seed in range(options.seeds):
        source: tuple[nn.Module, Digits] | None = None
        found = runs.setdefault(seed, {"seed": seed, "accuracy": {order: {} for order in ORDERS}})
        for name, order in itertools.product(CORRUPTIONS, ORDERS):
            if name in found["accuracy"][order]:
                continue
            if time.monotonic() - start > options.seconds:
                print("stopped; run it again for the rest")
                return 0
            source = source or trained(data, seed)
            found["accuracy"][order][name] = accuracies(name, order, *source, seed)
            _write(path, runs)
        if "by_round" not in runs[seed]:
            runs[seed]["by_round"] = by_round(*(source or trained(data, seed)), seed)
            _write(path, runs)
    figure.draw(options.out / "adaptation.png", [runs[seed] for seed in sorted(runs)])
    for line in table(means([runs[seed] for seed in sorted(runs)])):
        print(line)
    for seed in sorted(runs):
        print(f"UnMix-TNS, noise, class-ordered, seed {seed}, by round:", runs[seed]["by_round"])
    return 0


def _write(path: Path, runs: dict[int, Any]) -> None:
    ordered_runs = [runs[seed] for seed in sorted(runs)]
    complete = [run for run in ordered_runs if all(len(run["accuracy"][o]) == len(CORRUPTIONS) for o in ORDERS)]
    found = means(complete) if complete else {}
    document = {"environment": environment(), "settings": _settings(), "means": found}
    path.write_text(json.dumps({**document, "runs": ordered_runs}, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="accuracy on corrupted digits by the statistics of the norms")
    parser.add_argument("--seeds", type=int, default=3, help="networks, each with data of its own (default 3)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing later; what is measured is kept")
    parser.add_argument("--fresh", action="store_true", help="start over")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for what is measured")
    return parser.parse_args()


def _read(path: Path) -> dict[int, Any]:
    return {run["seed"]: run for run in json.loads(path.read_text(encoding="utf-8"))["runs"]}


def _settings() -> dict[str, Any]:
    return {"training": TRAINING, "steps": STEPS, "rounds": ROUNDS, "long": LONG, "batch": BATCH, "sar_rate": RATE}


def trained(data: Digits, seed: int) -> tuple[nn.Module, Digits]:
    """Return a network that was trained on one part of the digits, and the other part."""
    known, test = data.split(TRAINING, seed)
    return digits.pretrained(known, STEPS, seed), test


def accuracies(name: str, order: str, source: nn.Module, test: Digits, seed: int) -> dict[str, float]:
    """Test a network by every method on a stream of one corruption."""
    generator = torch.Generator().manual_seed(1000 * seed + list(CORRUPTIONS).index(name))
    rounds = [Digits(CORRUPTIONS[name](test.images, generator), test.labels) for _ in range(ROUNDS)]
    parts = [ordered(one, order, seed + 100 * turn) for turn, one in enumerate(rounds)]
    stream = Digits(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
    return {method: tested(make(copy.deepcopy(source)), stream) for method, make in METHODS.items()}


def by_round(source: nn.Module, test: Digits, seed: int) -> list[float]:
    """Return the accuracy of UnMix-TNS in each round of a long class-ordered stream of noisy digits."""
    predict = METHODS["UnMix-TNS"](copy.deepcopy(source))
    generator = torch.Generator().manual_seed(seed)
    noisy = [Digits(CORRUPTIONS["noise"](test.images, generator), test.labels) for _ in range(LONG)]
    return [tested(predict, ordered(one, "class-ordered", seed + 100 * turn)) for turn, one in enumerate(noisy)]


def ordered(data: Digits, order: str, seed: int) -> Digits:
    """Return the digits shuffled, or all of one class after all of another, the classes in random order."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(data.labels), generator=generator)
    if order == "class-ordered":
        rank = torch.randperm(10, generator=generator)
        index = index[rank[data.labels[index]].argsort(stable=True)]
    return Digits(data.images[index], data.labels[index])


def tested(predict: Callable[[Tensor], Tensor], stream: Digits) -> float:
    """Return the share of digits recognized, each in its batch, in the order of the stream."""
    right = sum(int((predict(images).argmax(1) == labels).sum()) for images, labels in _batches(stream))
    return right / len(stream.labels)


def _batches(stream: Digits) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(stream.images.split(BATCH), stream.labels.split(BATCH), strict=True)


def means(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return mean and standard deviation over the seeds, by order, corruption and method; and over the corruptions."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for order in ORDERS:
        found[order] = {}
        for name in (*CORRUPTIONS, "mean of the corrupted"):
            found[order][name] = {m: _spread([_of(run, order, name, m) for run in runs]) for m in METHODS}
    return found


def _of(run: dict[str, Any], order: str, corruption: str, method: str) -> float:
    by_name = run["accuracy"][order]
    names = [n for n in by_name if n != "clean"] if corruption not in by_name else [corruption]
    return stdlib_statistics.fmean(by_name[name][method] for name in names)


def _spread(values: list[float]) -> list[float]:
    deviation = stdlib_statistics.stdev(values) if len(values) > 1 else 0.0
    return [round(stdlib_statistics.fmean(values), 4), round(deviation, 4)]


def table(found: dict[str, dict[str, dict[str, list[float]]]]) -> Iterator[str]:
    """Yield the lines of a table of means and deviations in per cent."""
    for order, by_name in found.items():
        yield f"\n{order:<24}" + "".join(f"{method:>17}" for method in METHODS)
        for name, by_method in by_name.items():
            yield f"  {name:<22}" + "".join(f"{100 * m:>11.1f} ±{100 * s:>4.1f}" for m, s in by_method.values())


if __name__ == "__main__":
    raise SystemExit(main())
