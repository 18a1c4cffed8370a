"""What data shows of the layers that are to be quantized: ranges of the input channels, and what quantizing costs.

    r_k = the largest |x_k| on the data, or the largest over the batches of a percentile
    error = sqrt(sum (y - y_hat)^2 / sum y^2)        y in floating point, y_hat in integers, on the same inputs

Both are of a layer by itself: what it reads is what it reads in the model in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normfuse.base import Reason, Refused
from normfuse.calibration import Batch, Listener, listen
from normfuse.quantization.calibrated import CalibratedLayer
from normfuse.quantization.calibrated_form import calibrated
from normfuse.quantization.shiftquant import ShiftQuant, channel_ranges

Range = Literal["max"] | float


@dataclass(slots=True)
class OutputErrors:
    """Sums over the data of ``y - y_hat`` and its square, by output channel, in float64."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, expected: Tensor, found: Tensor, axis: int) -> None:
        """Add one call."""
        error = expected.double() - found.double()
        others = [d for d in range(error.dim()) if d != axis]
        self.count += error.numel() // max(1, error.shape[axis])
        self.total = self.total + (error.sum(others) if others else error)
        self.squares = self.squares + (error.square().sum(others) if others else error.square())

    def mean(self) -> Tensor:
        """Return the mean error of each output, ``(out,)``."""
        return torch.as_tensor(self.total) / max(1, self.count)

    def squared(self, *, corrected: bool) -> float:
        """Return the sum of the squares; of what is left of them where the bias takes up the mean, if ``corrected``."""
        taken = torch.as_tensor(self.total).square() / max(1, self.count) if corrected else 0.0
        return float((torch.as_tensor(self.squares) - taken).clamp(min=0).sum())


@dataclass(slots=True)
class LayerStatistics:
    """What the data shows of one layer.

    Attributes:
        ranges: r_k of its input channels, ``(K,)``; None before the first call.
        refused: Why it cannot be quantized, if so.
        candidates: Calibrated forms to choose from, by number of groups.
        chosen: The one chosen.
        groups: Its number of groups.
        errors: Of the chosen one.
        square: Of the output in floating point, summed over the data.
        called: How often it was called on the data.
        items: How many items the data has.
    """

    ranges: Tensor | None = None
    refused: Refused | None = None
    candidates: dict[int, CalibratedLayer] = field(default_factory=dict)
    chosen: CalibratedLayer | None = None
    groups: int = 0
    errors: OutputErrors = field(default_factory=OutputErrors)
    square: float = 0.0
    called: int = 0
    items: int = 0

    def error(self, scheme: Scheme) -> float:
        """Return the error of the chosen form, relative to the output in floating point."""
        return math.sqrt(self.errors.squared(corrected=scheme.correct_bias) / self.square) if self.square else 0.0

    @property
    def range_ratio(self) -> float:
        """Largest over smallest range of the input channels, those that are always zero left out."""
        found = self.ranges[self.ranges > 0] if self.ranges is not None else torch.zeros(0)
        return float(found.max() / found.min()) if found.numel() else 1.0


@dataclass(frozen=True, slots=True)
class Scheme:
    """How layers are quantized.

    Attributes:
        bits: Of inputs and weights.
        groups: The most scales that the input channels may have.
        per_channel: Whether each output has a weight scale of its own.
        range: Of the inputs: ``"max"`` or a percentile.
        correct_bias: Whether the bias takes up the mean error of each output.
    """

    bits: int = 8
    groups: int = 4
    per_channel: bool = True
    range: Range = "max"
    correct_bias: bool = True

    def __post_init__(self) -> None:
        ShiftQuant(self.bits, self.groups, range=self.range)  # raises where one is out of range

    def form(self, layer: Any, ranges: Tensor, groups: int) -> CalibratedLayer:
        """Return the calibrated form of a layer for input ranges, with a number of groups."""
        scale, shift = ShiftQuant(self.bits, groups).scales(ranges)
        return calibrated(layer, scale, shift, self.bits, per_channel=self.per_channel)


def statistics_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    scheme: Scheme,
    track: Callable[[Iterable[Batch], str], Iterable[Batch]],
) -> dict[str, LayerStatistics]:
    """Return what the data shows of some layers of a model, in two passes over it; changes nothing.

    In the second pass each layer takes the number of groups that gives the least error on the first batch, and then the
    mean error of each output goes into the bias (arXiv 1906.04721).

    Args:
        model: The model in floating point.
        layers: The layers, by name.
        batches: The data.
        scheme: How they are to be quantized.
        track: Wraps the batches of a pass, whose purpose it is told, to show progress.
    """
    found = {name: LayerStatistics() for name in layers}
    listeners = {layer: _range_listener(name, layer, found[name], scheme) for name, layer in layers.items()}
    listen(model, listeners, track(batches, "ranges"))
    for name, layer in layers.items():
        if found[name].ranges is None and found[name].refused is None:
            text = f"{name} is not called with one tensor, or on no element of the data"
            found[name].refused = Refused(Reason.UNSUPPORTED_LAYER, text)
        if found[name].refused is None:
            found[name].candidates = _candidates(layer, found[name], scheme)
    able = {layer: found[name] for name, layer in layers.items() if found[name].candidates}
    listeners = {layer: _error_listener(layer, seen, scheme) for layer, seen in able.items()}
    listen(model, listeners, _counted(track(batches, "errors"), found.values()))
    for seen in found.values():
        if scheme.correct_bias and seen.chosen is not None and seen.chosen.bias is not None:
            seen.chosen.bias.data += seen.errors.mean().to(seen.chosen.bias)
    return found


def _counted(batches: Iterable[Batch], found: Iterable[LayerStatistics]) -> Iterator[Batch]:
    for batch in batches:
        for seen in found:
            seen.items += 1
        yield batch


def channel_axis(layer: nn.Module, x: Tensor) -> int:
    """Return the axis of the input channels."""
    return x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - 1 - len(layer.kernel_size)  # type: ignore[arg-type]


def without_padding(layer: nn.Module, x: Tensor, padding: Tensor | None) -> Tensor:
    """Return the tokens of ``(B, T, K)`` that are not padding; any other input as it is."""
    if padding is None or not isinstance(layer, nn.Linear) or x.shape[:-1] != padding.shape:
        return x
    return x[~padding]


def _range_listener(name: str, layer: nn.Module, seen: LayerStatistics, scheme: Scheme) -> Listener:
    def listener(x: Tensor, y: Tensor, padding: Tensor | None) -> None:
        kept = without_padding(layer, x, padding)
        if kept.numel() == 0:
            return
        wide = kept.to(torch.float64 if kept.dtype == torch.float64 else torch.float32)
        try:
            ranges = channel_ranges(wide, channel_axis(layer, kept), scheme.range)
        except ValueError:
            seen.refused = Refused(Reason.NONFINITE, f"{name} reads NaN or infinity on the calibration data")
            return
        seen.ranges = ranges if seen.ranges is None else torch.maximum(seen.ranges, ranges)

    return listener


def _candidates(layer: nn.Module, seen: LayerStatistics, scheme: Scheme) -> dict[int, CalibratedLayer]:
    """Return the forms that differ: more groups than there are octaves between the ranges change nothing."""
    assert seen.ranges is not None
    forms: dict[int, CalibratedLayer] = {}
    last: Tensor | None = None
    for groups in range(1, scheme.groups + 1):
        form = scheme.form(layer, seen.ranges, groups)
        if last is None or not torch.equal(form.input_shift, last):
            forms[groups], last = form, form.input_shift
    return forms


def _error_listener(layer: nn.Module, seen: LayerStatistics, scheme: Scheme) -> Listener:
    def listener(x: Tensor, y: Tensor, padding: Tensor | None) -> None:
        x, y = (without_padding(layer, t, padding) for t in (x, y))
        if y.numel() == 0:
            return
        axis = channel_axis(layer, y)
        seen.called += 1
        if seen.chosen is None:
            costs = {groups: _cost(form, x, y, axis, scheme) for groups, form in seen.candidates.items()}
            seen.groups = min(costs, key=lambda groups: costs[groups])
            seen.chosen = seen.candidates[seen.groups]
        seen.errors.add(y, seen.chosen(x), axis)
        seen.square += float(y.double().square().sum())

    return listener


def _cost(form: CalibratedLayer, x: Tensor, y: Tensor, axis: int, scheme: Scheme) -> float:
    errors = OutputErrors()
    errors.add(y, form(x), axis)
    return errors.squared(corrected=scheme.correct_bias)
