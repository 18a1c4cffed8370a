"""What writes to a residual stream, and the same with a centred output.

    J = I - 1 1^T / C;   x = W h + b   =>   J x = (J W) h + J b        (J acts along the channels that are written)

A writer is a linear layer, a convolution, an embedding, the output projection of an attention or a parameter that is
added. Its new values are its old ones minus their mean over the output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from normfuse import absorbers
from normfuse.absorbers import Absorber
from normfuse.base import Reason, Refused
from normfuse.call_arguments import arguments_of
from normfuse.capture.following import opaque, pick
from normfuse.graph import ModelGraph, function_name
from normfuse.numerics import exact

_ATTENTION = "multi_head_attention_forward"


@dataclass(frozen=True, slots=True)
class Writer:
    """One place that writes to a stream.

    Attributes:
        absorber: Its layer and tensors.
        output: The axis of the channels in what it writes.
        axes: ``(tensor, axis of the output channels in it)`` for each of its tensors that exists.
    """

    absorber: Absorber
    output: int
    axes: tuple[tuple[str, int], ...]


def center(tensor: Tensor, axis: int) -> Tensor:
    """Return ``J`` applied along an axis, in float64."""
    values = exact(tensor)
    return values - values.mean(axis, keepdim=True)


def results(node: fx.Node) -> list[fx.Node]:
    """Return the values that one node of several results gives, in order; else the node itself."""
    return [user for user in node.users if user.target in (pick, opaque) and user.args[:1] == (node,)] or [node]


def writer_of(node: fx.Node, axis: int | None, graph: ModelGraph) -> Writer | None:
    """Return the writer whose output ``node`` is, None where it is something else.

    Args:
        node: A value of the graph.
        axis: The axis of the channels in it; None for that along which a layer writes.
        graph: The captured model, with shapes.

    Raises:
        Refused: It writes along another axis, its groups cannot share a mean, or its weight is computed.
    """
    if node.op == "get_attr":
        return _parameter(node, axis)
    found = _attention(node) or _layer(node, graph)
    if found is None:
        return None
    absorber, out_axis, from_end = found
    shape = graph.shape(node)
    if shape is None:
        raise Refused(Reason.RANK_UNKNOWN, f"the shape of {node.name} is not known", "pass example_inputs")
    output = len(shape) - from_end
    if axis is not None and axis != output:
        text = f"{absorber.name} writes along axis {output}, the channels of the norm are along axis {axis}"
        raise Refused(Reason.AXIS, text)
    if absorber.groups > 1:
        text = f"{absorber.name} has {absorber.groups} groups, and a mean over its outputs would mix their inputs"
        raise Refused(Reason.AXIS, text)
    axes = [(absorber.weight, out_axis)]
    if absorber.bias is not None and _value(absorber.bias, graph) is not None:
        axes.append((absorber.bias, 0))
    return Writer(absorber, output, tuple(axes))


def _parameter(node: fx.Node, axis: int | None) -> Writer | None:
    """A parameter that is added: its axis is that of the activation, counted in its own shape."""
    if axis is None:
        return None
    name = str(node.target)
    return Writer(Absorber("addend", name, name), axis, ((name, axis),))


def _layer(node: fx.Node, graph: ModelGraph) -> tuple[Absorber, int, int] | None:
    """Return the absorber, the axis of the outputs in its weight, and that in its output, counted from the end."""
    absorber = absorbers.output_side(node, graph)
    if absorber is None or absorber.kind not in ("linear", "conv", "embedding"):
        return None
    if absorber.kind == "conv":
        return absorber, int(absorber.transposed), graph.tensor(absorber.weight).dim() - 1
    return absorber, int(absorber.kind == "embedding" or absorber.transposed), 1


def _attention(node: fx.Node) -> tuple[Absorber, int, int] | None:
    """The output of ``F.multi_head_attention_forward``, which ends in a linear layer."""
    call: Any = node.args[0] if node.target in (pick, opaque) and node.args else None
    if call is None or function_name(call) != _ATTENTION or node is not results(call)[0]:
        return None
    given = arguments_of(call)
    weight, bias = given.get("out_proj_weight"), given.get("out_proj_bias")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return None
    name = str(weight.target).rpartition(".")[0]
    bias_name = str(bias.target) if isinstance(bias, fx.Node) else None
    return Absorber("linear", name, str(weight.target), bias_name), 0, 1


def _value(name: str, graph: ModelGraph) -> Tensor | None:
    owner, _, attribute = name.rpartition(".")
    return getattr(graph.module(owner), attribute, None)
