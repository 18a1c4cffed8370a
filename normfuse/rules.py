"""How a per-channel map passes each operation: one table for both directions.

Backwards, a rule turns the map ``wanted`` on the output of an operation into maps on its inputs; there may be several
ways, tried in order. Forwards, it turns a map on one input into the map on the output. A rule raises :class:`Refused`
where no exact way exists. What absorbs a map (convolutions and the like) is in :mod:`normfuse.absorbers`.

    mean-like    scale and shift pass             max-like     pass where scale > 0
    relu-like    scale > 0 passes, no shift       x * s        scale passes; shift passes a constant s
    x + y        scale both, shift one            cat          each part carries its slice
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse import gather
from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.graph import ModelGraph
from normfuse.norms import ranks
from normfuse.numerics import exact
from normfuse.operations import Operation

Way = list[tuple[fx.Node, AffineMap]]
Backward = Callable[[fx.Node, Operation, AffineMap, ModelGraph], list[Way]]
Forward = Callable[[fx.Node, Operation, fx.Node, AffineMap, ModelGraph], AffineMap]


def backward(node: fx.Node, operation: Operation, wanted: AffineMap, graph: ModelGraph) -> list[Way]:
    """Return the ways to make an operation's output carry ``wanted``: lists of ``(input, map)``.

    Raises:
        Refused: There is none; the detail names the operation.
    """
    if operation.name in _MERGING:
        return _MERGING[operation.name][0](node, operation, wanted, graph)
    if operation.name not in _PASSING:
        raise _opaque(operation)
    source = gather.source_of(node) if operation.name == "gather" else operation.inputs[0]
    return [[(source, _PASSING[operation.name](node, operation, wanted, graph, False))]]


def forward(node: fx.Node, operation: Operation, origin: fx.Node, given: AffineMap, graph: ModelGraph) -> AffineMap:
    """Return the map on an operation's output when its input ``origin`` carries ``given``.

    Raises:
        Refused: There is none; the detail names the operation.
    """
    if operation.name in _MERGING:
        return _MERGING[operation.name][1](node, operation, origin, given, graph)
    if operation.name not in _PASSING or origin is not operation.inputs[0]:
        raise _opaque(operation)
    return _PASSING[operation.name](node, operation, given, graph, True)


def _opaque(operation: Operation) -> Refused:
    return Refused(Reason.OPAQUE_OPERATION, f"no rule lets a map pass {operation.label or 'an unknown operation'}")


# operations on one value: the map changes the same way in both directions, but for reindexing


def _identity(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    if _is_active_dropout(node, op, graph):
        raise Refused(Reason.OPAQUE_OPERATION, f"{op.label} stays active in eval mode")
    dtype = node.meta.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
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
    position = 3 if function == "stochastic_depth" else 2
    default = function not in ("alpha_dropout", "feature_alpha_dropout", "native_dropout")
    training = node.kwargs.get("training", node.args[position] if len(node.args) > position else default)
    return bool(node.kwargs.get("train", training))


def _gather(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    return (gather.forward if forwards else gather.backward)(node, m, graph)


def _copies(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    m.require_constant(_padded(op, m), op.label)
    return m


def _average_pool(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    m.require_constant(_window(op, m), op.label)
    padded = any(_flat(op.args.get("padding", 0))) and op.args.get("count_include_pad", True)
    if m.has_shift and (padded or op.args.get("divisor_override")):
        raise Refused(Reason.NONZERO_PADDING, f"{op.label} averages zeros in, which a shift would miss")
    return m


def _adaptive_average_pool(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    m.require_constant(_window(op, m), op.label)
    return m


def _max_pool(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    m.require_constant(_window(op, m), op.label)
    if op.args.get("return_indices"):
        raise Refused(Reason.OPAQUE_OPERATION, f"{op.label} returns indices")
    if not m.is_positive:
        raise Refused(Reason.SIGN, f"a scale of the map is not positive, which {op.label} would turn around")
    return m


def _relu(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    if m.has_shift:
        raise Refused(Reason.OPAQUE_OPERATION, f"a shift cannot pass {op.label}")
    if not m.is_positive:
        raise Refused(Reason.SIGN, f"a scale of the map is not positive, which {op.label} would turn around")
    return m


def _interpolate(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    m.require_constant(tuple(range(2, m.rank)), op.label)
    return m


def _reduce(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    if op.args.get("dtype") is not None:
        raise _opaque(op)
    rank = m.rank if forwards else _known_rank(op.inputs[0], op, graph)
    axes = _axes(op.args.get("dim"), rank)
    keep = bool(op.args.get("keepdim", False))
    if not forwards and not keep:
        m = m.transform(lambda t: _insert(t, axes))
    m.require_constant(axes, op.label)
    if op.name == "sum" and m.has_shift:
        raise Refused(Reason.OPAQUE_OPERATION, f"a shift cannot pass {op.label}")
    if op.name == "amax" and not m.is_positive:
        raise Refused(Reason.SIGN, f"a scale of the map is not positive, which {op.label} would turn around")
    return m.transform(lambda t: t.squeeze(axes)) if forwards and not keep else m


def _pad(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    if op.args.get("mode", "constant") not in ("constant", None):
        return _copies(node, op, m, graph, forwards)
    m.require_constant(_padded(op, m), op.label)
    value = float(op.args.get("value") or 0.0)
    if not bool((m.scale * value + m.shift == value).all()):
        raise Refused(Reason.NONZERO_PADDING, f"{op.label} pads with {value:g}, which the map would have to change")
    return m


def _negate(node: fx.Node, op: Operation, m: AffineMap, graph: ModelGraph, forwards: bool) -> AffineMap:
    return AffineMap(m.scale, -m.shift)


# operations that join values


def _add_back(node: fx.Node, op: Operation, wanted: AffineMap, graph: ModelGraph) -> list[Way]:
    _require_plain_add(op)
    values = _operands(op)
    if len(values) < 2 or not all(isinstance(v, fx.Node) for v in values):
        number = next(v for v in values if not isinstance(v, fx.Node))
        sign = -1.0 if op.name == "sub" else 1.0
        source = next(v for v in values if isinstance(v, fx.Node))
        _require(source is values[0] or op.name == "add", op)
        return [[(source, AffineMap(wanted.scale, wanted.shift + (wanted.scale - 1) * sign * number))]]
    left, right = values
    _require(left is not right, op)
    signs = (1.0, -1.0 if op.name == "sub" else 1.0)

    def shifting(position: int) -> Way:
        scaled = wanted.only_scale()
        shifted = AffineMap(wanted.scale, wanted.shift * signs[position])
        return [(v, _fit(shifted if i == position else scaled, v, op, graph)) for i, v in enumerate((left, right))]

    return _possible([lambda: shifting(0), lambda: shifting(1)] if wanted.has_shift else [lambda: shifting(0)])


def _possible(ways: list[Callable[[], Way]]) -> list[Way]:
    """Return the ways that do not refuse, or raise the first refusal where all do."""
    found: list[Way] = []
    refusals: list[Refused] = []
    for way in ways:
        try:
            found.append(way())
        except Refused as refused:
            refusals.append(refused)
    if not found:
        raise refusals[0]
    return found


def _add_forward(node: fx.Node, op: Operation, origin: fx.Node, given: AffineMap, graph: ModelGraph) -> AffineMap:
    _require_plain_add(op)
    values = _operands(op)
    others = [v for v in values if v is not origin]
    _require(len(others) == 1, op)
    negative = op.name == "sub" and values[1] is origin
    if not isinstance(others[0], fx.Node) and not negative:
        sign = -1.0 if op.name == "sub" else 1.0
        return AffineMap(given.scale, given.shift + (1 - given.scale) * sign * others[0])
    if not bool((given.scale == 1).all()):
        raise Refused(Reason.OPAQUE_OPERATION, f"a scale cannot pass {op.label}, whose other operand has none")
    return _to_output(AffineMap(given.scale, -given.shift if negative else given.shift), node, origin, op, graph)


def _multiply_back(node: fx.Node, op: Operation, wanted: AffineMap, graph: ModelGraph) -> list[Way]:
    values = _operands(op)
    _require(op.args.get("rounding_mode") is None, op)

    def into(position: int) -> Way:
        value, other = values[position], values[1 - position]
        _require(isinstance(value, fx.Node) and other is not value and (op.name == "mul" or position == 0), op)
        factor = _factor(other, op, graph)
        if wanted.has_shift and (factor is None or graph.is_constant(value)):
            text = f"a shift cannot pass {op.label}, which multiplies two activations"
            raise Refused(Reason.OPAQUE_OPERATION, text)
        return [(value, _fit(wanted if factor is None else _unscale_shift(wanted, factor, op), value, op, graph))]

    ahead = isinstance(values[0], fx.Node) and graph.is_constant(values[0])  # better into the activation than into that
    return _possible([lambda: into(1), lambda: into(0)] if ahead else [lambda: into(0), lambda: into(1)])


def _multiply_forward(node: fx.Node, op: Operation, origin: fx.Node, given: AffineMap, graph: ModelGraph) -> AffineMap:
    values = _operands(op)
    others = [v for v in values if v is not origin]
    _require(len(others) == 1 and (op.name == "mul" or values[0] is origin), op)
    _require(op.args.get("rounding_mode") is None, op)
    factor = _factor(others[0], op, graph)
    if factor is None and given.has_shift:
        raise Refused(Reason.OPAQUE_OPERATION, f"a shift cannot pass {op.label}, which multiplies two activations")
    m = _to_output(given, node, origin, op, graph)
    return m if factor is None else AffineMap(m.scale, m.shift * factor)


def _unscale_shift(wanted: AffineMap, factor: Tensor, op: Operation) -> AffineMap:
    """``s y + t`` of ``y = f x`` is ``f (s x + t / f)``: exact where no factor is zero."""
    if not wanted.has_shift:
        return wanted
    if bool((factor == 0).any()):
        raise Refused(Reason.OPAQUE_OPERATION, f"a shift cannot pass the zero factors of {op.label}")
    return AffineMap(wanted.scale, wanted.shift / factor)


def _factor(other: Any, op: Operation, graph: ModelGraph) -> Tensor | None:
    """Return the constant an activation is multiplied by, inverted for a division; None for another activation."""
    if isinstance(other, fx.Node) and not graph.is_constant(other):
        _require(op.name == "mul", op)
        return None
    value = exact(graph.value(other)) if isinstance(other, fx.Node) else torch.tensor(float(other), dtype=torch.float64)
    return 1 / value if op.name == "div" else value


def _cat_back(node: fx.Node, op: Operation, wanted: AffineMap, graph: ModelGraph) -> list[Way]:
    axis = _axes(op.args.get("dim", 0), wanted.rank)[0]
    _require(len(set(op.inputs)) == len(op.inputs), op)
    start, way = 0, []
    for value in op.inputs:
        size = _size(value, axis, op, graph)
        part = wanted.transform(lambda t, s=start, n=size: t if t.shape[axis] == 1 else t.narrow(axis, s, n))
        way.append((value, part))
        start += size
    return [way]


def _cat_forward(node: fx.Node, op: Operation, origin: fx.Node, given: AffineMap, graph: ModelGraph) -> AffineMap:
    axis = _axes(op.args.get("dim", 0), given.rank)[0]
    scales, shifts = [], []
    for value in op.inputs:
        size = _size(value, axis, op, graph)
        for pieces, whole, neutral in ((scales, given.scale, torch.ones), (shifts, given.shift, torch.zeros)):
            shape = list(whole.shape)
            shape[axis] = size
            pieces.append(whole.expand(shape) if value is origin else neutral(shape, dtype=torch.float64))
    return AffineMap(torch.cat(scales, axis), torch.cat(shifts, axis))


# small questions


def _require(condition: bool, op: Operation) -> None:
    if not condition:
        raise _opaque(op)


def _require_plain_add(op: Operation) -> None:
    _require(op.args.get("alpha", 1) == 1, op)


def _operands(op: Operation) -> list[Any]:
    return [value for key in ("input", "other") if (value := op.args.get(key)) is not None] if op.args else []


def _window(op: Operation, m: AffineMap) -> tuple[int, ...]:
    """Return the axes that a pool works along: the last one, two or three, as its name says."""
    name = op.args["layer"].__name__ if "layer" in op.args else op.args["function"]
    found = re.search(r"([123])d", name)
    _require(found is not None, op)
    return tuple(range(m.rank - int(found[1]), m.rank))  # type: ignore[index]


def _padded(op: Operation, m: AffineMap) -> tuple[int, ...]:
    """Return the axes that a pad makes longer; its pairs of widths begin at the last axis."""
    widths = _flat(op.args.get("padding"))
    _require(all(isinstance(width, int) for width in widths) and len(widths) <= 2 * m.rank, op)
    return tuple(m.rank - 1 - i for i in range(len(widths) // 2) if any(widths[2 * i : 2 * i + 2]))


def _flat(value: Any) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _axes(dim: Any, rank: int) -> tuple[int, ...]:
    dims = range(rank) if dim is None else _flat(dim)
    return tuple(sorted(d % rank for d in dims))


def _insert(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    for axis in axes:
        tensor = tensor.unsqueeze(axis)
    return tensor


def _known_rank(value: fx.Node, op: Operation, graph: ModelGraph) -> int:
    shape = graph.shape(value)
    rank = len(shape) if shape is not None else ranks(value, graph)
    if rank is None:
        raise Refused(Reason.RANK_UNKNOWN, f"the shapes around {op.label} are not known", "pass example_inputs")
    return rank


def _size(value: fx.Node, axis: int, op: Operation, graph: ModelGraph) -> int:
    shape = graph.shape(value)
    if shape is not None:
        return shape[axis]
    module = graph.module_of(value)
    size = getattr(module, "out_channels", getattr(module, "num_features", None)) if axis == 1 else None
    if size is None:
        raise Refused(Reason.RANK_UNKNOWN, f"the shapes around {op.label} are not known", "pass example_inputs")
    return int(size)


def _fit(m: AffineMap, value: fx.Node, op: Operation, graph: ModelGraph) -> AffineMap:
    """Return a map on a result as one on an operand, which may have been broadcast."""
    shape = graph.shape(value)
    if shape is None and graph.is_constant(value):
        shape = tuple(graph.value(value).shape)
    if shape is None:
        _require(_known_rank(value, op, graph) == m.rank, op)
        return m
    lost = m.rank - len(shape)
    m.require_constant(tuple(range(lost)), op.label)
    fitted = m.transform(lambda t: t.reshape(t.shape[lost:]))
    fitted.require_constant(
        tuple(axis for axis, size in enumerate(shape) if size == 1 and _varies(fitted, axis)), op.label
    )
    return fitted


def _varies(m: AffineMap, axis: int) -> bool:
    return m.scale.shape[axis] != 1 or m.shift.shape[axis] != 1


def _to_output(m: AffineMap, node: fx.Node, origin: fx.Node, op: Operation, graph: ModelGraph) -> AffineMap:
    missing = _known_rank(node, op, graph) - m.rank if graph.shape(node) is not None else 0
    return m.transform(lambda t: t.reshape((1,) * missing + tuple(t.shape)))


Passing = Callable[[fx.Node, Operation, AffineMap, ModelGraph, bool], AffineMap]
_PASSING: dict[str, Passing] = {
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
_MERGING: dict[str, tuple[Backward, Forward]] = {
    "add": (_add_back, _add_forward),
    "sub": (_add_back, _add_forward),
    "mul": (_multiply_back, _multiply_forward),
    "div": (_multiply_back, _multiply_forward),
    "cat": (_cat_back, _cat_forward),
}
