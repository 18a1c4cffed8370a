"""What one training step costs: time, bytes saved for backward, peak memory; and whether it computes Eval's gradients.

Time is process CPU time on a CPU, which other processes disturb less than the clock on the wall, and the time between
events on a GPU. All variants take one step per round, in an order that rotates; a ratio is taken within a round. The
optimizer's step is the same in every mode and not included.

Bytes saved are those of the distinct storages that autograd keeps between forward and backward, without the model's
parameters and buffers. The peak is that of everything allocated during a step, what a mode keeps from step to step
included, above what was allocated before its first step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tune_modes import BASELINES, Variant
from tune_networks import Batch

from normfuse.latency import memory

Mark = Any  # a time, or an event on a GPU


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the rounds: median, quartiles, and range."""

    median: float
    low: float
    high: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return the spread of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high, min(values), max(values))


# time


def step_times(variants: Mapping[str, Variant], batch: Batch, rounds: int, warmup: int = 2) -> dict[str, Any]:
    """Return, by mode, the spread of forward, backward and both in seconds, and of the ratios to the baselines."""
    names = list(variants)
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            steps[name].append(_step(variants[name], batch))
    kept = {name: values[warmup:] for name, values in steps.items()}
    return {name: _summary(values, kept) for name, values in kept.items()}


def _step(made: Variant, batch: Batch) -> tuple[float, float]:
    on_gpu = next(made.model.parameters()).is_cuda
    mark = _event if on_gpu else time.process_time
    start: Mark = mark()
    loss = made.loss(batch)
    middle: Mark = mark()
    loss.backward()
    end: Mark = mark()
    if on_gpu:
        end.synchronize()
        seconds = 1e-3 * start.elapsed_time(middle), 1e-3 * middle.elapsed_time(end)
    else:
        seconds = middle - start, end - middle
    made.clear()
    return seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _summary(values: Sequence[tuple[float, float]], all_steps: Mapping[str, Sequence[tuple[float, float]]]) -> Any:
    totals = [sum(value) for value in values]
    found = {
        "seconds": asdict(Spread.of(totals)),
        "forward": asdict(Spread.of([forward for forward, _ in values])),
        "backward": asdict(Spread.of([backward for _, backward in values])),
    }
    for baseline in BASELINES:
        ratios = [total / sum(base) for total, base in zip(totals, all_steps[baseline], strict=True)]
        found[f"to_{baseline}"] = asdict(Spread.of(ratios))
    return found


# memory


def saved_bytes(made: Variant, batch: Batch) -> int:
    """Return the bytes that autograd keeps for backward, without the model's parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*made.model.parameters(), *made.model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = made.loss(batch)
    loss.backward()
    made.clear()
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def peak_bytes(made: Variant, batch: Batch) -> int:
    """Return the peak of what two steps allocate, gradients included."""

    def two_steps() -> None:
        for _ in range(2):
            made.loss(batch).backward()
            made.clear()

    return memory.peak_bytes(two_steps, on_gpu=next(made.model.parameters()).is_cuda)


# correctness


def difference(made: Variant, reference: Variant, batch: Batch) -> dict[str, float]:
    """Return the largest relative differences of the loss and of a parameter's gradient.

    Deploy has other parameters: its gradient of the images is compared instead.
    """
    if made.mode == "deploy":
        losses, (ours, theirs) = zip(*(_image_gradients(one, batch) for one in (made, reference)), strict=True)
        return {"loss": _relative(*losses), "gradient": max(map(_relative, ours, theirs))}
    (loss, ours), (other, theirs) = (_gradients(one, batch) for one in (made, reference))
    if ours.keys() != theirs.keys():
        raise ValueError(f"{made.mode} trains other parameters: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    return {"loss": _relative(loss, other), "gradient": max(_relative(ours[name], theirs[name]) for name in theirs)}


def _gradients(made: Variant, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = made.loss(batch)
    loss.backward()
    found = made.gradients()
    made.clear()
    return loss.detach(), found


def _image_gradients(made: Variant, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    batch = batch.image_gradients()
    images = [batch.images] if isinstance(batch.images, Tensor) else batch.images
    loss = made.loss(batch)
    return loss.detach(), list(torch.autograd.grad(loss, images))


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny))
