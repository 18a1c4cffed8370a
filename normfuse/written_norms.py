"""Find norms that a model writes out in torch operations, outside of any layer for it.

    LayerNorm    d = x - x.mean(-1, keepdim=True);   d / (d.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    RMSNorm      x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

in any of the usual spellings: a variance by ``var``, a square by ``pow``, ``*`` or ``square``, a root by ``sqrt``,
``rsqrt`` or a power, eps in the root, outside of it or nowhere. What norm it is follows from the axes of the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from normfuse.graph import ModelGraph
from normfuse.operations import Operation, describe

_KEEP = ("identity", "gather")  # casts, and the views that bring a statistic to the rank of what it divides


@dataclass(frozen=True, slots=True)
class WrittenNorm:
    """A norm without gain and shift, written out.

    Attributes:
        node: What divides, or multiplies by the inverse root; its value is the normalized one.
        kind: ``"LayerNorm"``, ``"RMSNorm"``, ``"InstanceNorm"`` or ``"BatchNorm"``.
    """

    node: fx.Node
    kind: str


def find(graph: ModelGraph) -> Iterator[WrittenNorm]:
    """Yield the norms that are written out in a graph, in order of execution."""
    for node in graph.nodes:
        operation = describe(node, graph)
        if operation.name in ("div", "mul") and len(operation.inputs) == 2 and not graph.is_constant(node):
            found = _written(node, operation, graph)
            if found is not None:
                yield found


def _written(node: fx.Node, operation: Operation, graph: ModelGraph) -> WrittenNorm | None:
    """Return the norm that ends at a division ``d / s`` or a product ``d * r``."""
    left, right = operation.inputs
    for value, divisor in ((left, right), (right, left)) if operation.name == "mul" else ((left, right),):
        square = _mean_square(divisor, graph, inverted=operation.name == "mul")
        if square is None:
            continue
        statistic, axes = square
        value = _without_factor(_plain(value, graph), graph)
        centre, of = _centred(value, graph), _plain(statistic, graph)
        if of is value or (centre is not None and centre in (of, _centred(of, graph))):
            kind = _kind(of, axes, centred=centre is not None, graph=graph)
            return WrittenNorm(node, kind) if kind is not None else None
    return None


def _plain(node: fx.Node, graph: ModelGraph) -> fx.Node:
    """Return the value that a node shows in another dtype."""
    while describe(node, graph).name == "identity" and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _without_factor(node: fx.Node, graph: ModelGraph) -> fx.Node:
    """Return ``d`` where a gain multiplies it before the division."""
    active = [n for n in node.all_input_nodes if not graph.is_constant(n)]
    gained = describe(node, graph).name == "mul" and len(active) == 1 < len(node.all_input_nodes)
    return _plain(active[0], graph) if gained else node


def _shown(node: fx.Node, graph: ModelGraph) -> fx.Node:
    """Return the value that a node shows in another dtype or shape."""
    while describe(node, graph).name in _KEEP and node.args and isinstance(node.args[0], fx.Node):
        if describe(node.args[0], graph).name == "var_mean":
            return node
        node = node.args[0]
    return node


def _centred(node: fx.Node, graph: ModelGraph) -> fx.Node | None:
    """Return ``x`` where a node is ``x`` minus its mean."""
    operation = describe(node, graph)
    if operation.name != "sub" or len(operation.inputs) != 2:
        return None
    value, mean = _plain(operation.inputs[0], graph), _shown(operation.inputs[1], graph)
    step = describe(mean, graph)
    of = step.inputs[0] if step.name == "mean" else _part_of_both(mean, 1, graph)
    return value if of is not None and _plain(of, graph) is value else None


def _part_of_both(node: fx.Node, index: int, graph: ModelGraph) -> fx.Node | None:
    """Return ``x`` where a node is the variance (0) or the mean (1) of ``torch.var_mean(x)``."""
    both = node.args[0] if len(node.args) == 2 and node.args[1] == index else None
    found = isinstance(both, fx.Node) and describe(both, graph).name == "var_mean"
    return both.all_input_nodes[0] if found and isinstance(both, fx.Node) else None


def _mean_square(node: fx.Node, graph: ModelGraph, *, inverted: bool) -> tuple[fx.Node, Any] | None:
    """Return ``(values, axes)`` where a node is the root, or its inverse, of a mean of squares or of a variance."""
    node = _shown(node, graph)
    operation = describe(node, graph)
    if inverted and operation.name in ("rdiv", "rtruediv"):  # 1 / s, as torch's operators call it
        return _mean_square(operation.inputs[0], graph, inverted=False) if node.args[1:] == (1,) else None
    if inverted and operation.name in ("reciprocal", "div"):
        direct = operation.name == "reciprocal" or node.args[0] == 1
        return _mean_square(operation.inputs[0], graph, inverted=False) if direct else None
    if not inverted and operation.name == "add" and len(operation.inputs) == 1:  # eps outside of the root
        return _mean_square(operation.inputs[0], graph, inverted=False)
    if not inverted and operation.name == "std":
        return operation.inputs[0], operation.args.get("dim")
    root = {("sqrt", False), ("rsqrt", True)}
    power = operation.name == "pow" and node.args[1:2] == ((-0.5,) if inverted else (0.5,))
    if (operation.name, inverted) not in root and not power:
        return None
    inner = _shown(operation.inputs[0], graph)
    step = describe(inner, graph)
    if step.name in ("add", "clamp", "clamp_min") and len(step.inputs) == 1:
        inner = _shown(step.inputs[0], graph)
    return _squares(inner, graph)


def _squares(node: fx.Node, graph: ModelGraph) -> tuple[fx.Node, Any] | None:
    operation = describe(node, graph)
    both = _part_of_both(node, 0, graph)
    if both is not None:
        return both, describe(node.all_input_nodes[0], graph).args.get("dim")
    if operation.name == "var":
        return operation.inputs[0], operation.args.get("dim")
    if operation.name != "mean":
        return None
    inner = _plain(operation.inputs[0], graph)
    square = describe(inner, graph)
    itself = square.name == "mul" and len(square.inputs) == 2 and square.inputs[0] is square.inputs[1]
    power = square.name == "pow" and inner.args[1:2] in ((2,), (2.0,))
    return (square.inputs[0], operation.args.get("dim")) if itself or power or square.name == "square" else None


def _kind(value: fx.Node, axes: Any, *, centred: bool, graph: ModelGraph) -> str | None:
    """Return what norm takes its statistics over these axes, None for one that is not known by a name."""
    shape = graph.shape(value)
    found = (axes,) if isinstance(axes, int) else tuple(axes) if isinstance(axes, list | tuple) else ()
    rank = len(shape) if shape is not None else None
    found = tuple(sorted(axis % rank for axis in found)) if rank is not None else found
    if not found:
        return None
    if 0 in found:
        return "BatchNorm"
    if rank is not None and rank > 3 and found == tuple(range(2, rank)):
        return "InstanceNorm"
    return "LayerNorm" if centred else "RMSNorm"
