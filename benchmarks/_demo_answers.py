"""What networks say about the pictures, before and after folding, as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from real_networks import LABELS, PICTURE_CLASSES
from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """The outputs for all pictures, (N, C): of the source in PyTorch, and of both ONNX files in ONNX Runtime.

    Attributes:
        exact: The source in float64.
        source: The source as it is.
        unfolded: The file that keeps every BatchNormalization.
        folded: The file of the folded network.
    """

    exact: Tensor
    source: Tensor
    unfolded: Tensor
    folded: Tensor

    def errors(self) -> dict[str, float]:
        """Return the largest differences to the float64 run, relative to the largest output."""
        runs = {"PyTorch": self.source, "ONNX, unfolded": self.unfolded, "ONNX, folded": self.folded}
        scale = float(self.exact.abs().max())
        return {name: float((run.double() - self.exact).abs().max()) / scale for name, run in runs.items()}


def labels(outputs: Outputs) -> list[str]:
    """Return a table of the likeliest class of each picture."""
    runs = (outputs.source, outputs.unfolded, outputs.folded)
    rows = zip(PICTURE_CLASSES, *(likeliest(run) for run in runs), strict=True)
    return table(("picture", "PyTorch", "ONNX, unfolded", "ONNX, folded"), list(rows))


def likeliest(logits: Tensor) -> list[str]:
    """Return name and probability of the likeliest class of each row: ``"tripod 94.8 %"``."""
    values, classes = logits.softmax(1).max(1)
    pairs = zip(classes.tolist(), values.tolist(), strict=True)
    return [f"{LABELS.get(number, f'class {number}')} {100 * value:.1f} %" for number, value in pairs]


def similarities(outputs: Outputs) -> list[str]:
    """Return a table of cosine similarities: of each embedding to its source, and to that of the nearest picture."""
    runs = (outputs.source, outputs.unfolded, outputs.folded)
    same = [torch.cosine_similarity(run.double(), outputs.source.double()) for run in runs[1:]]
    columns = [[f"{value:.8f}" for value in values.tolist()] for values in same]
    nearest = [_nearest(run.double()) for run in (outputs.source, outputs.folded)]
    head = ("picture", "unfolded ~ PyTorch", "folded ~ PyTorch", "nearest, PyTorch", "nearest, folded")
    return table(head, list(zip(PICTURE_CLASSES, *columns, *nearest, strict=True)))


def _nearest(embeddings: Tensor) -> list[str]:
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    values, places = (unit @ unit.T).fill_diagonal_(-1).max(1)
    names = list(PICTURE_CLASSES)
    return [f"{names[place]} {value:.4f}" for place, value in zip(places.tolist(), values.tolist(), strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with aligned columns."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
