"""How a per-channel map passes an operation that joins values: sums, products, concatenations.

x + y    scale both, shift one        x * s    scale passes; a shift passes a constant s
x + k    s x + c + k = s (x + k) + (c + (1 - s) k)
cat      each part carries its slice; forwards, the identity joins in elsewhere
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.graph import ModelGraph
from normfuse.numerics import exact
from normfuse.operations import Operation, named
from normfuse.passing import axes_of, known_rank, require

Way = list[tuple[fx.Node, AffineMap]]
Backward = Callable[[fx.Node, Operation, AffineMap, ModelGraph], list[Way]]
Forward = Callable[[fx.Node, Operation, fx.Node, AffineMap, ModelGraph], AffineMap]


def _add_back(node: fx.Node, op: Operation, wanted: AffineMap, graph: ModelGraph) -> list[Way]:
    _require_plain_add(op)
    values = _operands(op)
    if len(values) < 2 or not all(isinstance(v, fx.Node) for v in values):
        number = next(v for v in values if not isinstance(v, fx.Node))
        sign = -1.0 if op.name == "sub" else 1.0
        source = next(v for v in values if isinstance(v, fx.Node))
        require(source is values[0] or op.name == "add", op)
        return [[(source, AffineMap(wanted.scale, wanted.shift + (wanted.scale - 1) * sign * number))]]
    left, right = values
    require(left is not right, op)
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
    require(len(others) == 1, op)
    negative = op.name == "sub" and values[1] is origin
    if not isinstance(others[0], fx.Node) and not negative:
        sign = -1.0 if op.name == "sub" else 1.0
        return AffineMap(given.scale, given.shift + (1 - given.scale) * sign * others[0])
    m = _of_rank(AffineMap(given.scale, -given.shift if negative else given.shift), node, op, graph)
    if bool((given.scale == 1).all()):
        return m
    if not isinstance(others[0], fx.Node) or not graph.is_constant(others[0]):
        text = f"a scale cannot pass {op.label}, which adds a value that would have to be scaled too"
        raise Refused(Reason.OPAQUE_OPERATION, text)
    term = exact(graph.value(others[0])) * (-1.0 if op.name == "sub" and not negative else 1.0)
    require(term.dim() <= m.rank, op)
    return AffineMap(m.scale, m.shift + (1 - m.scale) * term)


def _multiply_back(node: fx.Node, op: Operation, wanted: AffineMap, graph: ModelGraph) -> list[Way]:
    values = _operands(op)
    require(op.args.get("rounding_mode") is None, op)

    def into(position: int) -> Way:
        value, other = values[position], values[1 - position]
        require(isinstance(value, fx.Node) and other is not value and (op.name == "mul" or position == 0), op)
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
    require(len(others) == 1 and (op.name == "mul" or values[0] is origin), op)
    require(op.args.get("rounding_mode") is None, op)
    factor = _factor(others[0], op, graph)
    if factor is None and given.has_shift:
        raise Refused(Reason.OPAQUE_OPERATION, f"a shift cannot pass {op.label}, which multiplies two activations")
    m = _of_rank(given, node, op, graph)
    require(factor is None or factor.dim() <= m.rank, op)
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
        require(op.name == "mul", op)
        return None
    require(isinstance(other, fx.Node | numbers.Real), op)
    value = exact(graph.value(other)) if isinstance(other, fx.Node) else torch.tensor(float(other), dtype=torch.float64)
    factor = 1 / value if op.name == "div" else value
    if not bool(factor.isfinite().all()):
        raise Refused(Reason.NONFINITE, f"the factor of {op.label} is not finite")
    return factor


def _cat_back(node: fx.Node, op: Operation, wanted: AffineMap, graph: ModelGraph) -> list[Way]:
    axis = joined_axis(op, wanted.rank)
    require(len(set(op.inputs)) == len(op.inputs), op)
    start, way = 0, []
    for value in op.inputs:
        size = _size(value, axis, wanted.rank, op, graph)
        part = wanted.transform(lambda t, s=start, n=size: t if t.shape[axis] == 1 else t.narrow(axis, s, n))
        way.append((value, part))
        start += size
    return [way]


def _cat_forward(node: fx.Node, op: Operation, origin: fx.Node, given: AffineMap, graph: ModelGraph) -> AffineMap:
    axis = joined_axis(op, given.rank)
    scales, shifts = [], []
    for value in op.inputs:
        size = _size(value, axis, given.rank, op, graph)
        for pieces, whole, neutral in ((scales, given.scale, torch.ones), (shifts, given.shift, torch.zeros)):
            shape = list(whole.shape)
            shape[axis] = size
            pieces.append(whole.expand(shape) if value is origin else neutral(shape, dtype=torch.float64))
    return AffineMap(torch.cat(scales, axis), torch.cat(shifts, axis))


JOINING: dict[str, tuple[Backward, Forward]] = {
    "add": (_add_back, _add_forward),
    "sub": (_add_back, _add_forward),
    "mul": (_multiply_back, _multiply_forward),
    "div": (_multiply_back, _multiply_forward),
    "cat": (_cat_back, _cat_forward),
}


# small questions


def _require_plain_add(op: Operation) -> None:
    require(op.args.get("alpha", 1) == 1, op)


def _operands(op: Operation) -> list[Any]:
    values = [op.args.get(key) for key in ("input", "other")]
    require(None not in values, op)
    return values


_JOINED = {"hstack": 1, "column_stack": 1, "vstack": 0, "row_stack": 0, "dstack": 2}


def joined_axis(op: Operation, rank: int) -> int:
    """Return the axis along which a concatenation joins values of this rank."""
    axis = _JOINED.get(op.args.get("function", ""))
    return axes_of(op.args.get("dim", 0), rank)[0] if axis is None else min(axis, rank - 1)


def _size(value: fx.Node, axis: int, rank: int, op: Operation, graph: ModelGraph) -> int:
    shape = graph.shape(value)
    if shape is not None:
        require(len(shape) == rank, op)  # an old spelling joins an empty vector to a value of any rank
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
        require(known_rank(value, op, graph) == m.rank, op)
        return m
    lost = m.rank - len(shape)
    for axis in range(m.rank):
        if m.varies(axis) and (axis < lost or shape[axis - lost] == 1):
            text = f"{op.label} repeats {named(value, graph)} along axis {axis}, where the map varies"
            raise Refused(Reason.AXIS, text)
    return m.transform(lambda t: t.reshape(t.shape[lost:]))


def _of_rank(m: AffineMap, node: fx.Node, op: Operation, graph: ModelGraph) -> AffineMap:
    """Return a map on an operand as one on the result, whose rank may be higher."""
    missing = known_rank(node, op, graph) - m.rank if graph.shape(node) is not None else 0
    return m.transform(lambda t: t.reshape((1,) * missing + tuple(t.shape)))
