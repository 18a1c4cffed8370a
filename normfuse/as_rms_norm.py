"""The RMSNorm that does on centred values what a LayerNorm does on any.

It has the gain, the shift and the eps of the LayerNorm. A norm with a ``forward`` of its own (channels on axis 1, a
faster kernel) is tried against what would replace it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import legality, surgery
from normfuse.base import Reason, Refused
from normfuse.capture.leaves import base_layer
from normfuse.capture.modes import eval_mode
from normfuse.centering import center
from normfuse.graph import ModelGraph
from normfuse.norms import Norm
from normfuse.numerics import exact
from normfuse.operations import named
from normfuse.streams import Stream

_READ_THEIR_NORMS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # for one fused kernel


@dataclass(frozen=True, slots=True)
class Layer:
    """The spec of an RMSNorm (see :mod:`normfuse.surgery`), and its gain and shift in float64 by name."""

    spec: dict[str, Any]
    tensors: dict[str, Tensor]


def replacement(norm: Norm, streams: Sequence[Stream], graph: ModelGraph) -> Layer:
    """Return the RMSNorm that does on a centred stream what a norm does.

    Raises:
        Refused: The norm is a call of a function, is more than a LayerNorm, or something else reads its parameters.
    """
    if norm.module is None:
        text = f"{norm.name} calls a function, there is no layer to replace"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text, "use torch.nn.LayerNorm")
    module: Any = graph.module(norm.module)
    legality.require_replaceable(norm.module, graph)
    if isinstance(graph.module(norm.module.rpartition(".")[0]), _READ_THEIR_NORMS):
        text = f"the layer that holds {norm.module} reads its parameters, for one kernel of its own"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text)
    _require_own_parameters(norm, module, graph)
    leaf = base_layer(module) is nn.LayerNorm
    axis = -1 if leaf else _axis_of_calls(norm, streams, graph)
    layer = _layer_for(module, axis)
    if not leaf and not _does_the_same(module, layer, norm.module, axis, graph):
        text = f"{norm.module} ({norm.layer}) does more than normalise"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text)
    return layer


def _require_own_parameters(norm: Norm, module: nn.Module, graph: ModelGraph) -> None:
    if nn.utils.parametrize.is_parametrized(module):
        raise Refused(Reason.PARAMETRIZED, f"{norm.name} has a parametrization", "the materialize pass makes it plain")
    for key in module._parameters:
        name = f"{norm.module}.{key}"
        if len(graph.owners(name)) > 1:
            others = ", ".join(other for other in graph.owners(name) if other != name)
            raise Refused(Reason.SHARED_PARAMETER, f"{name} is also {others}")
        other = next((use for use in graph.uses(name) if use not in norm.nodes), None)
        if other is not None:
            raise Refused(Reason.SHARED_PARAMETER, f"{name} is also read by {named(other, graph)}")


def _axis_of_calls(norm: Norm, streams: Sequence[Stream], graph: ModelGraph) -> int:
    """Return the axis of the channels in the input of a norm with a forward of its own: -1 for the last."""
    axes = set()
    for call in graph.calls_of(str(norm.module)):
        found = [stream.values[value] for value in call.inputs[:1] for stream in streams if value in stream.values]
        axis = found[0] if found else None
        shape = graph.shape(call.inputs[0]) if call.inputs else None
        axes.add(None if axis is None or shape is None else -1 if axis == len(shape) - 1 else axis)
    if len(axes) != 1 or None in axes:
        raise Refused(Reason.FORWARD_OVERRIDDEN, f"{norm.name} ({norm.layer}) does more than normalise its input")
    (axis,) = axes
    return axis  # type: ignore[return-value]


def _layer_for(module: Any, axis: int) -> Layer:
    """Return torch's RMSNorm where that has all that is needed, or else our own."""
    weight, bias = module.weight, getattr(module, "bias", None)
    kwargs = {"normalized_shape": list(module.normalized_shape), "eps": module.eps}
    kwargs["elementwise_affine"] = weight is not None
    tensors = {} if weight is None else {"weight": exact(weight)}
    if axis == -1 and (bias is None or not bool(bias.any())):
        return Layer({"class": "torch.nn.modules.normalization.RMSNorm", "kwargs": kwargs}, tensors)
    if bias is not None:
        tensors["bias"] = exact(bias)
    kwargs |= {"bias": bias is not None, "axis": axis}
    return Layer({"class": "normfuse.layers.rms_norm.RMSNorm", "kwargs": kwargs}, tensors)


def _does_the_same(module: nn.Module, layer: Layer, name: str, axis: int, graph: ModelGraph) -> bool:
    """Try a norm with its own ``forward`` against its replacement, on centred values."""
    shape = graph.shape(graph.calls_of(name)[0].inputs[0])
    assert shape is not None
    x = center(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), axis)
    old, new = surgery.copy(module).cpu().double(), surgery.build(module, layer.spec).double()
    surgery.assign(new.get_submodule, layer.tensors)
    try:
        with eval_mode(old), torch.no_grad():
            expected, found = old(x), new(x)
    except Exception:  # a forward of the user, of any kind
        return False
    return isinstance(expected, Tensor) and expected.shape == found.shape and torch.allclose(expected, found)
