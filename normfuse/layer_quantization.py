"""What the passes have in common that put quantized layers in the place of Conv and Linear layers.

Every Conv, ConvTranspose and Linear of the model is looked at once, in the order of execution, and is in the report:
quantized, or refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.graph import ModelGraph, is_uninitialized
from normfuse.legality import require_replaceable
from normfuse.quantization.quantizing_layer import QuantizingLayer

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""What has a quantized form."""
_LOOKED_AT = (*QUANTIZABLE, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class LayerQuantization(Pass):
    """Base of the quantizing passes.

    Args:
        keep_first: Leave the layer that runs first in floating point.
        keep_last: Leave the layer that runs last in floating point.
    """

    exactness = Exactness.APPROXIMATE

    def __init__(self, *, keep_first: bool = False, keep_last: bool = False) -> None:
        self.keep_first, self.keep_last = keep_first, keep_last
        self._ends: tuple[ModelGraph, str | None, str | None] | None = None

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every Conv, ConvTranspose and Linear, those that run in the order in which they do."""
        names = layers_in_order(graph)
        if self._ends is None or self._ends[0] is not graph:
            called = [name for name in names if is_called(name, graph)]
            self._ends = graph, next(iter(called), None), next(reversed(called), None)
        for name in names:
            yield Match(name, type(graph.module(name)).__name__, norm=False)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Ask whether the layer is one of torch's own that computes what its class says, and how it is quantized."""
        try:
            self._require_not_kept(match.subject)
            layer = require_quantizable(match.subject, graph)
            return replace(match, payload=self.plan(match.subject, layer, graph))
        except Refused as refused:
            return refused.refusal

    def plan(self, name: str, layer: Layer, graph: ModelGraph) -> Any:
        """Return what ``apply`` needs.

        Raises:
            Refused: The layer cannot be quantized.
        """
        raise NotImplementedError

    def _require_not_kept(self, name: str) -> None:
        assert self._ends is not None
        _, first, last = self._ends
        for kept, end, word in ((self.keep_first, first, "first"), (self.keep_last, last, "last")):
            if kept and name == end:
                raise Refused(Reason.EXCLUDED, f"{name} is the {word} layer that runs, kept in floating point")


def layers_in_order(graph: ModelGraph) -> list[str]:
    """Return the layers to look at, each module once: those that are called in the order of their first call."""
    names = [name for name, module in graph.root.named_modules() if _is_looked_at(module)]
    end = len(graph.nodes)

    def first_call(name: str) -> int:
        return min((graph.order[node] for node in graph.call_sites(name)), default=end)

    return sorted(names, key=first_call)


def _is_looked_at(module: nn.Module) -> bool:
    return isinstance(module, _LOOKED_AT) and not isinstance(module, QuantizingLayer)


def is_called(name: str, graph: ModelGraph) -> bool:
    """Whether the captured run calls the layer of this name."""
    return bool(graph.call_sites(name) or graph.calls_of(name))


def require_quantizable(name: str, graph: ModelGraph) -> Layer:
    """Return a layer if another one of the same arguments can take its place.

    Raises:
        Refused: It is of a class without quantized form, computes something else, has hooks or a computed weight, is
            not called, or its weight is read by something else.
    """
    module: Any = graph.module(name)
    base = next((cls for cls in type(module).__mro__ if cls in QUANTIZABLE), None)
    if not name:
        raise Refused(Reason.UNSUPPORTED_LAYER, "the model is itself a layer", "put it into an nn.Sequential")
    if base is None:
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{name} is a {type(module).__name__}: Linear, Conv1d and Conv2d are")
    if is_uninitialized(module):
        raise Refused(Reason.UNINITIALIZED, f"{name} has no values yet", "run the model once")
    if not _computes_what_it_says(module, base):
        text = f"{name} is a {type(module).__name__}, which computes something else than {base.__name__}"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text)
    if nn.utils.parametrize.is_parametrized(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        hint = "the pass materialize makes it plain"
        raise Refused(Reason.PARAMETRIZED, f"{name}.weight is computed from other tensors", hint)
    require_replaceable(name, graph)
    _require_numbers(name, module)
    _require_read_by_its_layer(name, module, graph)
    return module


def _computes_what_it_says(module: nn.Module, base: Any) -> bool:
    inner = getattr(type(module), "_conv_forward", None) is getattr(base, "_conv_forward", None)
    own = {"forward", "_conv_forward"} & set(vars(module))
    return type(module).forward is base.forward and inner and not own


def _require_numbers(name: str, module: nn.Module) -> None:
    tensors = [tensor for tensor in module.parameters(recurse=False) if tensor is not None]
    for tensor in tensors:
        if getattr(type(tensor), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None):
            raise Refused(Reason.QUANTIZED, f"{name} holds a {type(tensor).__name__}, not plain numbers")
        if tensor.dtype not in _FLOATS:
            raise Refused(Reason.DTYPE, f"{name} holds {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise Refused(Reason.NONFINITE, f"{name} holds NaN or infinity")


def _require_read_by_its_layer(name: str, module: nn.Module, graph: ModelGraph) -> None:
    """Refuse a layer whose weight is read by code that does not call it: it would go on reading the numbers.

    ``nn.MultiheadAttention`` reads ``out_proj.weight`` so.
    """
    if not is_called(name, graph):
        if graph.partial:
            raise Refused(Reason.PARTIAL_CAPTURE, f"what calls {name} could not be traced", "pass example_inputs")
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{name} is not called: its weight is read otherwise, or not at all")
    readers = [node for node in graph.uses(f"{name}.weight") if node.op != "call_module"]
    if readers:
        raise Refused(Reason.SHARED_PARAMETER, f"{name}.weight is also read by {readers[0].name}, not by its layer")


def fused_owners(layer: nn.Module, graph: ModelGraph) -> list[str]:
    """Return the layers of ``nn.TransformerEncoder`` that would compute a Linear of theirs without calling it."""
    owners = [(n, m) for n, m in graph.root.named_modules() if isinstance(m, nn.TransformerEncoderLayer)]
    return [n for n, m in owners if layer in (m.linear1, m.linear2) and m.activation_relu_or_gelu]
