"""Operations that only move values: reshape, permute, split, slices, pixel shuffle, roll, expand.

Such an operation is read as ``y.flat[j] = x.flat[index[j]]``; the index is found by running the operation itself on the
positions of ``x``. A map on ``y`` is then a map on ``x`` wherever equal positions ask for equal values. At positions
that ``y`` does not show it is free if nobody else reads ``x``, and identity otherwise. A map on ``x`` is always one on
``y``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from normfuse.affine import AffineMap, compress, fill, identity
from normfuse.base import Reason, Refused
from normfuse.capture.following import pick
from normfuse.graph import ModelGraph
from normfuse.operations import Operation, describe

_LARGEST = 50_000_000  # positions; above it the index alone would take gigabytes
_SHAPE_ONLY = ("expand_as", "view_as", "reshape_as", "type_as")


def is_gather(node: fx.Node, graph: ModelGraph) -> bool:
    """Whether a node only moves values."""
    return describe(node, graph).name == "gather"


def source_of(node: fx.Node) -> fx.Node:
    """Return the value that a gather takes its values from: for one part of a split, what was split."""
    first = node.all_input_nodes[0]
    return first.all_input_nodes[0] if node.target is pick else first


def index_of(node: fx.Node, graph: ModelGraph) -> Tensor:
    """Return the flat positions in the source that the values of ``node`` come from, in the shape of ``node``.

    Raises:
        Refused: The shape is not known, or the operation depends on other values.
    """
    if "gather_index" not in node.meta:
        node.meta["gather_index"] = _run(node, graph)
    return node.meta["gather_index"]


def backward(node: fx.Node, wanted: AffineMap, graph: ModelGraph) -> AffineMap:
    """Return the map on the source that gives the map ``wanted`` on ``node`` and leaves what others may see.

    Raises:
        Refused: Positions that stem from one value want different things, or shapes are not known.
    """
    if graph.shape(node) is None:
        return _without_shapes(node, wanted, graph, forwards=False)
    index = index_of(node, graph).reshape(-1)
    full = identity(_known_shape(source_of(node), graph))
    if _reads_alone(node, graph):
        full = full.transform(lambda t: torch.full_like(t, torch.nan))
    scale, shift = (t.expand(_known_shape(node, graph)).reshape(-1) for t in (wanted.scale, wanted.shift))
    full.scale.view(-1)[index], full.shift.view(-1)[index] = scale, shift
    if not (torch.equal(full.scale.view(-1)[index], scale) and torch.equal(full.shift.view(-1)[index], shift)):
        raise Refused(Reason.AXIS, f"{describe(node, graph).label} repeats values that would need different maps")
    return fill(full)


def _reads_alone(node: fx.Node, graph: ModelGraph) -> bool:
    """Whether what a gather does not show of its source is read by nobody."""
    operation = node.all_input_nodes[0] if node.target is pick else node
    parts = operation.users if node.target is pick else ()
    return len(graph.consumers(source_of(node))) == 1 and all(part is node or not part.users for part in parts)


def forward(node: fx.Node, given: AffineMap, graph: ModelGraph) -> AffineMap:
    """Return the map on ``node`` that follows from a map on its source."""
    if graph.shape(node) is None:
        return _without_shapes(node, given, graph, forwards=True)
    shape = _known_shape(source_of(node), graph)
    index = index_of(node, graph)
    return compress(given.transform(lambda t: t.expand(shape).reshape(-1)[index]))


def shows_apart(node: fx.Node, siblings: list[fx.Node], graph: ModelGraph) -> bool:
    """Whether ``node`` shows none of the source's values that a sibling gather of the same source shows."""
    size = int(torch.Size(_known_shape(source_of(node), graph)).numel())
    seen = torch.zeros(size, dtype=torch.bool)
    seen[index_of(node, graph).reshape(-1)] = True
    return not any(bool(seen[index_of(other, graph).reshape(-1)].any()) for other in siblings)


def _run(node: fx.Node, graph: ModelGraph) -> Tensor:
    operation = node.args[0] if node.target is pick else node
    assert isinstance(operation, fx.Node)
    origin = source_of(node)
    shape = _known_shape(origin, graph)
    size = int(torch.Size(shape).numel())
    if size > _LARGEST:
        raise Refused(Reason.RANK_UNKNOWN, f"{origin.name} is too large to follow", "pass smaller example_inputs")
    positions = torch.arange(size, dtype=torch.float64).reshape(shape)  # float: some of these operations need it
    if node.meta.get("dtype") != origin.meta.get("dtype"):  # a view of the bits as those of other numbers
        raise Refused(Reason.OPAQUE_OPERATION, f"{describe(node, graph).label} makes other numbers of the same bits")
    moved = _apply(operation, origin, positions, graph)
    if node.target is pick:
        moved = moved[node.args[1]]
    if not isinstance(moved, Tensor) or tuple(moved.shape) != _known_shape(node, graph):
        raise Refused(Reason.OPAQUE_OPERATION, f"{describe(node, graph).label} cannot be followed")
    return moved.long()


def _apply(node: fx.Node, origin: fx.Node, positions: Tensor, graph: ModelGraph) -> Any:
    operation: Operation = describe(node, graph)

    def stand_in(value: fx.Node) -> Tensor:
        if value is origin:
            return positions
        if graph.is_constant(value):
            return graph.value(value)
        if operation.args.get("function") in _SHAPE_ONLY:
            return torch.empty(_known_shape(value, graph))
        raise Refused(Reason.OPAQUE_OPERATION, f"{operation.label} depends on other values")

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), stand_in)  # type: ignore[arg-type]
    module = graph.module_of(node)
    with torch.no_grad():
        if module is not None:
            return module.forward(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _known_shape(node: fx.Node, graph: ModelGraph) -> tuple[int, ...]:
    shape = graph.shape(node)
    if shape is None:
        raise Refused(Reason.RANK_UNKNOWN, f"the shape of {node.name} is not known", "pass example_inputs")
    return shape


def _without_shapes(node: fx.Node, given: AffineMap, graph: ModelGraph, *, forwards: bool) -> AffineMap:
    """Follow the one case that needs no shapes: flattening what was pooled to one position per channel."""
    operation, source = describe(node, graph), describe(source_of(node), graph)
    pooled = source.name == "adaptive_avg_pool" and source.args.get("output_size") in (1, (1, 1), [1, 1])
    args = operation.args
    flattens = node.op == "call_module" or args.get("function") == "flatten"
    if not (pooled and flattens and args.get("start_dim", 0) == 1):
        raise Refused(Reason.RANK_UNKNOWN, f"the shapes around {operation.label} are not known", "pass example_inputs")
    shape = (1, -1) if forwards else (1, -1, 1, 1)
    return given.transform(lambda t: t.reshape(shape))
