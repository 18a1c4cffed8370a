"""Make Conv and Linear layers train on integers: every product of their forward and backward on ShiftQuant operands.

    Y = X W^T,   dX = dY W,   dW = dY^T X      each operand rounded to ``bits``, with power-of-two group scales

Each layer keeps its parameters, which an optimizer updates in floating point, and quantizes them afresh at each call.
Only its class changes, so optimizers, ties and the keys of the ``state_dict`` stay (:mod:`normfuse.quantization`). A
*reconstruction* of arXiv 2411.10948.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn

from normfuse.base import Exactness, Match, Pass, Refusal
from normfuse.graph import ModelGraph
from normfuse.layer_quantization import Layer, LayerQuantization, fused_owners
from normfuse.quantization import Precision, ShiftQuantConv1d, ShiftQuantConv2d, ShiftQuantLinear

_CLASSES = {nn.Linear: "ShiftQuantLinear", nn.Conv1d: "ShiftQuantConv1d", nn.Conv2d: "ShiftQuantConv2d"}


class ShiftQuantTraining(LayerQuantization):
    """Conv1d, Conv2d and Linear into layers that quantize at each call; needs no data.

    Args:
        precision: Bits and groups of the operands; 8 bits and 4 groups by default.
        keep_first: Leave the layer that runs first in floating point.
        keep_last: Leave the layer that runs last in floating point.
    """

    name = "shiftquant"

    def __init__(
        self, precision: Precision | None = None, *, keep_first: bool = False, keep_last: bool = False
    ) -> None:
        super().__init__(keep_first=keep_first, keep_last=keep_last)
        self.precision = precision or Precision()

    def plan(self, name: str, layer: Layer, graph: ModelGraph) -> dict[str, Any]:
        """Return the edit that changes the class of the layer."""
        kind = next(_CLASSES[cls] for cls in type(layer).__mro__ if cls in _CLASSES)
        settings = dataclasses.asdict(self.precision)
        precision = {"class": "normfuse.quantization.quantizing_layer.Precision", "kwargs": settings}
        target = f"normfuse.quantization.modules.{kind}"
        return {"op": "retype", "path": name, "class": target, "attributes": {"precision": precision}}

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Change the class, and make fused encoder layers call it."""
        for path in fused_owners(graph.module(match.subject), graph):
            graph.perform({"op": "separate", "path": path})
        graph.perform(match.payload)


class ShiftQuantOff(Pass):
    """Give the layers of :class:`ShiftQuantTraining` the class that they had, with the parameters that they have."""

    name = "shiftquant-off"
    exactness = Exactness.APPROXIMATE

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield the layers that quantize at each call."""
        for name, module in graph.root.named_modules():
            if name and isinstance(module, ShiftQuantLinear | ShiftQuantConv1d | ShiftQuantConv2d):
                yield Match(name, type(module).__name__, norm=False)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Find nothing to ask: the parameters are those of the class."""
        return match

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Change the class."""
        kind = next(cls for cls in type(graph.module(match.subject)).__mro__ if cls in _CLASSES)
        edit = {"op": "retype", "path": match.subject, "class": f"{kind.__module__}.{kind.__name__}"}
        graph.perform(edit)
