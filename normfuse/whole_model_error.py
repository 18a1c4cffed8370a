"""How far a quantized model is from its source as a whole, beside what the errors of its layers explain.

    eps_l = sqrt(sum (y_l - y_l^)^2 / sum y_l^2)      of layer l alone, on inputs in floating point, called c_l times
    e     = sqrt(sum (y - y^)^2 / sum y^2)            of an output of the model, over all the data

Rounding errors of different layers are as good as independent, and most of what stands between layers passes an error
as it passes the signal, so errors add in squares, as inverse signal-to-noise ratios: ``e ~ E``. A model passes where

    E = sqrt(sum_l c_l eps_l^2)
    e <= max(min(K E, CEILING), 2 E) + FLOOR          K = 10, CEILING = 0.7, FLOOR = 1e-3, for every output

K is room for networks in which signals cancel and errors do not: with weights at random, e is 1 E in a ResNet-18 and
4 E in a MobileNetV2. CEILING keeps that room from covering an output in which as much is error as is not; FLOOR is for
float32 sums in another order. What is beyond that did not come from rounding: something computes with what became
integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normfuse import rerun
from normfuse.calibration import Batch
from normfuse.errors import VerificationError
from normfuse.outputs import leaves
from normfuse.passes.quantize import QuantizedLayer

K = 10.0
CEILING = 0.7
FLOOR = 1e-3


@dataclass(slots=True)
class _OutputSums:
    """Sums over the data of one output."""

    error: float = 0.0
    square: float = 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        both = expected.isfinite() & found.isfinite()  # -inf of a mask, in both; what is NaN in one counts as lost
        lost = (expected.isfinite() != found.isfinite()) * expected.nan_to_num(0.0, 0.0, 0.0).square()
        self.error += float(((expected - found).square().where(both, 0.0) + lost).sum())
        self.square += float(expected.square().where(both, 0.0).sum() + lost.sum())

    def relative(self) -> float:
        return math.sqrt(self.error / self.square) if self.square else float(self.error > 0)


def explained(layers: Iterable[QuantizedLayer]) -> float:
    """Return the relative error that the errors of the layers explain, ``sqrt(sum_l c_l eps_l^2)``."""
    return math.sqrt(sum(layer.calls * layer.error**2 for layer in layers))


def _allowed(expected: float) -> float:
    return max(min(K * expected, CEILING), 2 * expected) + FLOOR


def measured(source: nn.Module, quantized: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the relative error of each floating-point output by name; runs both models once on the data.

    Tokens of padding are left out, and outputs whose shapes differ, as those of a detector that keeps other boxes.

    Raises:
        VerificationError: The quantized model does not run on the data.
    """
    sums: dict[str, _OutputSums] = {}
    with rerun.evaluating(source), rerun.evaluating(quantized):
        for batch in batches:
            expected, found = leaves(rerun.run(source, batch.inputs)), _outputs(quantized, batch)
            for name in expected.keys() & found.keys():
                if _comparable(expected[name], found[name]):
                    kept = (_without_padding(run[name].double(), batch.padding) for run in (expected, found))
                    sums.setdefault(name, _OutputSums()).add(*kept)
    return {name: each.relative() for name, each in sums.items()}


def _outputs(quantized: nn.Module, batch: Batch) -> dict[str, Any]:
    try:
        return leaves(rerun.run(quantized, batch.inputs))
    except Exception as error:  # whatever the forward of the user raises
        text = f"{type(error).__name__}: {error}"
        raise VerificationError(f"the quantized model does not run on the calibration data: {text}") from error


def _comparable(one: object, other: object) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return one.is_floating_point() and other.is_floating_point() and one.shape == other.shape


def _without_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    """Return the tokens of ``(B, T, *)`` that are not padding; any other output as it is."""
    return x if padding is None or x.shape[: padding.dim()] != padding.shape else x[~padding]


def require_in_proportion(
    source: nn.Module, quantized: nn.Module, layers: Iterable[QuantizedLayer], batches: Iterable[Batch]
) -> None:
    """Compare a quantized model with its source on the calibration data.

    Raises:
        VerificationError: The error of an output is out of proportion to those of the layers.
    """
    layers = list(layers)
    allowed = _allowed(explained(layers))
    errors = measured(source, quantized, batches) if layers else {}
    name = max(errors, key=lambda key: errors[key], default="")
    if errors and not errors[name] <= allowed:
        raise VerificationError(
            f"output {name!r} of the quantized model is off by {errors[name]:.1%} on the calibration data, where the "
            f"errors of its {len(layers)} layers, at most {max(layer.error for layer in layers):.1%} each, allow for "
            f"{allowed:.1%}: something computes with what became integers, or magnifies small errors; leave layers out "
            "with exclude=, or take the model as it is with verify=False"
        )
