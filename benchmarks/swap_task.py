"""Train, evaluate and fine-tune the small transformers of ``pre_norm.py``: what a task is, and the loop.

A task is classification: of a picture, or of the next token at each place. One loop trains everything: AdamW, its
learning rate by one cycle; the same seed gives the same batches.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pre_norm import MakeNorm, OverTokens
from torch import Tensor, nn

from normfuse.layers import UnifiedNorm

WEIGHT_DECAY = 0.05
WARMUP = 5  # steps of fine-tuning before UnifiedNorm averages over its window
STATISTICS = ("fixed", "batch", "window")
"""What normalizes in fine-tuning: stored statistics; those of each batch; those of the last batches, filtered."""


class Examples(NamedTuple):
    """Inputs and what they should give: one label each, or one for every token."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """What one seed of a task works on; ``train(steps, seed)`` yields batches."""

    train: Callable[[int, int], Iterator[Examples]]
    validation: Examples
    test: Examples
    calibration: list[Tensor]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: Of the result file.
        metric: ``"accuracy"``, in percent, or ``"perplexity"``.
        build: Makes the network with a norm.
        data: Makes the data of a seed.
        steps: Of the training from scratch.
        lr: Its highest learning rate.
        filtration: Whether UnifiedNorm leaves outliers out of its window.
        reconstruction: Arguments of :func:`normfuse.reconstruct`.
        facts: What else the result file says of the task.
    """

    name: str
    metric: str
    build: Callable[[MakeNorm], nn.Module]
    data: Callable[[int], Data]
    steps: int
    lr: float
    filtration: bool
    reconstruction: dict[str, Any]
    facts: dict[str, Any]

    @property
    def fine_tuning(self) -> int:
        """Steps of fine-tuning: a tenth of the training."""
        return self.steps // 10


@dataclass(frozen=True)
class Setting:
    """How a network is fine-tuned."""

    lr: float
    statistics: str = "fixed"


def train(model: nn.Module, data: Data, steps: int, lr: float, seed: int, checkpoint: Path | None = None) -> float:
    """Train a network in the modes that its modules are in, and return the CPU seconds.

    With a checkpoint, the file is written as the training goes on, and an interrupted one goes on from it.
    """
    start, done = time.process_time(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if checkpoint and checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        done, start = kept["done"], start - kept["seconds"]
        for name, part in parts.items():
            part.load_state_dict(kept[name])
    for inputs, labels in itertools.islice(data.train(steps, seed), done, None):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()
        schedule.step()
        done += 1
        if checkpoint and (done % 100 == 0 or done == steps):
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"done": done, "seconds": time.process_time() - start, **states}, checkpoint)
    return time.process_time() - start


def fine_tune(model: nn.Module, data: Data, task: Task, setting: Setting, seed: int) -> float:
    """Train a network on for a tenth of the steps, in place; return the CPU seconds. It is in eval mode afterwards."""
    model.train()
    for module in model.modules():
        if isinstance(module, UnifiedNorm | OverTokens):
            module.train(setting.statistics != "fixed")
        if isinstance(module, UnifiedNorm):
            window = setting.statistics == "window"
            module.warmup_steps = WARMUP if window else task.steps
            module.outlier_filtration = window and task.filtration
            module.reset_step()
    seconds = train(model, data, task.fine_tuning, setting.lr, seed + 1000)
    model.eval()
    return seconds


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples) -> dict[str, float]:
    """Return mean cross-entropy, accuracy in percent, and perplexity of a network in eval mode."""
    loss, right, count = 0.0, 0, 0
    for inputs, labels in zip(examples.inputs.split(256), examples.labels.split(256), strict=True):
        logits = model(inputs).flatten(0, -2)
        loss += float(F.cross_entropy(logits, labels.flatten(), reduction="sum"))
        right += int((logits.argmax(1) == labels.flatten()).sum())
        count += labels.numel()
    return {"loss": loss / count, "accuracy": 100 * right / count, "perplexity": math.exp(loss / count)}
