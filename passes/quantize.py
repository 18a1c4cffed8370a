"""Quantize Conv and Linear layers after training: int8 weights, and inputs on scales that were found on data.

    y_n = s_0 t_n sum_k Xq_k Wq_nk + b_n        :mod:`normfuse.quantization.calibrated` has the definition

    shiftquant    input channels share up to ``groups`` scales ``s_0 2^-g``; a weight scale for each output
    per-channel   one scale for the input; a weight scale for each output
    per-tensor    one scale for the input, one for the weight

Each layer takes the number of groups, up to ``groups``, that is best on its first batch, and its bias takes up the mean
error of its outputs, E[y - y_hat], on the data (bias correction, arXiv 1906.04721). Part of the *reconstruction*
of arXiv 2411.10948; the paper trains, and does not calibrate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from normfuse.base import Match, Refused
from normfuse.calibration import Batch, Batches, Calibration, PaddingMask
from normfuse.graph import ModelGraph
from normfuse.layer_quantization import Layer, LayerQuantization, fused_owners, layers_in_order, require_quantizable
from normfuse.layer_ranges import LayerStatistics, Range, Scheme, statistics_of
from normfuse.quantization.calibrated_form import KINDS, arguments_of

Method = Literal["shiftquant", "per-channel", "per-tensor"]
METHODS: tuple[Method, ...] = ("shiftquant", "per-channel", "per-tensor")


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """What quantizing one layer did.

    Attributes:
        name: Qualified name.
        error: Of its output on the calibration data, ``sqrt(sum (y - y_hat)^2 / sum y^2)``, inputs in floating point.
        range_ratio: Largest over smallest range of its input channels.
        groups: How many scales the input channels share.
        bits: Of weights and inputs.
        calls: How often it is called for an item of the data, on average.
    """

    name: str
    error: float
    range_ratio: float
    groups: int
    bits: int
    calls: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}  error {self.error:.2%}  range ratio {self.range_ratio:.3g}  groups {self.groups}"


class Quantize(LayerQuantization):
    """Conv1d, Conv2d and Linear into calibrated integer layers; needs data.

    Args:
        calibration: As for :func:`normfuse.quantize`.
        method: ``"shiftquant"``, ``"per-channel"`` or ``"per-tensor"``.
        bits: Of inputs and weights.
        groups: The most scales that the input channels of a layer may share; one for the other methods.
        range: Of the inputs: ``"max"``, or a percentile.
        keep_first: Leave the layer that runs first in floating point.
        keep_last: Leave the layer that runs last in floating point.
        padding_mask: As for :func:`normfuse.quantize`.
        correct_bias: Whether the bias of each layer takes up the mean error of its outputs on the data.

    Raises:
        ValueError: There is no data, or an argument is out of its range.
    """

    name = "quantize"

    def __init__(
        self,
        calibration: Calibration | None = None,
        *,
        method: Method = "shiftquant",
        bits: int = 8,
        groups: int = 4,
        range: Range = "max",
        keep_first: bool = False,
        keep_last: bool = False,
        padding_mask: PaddingMask | None = None,
        correct_bias: bool = True,
    ) -> None:
        super().__init__(keep_first=keep_first, keep_last=keep_last)
        if calibration is None:
            raise ValueError("quantize needs calibration data: normfuse.quantize(model, calibration=...) takes it")
        if method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
        self.calibration, self.padding_mask = calibration, padding_mask
        self.scheme = Scheme(bits, groups if method == "shiftquant" else 1, method != "per-tensor", range, correct_bias)
        self.layers: dict[str, QuantizedLayer] = {}
        """What became of the layers, after a run."""
        self.track: Callable[[Iterable[Batch], str], Iterable[Batch]] = lambda batches, what: batches
        self._seen: dict[str, LayerStatistics] = {}
        self._graph: ModelGraph | None = None

    def plan(self, name: str, layer: Layer, graph: ModelGraph) -> dict[str, Any]:
        """Return how to build the calibrated layer, and its tensors by attribute."""
        if graph is not self._graph:
            self._graph, self._seen = graph, self._look(graph)
        seen = self._seen[name]
        if seen.refused is not None:
            raise seen.refused
        assert seen.chosen is not None
        groups = seen.chosen.input_groups
        figures = (seen.error(self.scheme), seen.range_ratio, groups, self.scheme.bits)
        self.layers[name] = QuantizedLayer(name, *figures, calls=seen.called / max(1, seen.items))
        kind = next(KINDS[cls] for cls in type(layer).__mro__ if cls in KINDS)
        spec = {
            "class": f"{kind.__module__}.{kind.__name__}",
            "kwargs": arguments_of(layer, self.scheme.bits),
        }
        tensors: dict[str, Tensor] = {f"{name}.{key}": value for key, value in seen.chosen.state_dict().items()}
        return {"spec": spec, "tensors": tensors}

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Put the calibrated layer in the place of the old one, and make fused encoder layers call it."""
        name = match.subject
        for path in fused_owners(graph.module(name), graph):
            graph.perform({"op": "separate", "path": path})
        graph.perform({"op": "replace", "path": name, "module": match.payload["spec"]})
        graph.assign(match.payload["tensors"])

    def _look(self, graph: ModelGraph) -> dict[str, LayerStatistics]:
        """Return what the data shows of every layer that can be quantized, of the model as it is now."""
        layers = {}
        for name in layers_in_order(graph):
            try:
                layers[name] = require_quantizable(name, graph)
            except Refused:
                continue
        batches = Batches(self.calibration, graph.root, self.padding_mask)
        return statistics_of(graph.root, layers, batches, self.scheme, self.track)
