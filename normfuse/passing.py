"""How a per-channel map passes an operation on one value; the same change in both directions, but for re-indexing.

mean-like    scale and shift pass             max-like     pass where scale >= 0
relu-like    scale >= 0 passes, no shift      gather       passes, re-indexed

A channel of scale 0 is its shift alone, ``0 x + c = c``, and a rectifier r passes it as another shift: forwards r(c),
backwards what r takes to c.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse import gather, numerics
from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.graph import ModelGraph
from normfuse.operations import Operation
from normfuse.ranks import ranks

Passing = Callable[[fx.Node, Operation, AffineMap, ModelGraph, bool], AffineMap]


def _identity(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    if _is_active_dropout(node, op, graph):
        raise Refused(Reason.OPAQUE_OPERATION, f"{op.label} stays active in eval mode")
    dtypes = [node.meta.get("dtype"), *node.args, *node.kwargs.values()]  # without a recorded run, what is asked for
    for dtype in dtypes:
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise Refused(Reason.DTYPE, f"{op.label} converts to {dtype}")
    return m


def _is_active_dropout(node: fx.Node, op: Operation, graph: ModelGraph) -> bool:
    if node.op == "call_module":
        return str(node.target) in graph.training and not isinstance(graph.module_of(node), nn.Identity)
    function, scope = op.args.get("function", ""), node.meta.get("scope", ())
    if "drop" not in function and function != "stochastic_depth":
        return False
    if scope and scope[-1].name in graph.training:
        return True
    default = function not in ("alpha_dropout", "feature_alpha_dropout", "native_dropout")
    return bool(op.args.get("training", op.args.get("train", default)))


def _gather(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    return (gather.forward if forwards else gather.backward)(node, m, graph)


def _copies(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    m.require_constant(_padded(op, m), f"{op.label} pads")
    return m


def _average_pool(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    m.require_constant(_window(op, m), f"{op.label} mixes values")
    padded = any(_flat(op.args.get("padding", 0))) and op.args.get("count_include_pad", True)
    if m.has_shift and padded:
        raise Refused(Reason.NONZERO_PADDING, f"{op.label} averages zeros in, which a shift would miss")
    if m.has_shift and op.args.get("divisor_override"):
        raise Refused(Reason.OPAQUE_OPERATION, f"a shift cannot pass {op.label}, which has a divisor of its own")
    return m


def _adaptive_average_pool(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    m.require_constant(_window(op, m), f"{op.label} mixes values")
    return m


def _max_pool(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    m.require_constant(_window(op, m), f"{op.label} mixes values")
    _require_order(m, op)
    _require_values_alone(node, op)
    return m


def _relu(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    if bool(((m.scale != 0) & (m.shift != 0)).any()):
        raise Refused(Reason.OPAQUE_OPERATION, f"a shift cannot pass {op.label}")
    _require_order(m, op)
    if not m.has_shift:
        return m
    shift = (numerics.rectified if forwards else numerics.unrectified)(m.shift, _slope(node, op, m, graph))
    if bool(shift.isnan().any()):
        text = f"a channel of scale zero is a negative constant behind {op.label}, which makes no such value"
        raise Refused(Reason.OPAQUE_OPERATION, text)
    return AffineMap(m.scale, shift)


def _slope(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph) -> Tensor | float:
    """Return the slope of a rectifier below zero, one number or one for each channel along axis 1."""
    layer = op.args["layer"].__name__ if "layer" in op.args else op.args["function"]
    if layer in ("ReLU", "relu"):
        return 0.0
    if layer in ("LeakyReLU", "leaky_relu"):
        return float(op.args.get("negative_slope", 0.01))
    weight = graph.tensor(f"{node.target}.weight") if layer == "PReLU" else op.args.get("weight")
    if isinstance(weight, fx.Node) and graph.is_constant(weight):
        weight = graph.value(weight)
    if not isinstance(weight, Tensor):  # computed from the input, or drawn at random
        text = f"a channel of scale zero cannot pass {op.label}, whose slope is not constant"
        raise Refused(Reason.OPAQUE_OPERATION, text)
    slope = numerics.exact(weight).reshape(-1)
    return slope if slope.numel() == 1 else AffineMap.along(1, m.rank, slope, slope).scale


def _interpolate(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    m.require_constant(tuple(range(2, m.rank)), f"{op.label} mixes values")
    return m


def _reduce(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    if op.args.get("dtype") is not None:
        raise opaque(op)
    rank = m.rank if forwards else known_rank(op.inputs[0], op, graph)
    axes = axes_of(op.args.get("dim"), rank)
    keep = bool(op.args.get("keepdim", False))
    if not forwards and not keep:
        m = m.transform(lambda t: _insert(t, axes))
    m.require_constant(axes, f"{op.label} mixes values")
    if op.name == "sum" and m.has_shift:
        raise Refused(Reason.OPAQUE_OPERATION, f"a shift cannot pass {op.label}")
    if op.name == "amax":
        _require_order(m, op)
        _require_values_alone(node, op)
    return m.transform(lambda t: t.squeeze(axes)) if forwards and not keep else m


def _pad(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    if op.args.get("mode", "constant") not in ("constant", None):
        return _copies(node, op, m, graph, forwards)
    if all(width <= 0 for width in _flat(op.args.get("padding"))):  # it cuts off, and pads nothing
        return _gather(node, op, m, graph, forwards)
    m.require_constant(_padded(op, m), f"{op.label} pads")
    value = float(op.args.get("value") or 0.0)
    if not bool((m.scale * value + m.shift == value).all()):
        raise Refused(Reason.NONZERO_PADDING, f"{op.label} pads with {value:g}, which the map would have to change")
    return m


def _negate(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    return AffineMap(m.scale, -m.shift)


PASSING: dict[str, Passing] = {
    "identity": _identity,
    "gather": _gather,
    "gather_copy": _copies,
    "avg_pool": _average_pool,
    "adaptive_avg_pool": _adaptive_average_pool,
    "max_pool": _max_pool,
    "relu": _relu,
    "interpolate": _interpolate,
    "mean": _reduce,
    "sum": _reduce,
    "amax": _reduce,
    "neg": _negate,
    "pad": _pad,
    "constant_pad_nd": _pad,
}


# small questions


def opaque(operation: Operation) -> Refused:
    """Return the refusal of an operation that no rule is about."""
    return Refused(Reason.OPAQUE_OPERATION, f"no rule lets a map pass {operation.label or 'an unknown operation'}")


def require(condition: bool, op: Operation) -> None:
    """Refuse a call of an operation that its rule is not about, unless the condition holds."""
    if not condition:
        raise Refused(Reason.OPAQUE_OPERATION, f"no rule lets a map pass {op.label} as it is called here")


def axes_of(dim: Any, rank: int) -> tuple[int, ...]:
    """Return an argument ``dim`` as axes from 0 up: all of them for None, and for a list of none."""
    dims = range(rank) if dim is None else _flat(dim) or range(rank)
    return tuple(sorted(d % rank for d in dims))


def known_rank(value: fx.Node, op: Operation, graph: ModelGraph) -> int:
    """Return the rank of a value.

    Raises:
        Refused: It is not known.
    """
    shape = graph.shape(value)
    rank = len(shape) if shape is not None else ranks(value, graph)
    if rank is None:
        raise Refused(Reason.RANK_UNKNOWN, f"the shapes around {op.label} are not known", "pass example_inputs")
    return rank


def _require_order(m: AffineMap, op: Operation) -> None:
    """Refuse a map with a negative scale, which takes the largest value to the smallest.

    Raises:
        Refused: It has one.
    """
    if not m.keeps_order:
        raise Refused(Reason.SIGN, f"a scale of the map is negative, which {op.label} would turn around")


def _require_values_alone(node: fx.Node, op: Operation) -> None:
    """Refuse a maximum whose positions are read: a scale of zero leaves none.

    Raises:
        Refused: They are.
    """
    siblings = node.all_input_nodes[0].users if node.target is gather.pick else ()
    if any(part.users for part in siblings if part is not node):
        raise Refused(Reason.OPAQUE_OPERATION, f"the positions of {op.label} are read")


def _window(op: Operation, m: AffineMap) -> tuple[int, ...]:
    """Return the axes that a pool works along: the last one, two or three, as its name says."""
    name = op.args["layer"].__name__ if "layer" in op.args else op.args["function"]
    found = re.search(r"([123])d", name)
    require(found is not None, op)
    return tuple(range(m.rank - int(found[1]), m.rank))  # type: ignore[index]


def _padded(op: Operation, m: AffineMap) -> tuple[int, ...]:
    """Return the axes that a pad makes longer; its pairs of widths begin at the last axis."""
    widths = _flat(op.args.get("padding"))
    require(all(isinstance(width, int) for width in widths) and len(widths) <= 2 * m.rank, op)
    return tuple(m.rank - 1 - i for i in range(len(widths) // 2) if any(widths[2 * i : 2 * i + 2]))


def _flat(value: Any) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _insert(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    for axis in axes:
        tensor = tensor.unsqueeze(axis)
    return tensor
