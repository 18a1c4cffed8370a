"""How an operation keeps a value centred: what must be centred for its result to be.

J x = x - mean of x over the channels;   f keeps centred:  f(J x) = J f(x)

That holds for an operation that is linear and treats all channels alike: sums, reshapes that keep the channels of one
place together, pooling over other axes, products with a factor that all channels share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from normfuse import gather
from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.graph import ModelGraph
from normfuse.joining import joined_axis
from normfuse.numerics import exact
from normfuse.operations import Operation, describe, named
from normfuse.passing import PASSING, axes_of

Place = tuple[fx.Node, int]
"""A value, and the axis of its channels."""


def keeps_centred(operation: Operation) -> bool:
    """Whether an operation may keep a value centred, if its arguments are so."""
    return operation.name in _RULES


def sources(node: fx.Node, axis: int, graph: ModelGraph) -> list[Place]:
    """Return what must be centred for the result of an operation to be centred along ``axis``.

    Raises:
        Refused: The operation is not linear, or does not treat all channels alike.
    """
    operation = describe(node, graph)
    if not keeps_centred(operation):
        text = f"{operation.label or node.name} writes to the stream, and is no layer whose output can be centred"
        raise Refused(Reason.OPAQUE_OPERATION, text)
    return _RULES[operation.name](node, operation, axis, graph)


def _channelwise(node: fx.Node, op: Operation, axis: int, graph: ModelGraph) -> list[Place]:
    """An operation that treats all channels alike: the input's axis is where a scale of each channel comes from."""
    shape = graph.shape(node) or ()
    if shape[axis] < 2:
        raise Refused(Reason.AXIS, f"{op.label} has no channels along axis {axis}")
    scale = torch.arange(1.0, shape[axis] + 1)
    m = PASSING[op.name](node, op, AffineMap.along(axis, len(shape), scale, torch.zeros(1)), graph, False)
    return [(op.inputs[0], [size > 1 for size in m.scale.shape].index(True))]


def _moved(node: fx.Node, op: Operation, axis: int, graph: ModelGraph) -> list[Place]:
    """A gather: what lies along ``axis`` must be all channels of one place of the source."""
    index, source = gather.index_of(node, graph), gather.source_of(node)
    shape = graph.shape(source) or ()
    for source_axis in reversed(range(len(shape))):
        if _shows_whole(index, axis, shape, source_axis):
            return [(source, source_axis)]
    raise Refused(Reason.AXIS, f"{op.label} takes the channels of {named(source, graph)} apart")


def _shows_whole(index: Tensor, axis: int, shape: tuple[int, ...], source_axis: int) -> bool:
    """Whether the positions along ``axis`` are always all those along ``source_axis`` at one place of the source.

    Several places side by side will not do: a LayerNorm over them takes out one mean, centring one for each.
    """
    size, stride = shape[source_axis], math.prod(shape[source_axis + 1 :])
    rows = index.movedim(axis, -1).reshape(-1, index.shape[axis])
    if size < 2 or rows.shape[1] != size:
        return False
    channel, place = rows // stride % size, rows // (stride * size) * stride + rows % stride
    every = torch.arange(size).expand_as(rows)
    return bool((place == place[:, :1]).all()) and torch.equal(channel.sort(-1).values, every)


def _sum(node: fx.Node, op: Operation, axis: int, graph: ModelGraph) -> list[Place]:
    places = []
    for value in (op.args.get("input"), op.args.get("other")):
        if isinstance(value, int | float) and value == 0:  # Python's sum() begins with one
            continue
        own = _own_axis(value, node, axis, graph)
        if own is None:
            raise Refused(Reason.AXIS, f"{op.label} adds one value to all channels, which centring would take out")
        places.append(own)
    return places


def _product(node: fx.Node, op: Operation, axis: int, graph: ModelGraph) -> list[Place]:
    left, right = op.args.get("input"), op.args.get("other")
    places = [_own_axis(value, node, axis, graph) for value in (left, right)]
    varying = [place for place in places if place is not None and not _is_uniform(place, graph)]
    if len(varying) == 1 and (op.name == "mul" or varying[0] == places[0]):
        return varying
    if any(place is not None and graph.is_constant(place[0]) for place in places):
        text, hint = f"{op.label} multiplies each channel by a factor of its own", "fold-affine moves it: run it first"
        raise Refused(Reason.OPAQUE_OPERATION, text, hint)
    raise Refused(Reason.OPAQUE_OPERATION, f"{op.label} does not multiply all channels by the same factor")


def _is_uniform(place: Place, graph: ModelGraph) -> bool:
    """Whether a constant has the same value for all channels, as a gain has that was moved away."""
    node, axis = place
    if not graph.is_constant(node):
        return False
    values = exact(graph.value(node))
    return bool((values == values.narrow(axis, 0, 1)).all())


def _own_axis(value: Any, node: fx.Node, axis: int, graph: ModelGraph) -> Place | None:
    """Return the axis of the channels in an operand; None where it has one value for all of them."""
    shape = graph.shape(value) if isinstance(value, fx.Node) else None
    if shape is None:
        return None
    own = axis - len(graph.shape(node) or ()) + len(shape)
    return (value, own) if own >= 0 and shape[own] > 1 else None


def _concatenation(node: fx.Node, op: Operation, axis: int, graph: ModelGraph) -> list[Place]:
    rank = len(graph.shape(node) or ())
    if joined_axis(op, rank) == axis:
        raise Refused(Reason.AXIS, f"{op.label} puts channels side by side, which one norm takes one mean out of")
    if any(len(graph.shape(value) or ()) != rank for value in op.inputs):
        raise Refused(Reason.AXIS, f"{op.label} adds an axis to what it joins")
    return [(value, axis) for value in op.inputs]


def _stack(node: fx.Node, op: Operation, axis: int, graph: ModelGraph) -> list[Place]:
    (new,) = axes_of(op.args.get("dim", 0), len(graph.shape(node) or ()))
    if new == axis:
        raise Refused(Reason.AXIS, f"{op.label} makes the axis that the norm is about")
    return [(value, axis - (axis > new)) for value in op.inputs]


Rule = Callable[[fx.Node, Operation, int, ModelGraph], list[Place]]
_CHANNELWISE = ("identity", "gather_copy", "avg_pool", "adaptive_avg_pool", "interpolate", "mean", "sum", "neg", "pad")
_RULES: dict[str, Rule] = {
    **dict.fromkeys((*_CHANNELWISE, "constant_pad_nd"), _channelwise),
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("mul", "div"), _product),
    "gather": _moved,
    "cat": _concatenation,
    "stack": _stack,
}
