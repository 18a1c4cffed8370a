"""Means, variances and inverse deviations, written out in ONNX nodes: of which value, over which axes.

    mean       ReduceMean(x);   ReduceSum(x) * (1/n);   ReduceSum(x) / n
    variance   mean((x - mean(x))^2);   mean(x^2) - mean(x)^2, perhaps not below zero     (tf2onnx, jax2tf)
    inverse    1 / sqrt(variance + eps), as Reciprocal, Div or Pow

A statistic may be brought back to the rank of its input, with size 1 along the axes, by Reshape, Unsqueeze or Expand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from normfuse.base import Refused
from normfuse.lowering.onnx_graph.values import constant, dims, integers, is_standard

_SHAPES = ("Identity", "Reshape", "Unsqueeze", "Expand")


@dataclass(frozen=True, slots=True, eq=False)
class Statistic:
    """A mean or variance of ``x`` over axes, counted from the front, in order."""

    x: ir.Value
    axes: tuple[int, ...]

    def same(self, other: Statistic | None) -> bool:
        """Whether both are of the same values."""
        return other is not None and self.x is other.x and self.axes == other.axes


def producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the standard node that makes a value, if it is one of these operators."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in operators and is_standard(node) else None


def operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the two inputs of a binary node."""
    return node.inputs[0], node.inputs[1]


def number(value: ir.Value | None) -> float | None:
    """Return the number that a constant of one element holds."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def squared(value: ir.Value | None) -> ir.Value | None:
    """Return ``d`` where a value is its square."""
    node = producer(value, "Mul")
    if node is not None and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    node = producer(value, "Pow")
    return node.inputs[0] if node is not None and number(node.inputs[1]) == 2 else None


def mean(value: ir.Value | None) -> Statistic | None:
    """Return of what a value is the mean."""
    value = _bare(value)
    node = producer(value, "ReduceMean")
    if node is not None:
        return _reduced(node)
    node = producer(value, "Mul", "Div")
    for total, factor in (operands(node), operands(node)[::-1]) if node is not None else ():
        summed, count = producer(total, "ReduceSum"), number(factor)
        found = _reduced(summed) if summed is not None and count else None
        if found is None or count is None or node is None or (node.op_type == "Div" and total is not node.inputs[0]):
            continue
        sizes = [dims(found.x)[axis] for axis in found.axes]
        size = math.prod(n for n in sizes if isinstance(n, int)) if all(isinstance(n, int) for n in sizes) else None
        if size is not None and math.isclose(count if node.op_type == "Div" else 1 / count, size, rel_tol=1e-6):
            return found
    return None


def centred(value: ir.Value | None) -> Statistic | None:
    """Return the mean that was subtracted where a value is ``x - mean(x)``."""
    node = producer(value, "Sub")
    found = mean(node.inputs[1]) if node is not None else None
    return found if found is not None and node is not None and found.x is node.inputs[0] else None


def variance(value: ir.Value | None) -> Statistic | None:
    """Return of what a value is the biased variance."""
    value = _bare(value)
    node = producer(value, "Max")
    if node is not None and len(node.inputs) == 2:
        left, right = operands(node)
        value = right if number(left) == 0 else left if number(right) == 0 else value
    node = producer(value, "Sub")
    if node is not None:  # E[x^2] - E[x]^2
        of_square, square = mean(node.inputs[0]), squared(_bare(node.inputs[1]))
        found = mean(square) if square is not None else None
        x = squared(of_square.x) if of_square is not None else None
        right = found is not None and of_square is not None and found.axes == of_square.axes and found.x is x
        return found if right else None
    of_square = mean(value)
    found = centred(squared(of_square.x)) if of_square is not None else None
    return found if found is not None and of_square is not None and found.axes == of_square.axes else None


def deviation(value: ir.Value | None) -> tuple[Statistic, float] | None:
    """Return ``(variance, eps)`` where a value is ``sqrt(variance + eps)``."""
    value = _bare(value)
    node = producer(value, "Sqrt", "Pow")
    if node is None or (node.op_type == "Pow" and number(node.inputs[1]) != 0.5):
        return None
    return _with_eps(node.inputs[0])


def inverse(value: ir.Value | None) -> tuple[Statistic, float] | None:
    """Return ``(variance, eps)`` where a value is ``1 / sqrt(variance + eps)``."""
    value = _bare(value)
    node = producer(value, "Reciprocal")
    if node is not None:
        return deviation(node.inputs[0])
    node = producer(value, "Div")
    if node is not None and number(node.inputs[0]) == 1:
        return deviation(node.inputs[1])
    node = producer(value, "Pow")
    return _with_eps(node.inputs[0]) if node is not None and number(node.inputs[1]) == -0.5 else None


def _with_eps(value: ir.Value | None) -> tuple[Statistic, float] | None:
    node = producer(value, "Add")
    for inner, eps in (operands(node), operands(node)[::-1]) if node is not None else ():
        found, known = variance(inner), number(eps)
        if found is not None and known is not None and known > 0:
            return found, known
    return None


def _reduced(node: ir.Node) -> Statistic | None:
    x = node.inputs[0]
    try:
        axes, rank = integers(node, "axes", 1), len(dims(x))
    except Refused:  # computed axes, or an unknown rank
        return None
    if x is None or not axes:
        return None
    return Statistic(x, tuple(sorted(axis % rank for axis in axes)))


def _bare(value: ir.Value | None) -> ir.Value | None:
    """Return a statistic before it was brought to a rank, as far as only sizes of one came and went."""
    node = producer(value, *_SHAPES)
    while node is not None and _keeps_values(node):
        value = node.inputs[0]
        node = producer(value, *_SHAPES)
    return value


def _keeps_values(node: ir.Node) -> bool:
    """Whether the sizes other than one are the same before and after; one symbol may have got another name."""
    try:
        before, after = ([n for n in dims(value) if n != 1] for value in (node.inputs[0], node.outputs[0]))
    except Refused:
        return False
    different = [(a, b) for a, b in zip(before, after, strict=False) if a != b]
    symbols = all(not isinstance(a, int) and not isinstance(b, int) for a, b in different)
    return len(before) == len(after) and len(different) <= 1 and symbols


def vector(value: ir.Value | None, axes: tuple[int, ...], shape: tuple[object, ...]) -> np.ndarray | None:
    """Return a constant that varies along the axes alone, in their shape; None for any other value."""
    array = constant(value)
    if array is None or array.ndim > len(shape):
        return None
    array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    sizes = tuple(shape[axis] for axis in axes)
    if not all(isinstance(n, int) for n in sizes):
        return None
    if any(n not in ((1, shape[axis]) if axis in axes else (1,)) for axis, n in enumerate(array.shape)):
        return None
    return np.broadcast_to(array, [n if i in axes else 1 for i, n in enumerate(shape)]).reshape(sizes)  # type: ignore[arg-type]
