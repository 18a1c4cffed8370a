"""The edits of one fold: collected while a route is walked, made together or not at all.

Arrays come in float64 and are cast once, to the dtype of what they replace; a finite number that the dtype cannot hold
refuses the fold. An initializer that other nodes read as well is not changed: the node at hand gets its own copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from normfuse.base import Reason, Refused
from normfuse.lowering.onnx_graph.values import constant, label


class Names:
    """Hands out value names that the model does not use yet, in any of its graphs."""

    def __init__(self, model: ir.Model) -> None:
        self._taken = {v.name for graph in model.graphs() for v in ir.convenience.create_value_mapping(graph).values()}

    def fresh(self, stem: str) -> str:
        """Return ``stem``, with a number if it is taken, and mark it as taken."""
        name, count = stem, 0
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        return name


@dataclass(slots=True)
class Plan:
    """Edits by node: new constants, new attributes, and at most one Add behind a node that has no bias."""

    writes: list[tuple[ir.Node, int, np.ndarray]] = field(default_factory=list)
    attributes: list[tuple[ir.Node, ir.Attr]] = field(default_factory=list)
    additions: list[tuple[ir.Value, np.ndarray]] = field(default_factory=list)
    partners: list[ir.Node] = field(default_factory=list)

    def write(self, node: ir.Node, index: int, array: np.ndarray, dtype: np.dtype) -> None:
        """Set input ``index`` of a node to an array, given in float64, in ``dtype``.

        Raises:
            Refused: ``RANGE`` where a number does not fit, ``OPAQUE_OPERATION`` where two routes meet in the node.
        """
        if any(node is other and index == i for other, i, _ in self.writes):
            raise Refused(Reason.OPAQUE_OPERATION, f"the map reaches {label(node)} along two routes")
        self.writes.append((node, index, _cast(array, dtype, node)))
        if node not in self.partners:
            self.partners.append(node)

    def set(self, node: ir.Node, attribute: ir.Attr) -> None:
        """Set an attribute of a node."""
        self.attributes.append((node, attribute))

    def add_after(self, value: ir.Value, array: np.ndarray, dtype: np.dtype) -> None:
        """Add a constant to a value: in the Add that alone reads it with a constant, or else in a new Add.

        Raises:
            Refused: ``NOT_CHEAPER`` at the second new Add: one norm would become two additions.
        """
        uses = list(value.uses())
        if len(uses) == 1 and not value.is_graph_output() and uses[0].node.op_identifier() == ("", "Add", ""):
            other = 1 - uses[0].idx
            present = constant(uses[0].node.inputs[other])
            if present is not None:
                self.write(uses[0].node, other, present.astype(np.float64) + array, present.dtype)
                return
        if self.additions:
            raise Refused(Reason.NOT_CHEAPER, f"the shift would need an Add after {value.name} and one elsewhere")
        producer = value.producer()
        assert producer is not None
        self.additions.append((value, _cast(array, dtype, producer)))

    def mark(self) -> tuple[int, int, int, int]:
        """Return a point to which :meth:`rollback` can return."""
        return len(self.writes), len(self.attributes), len(self.additions), len(self.partners)

    def rollback(self, mark: tuple[int, int, int, int]) -> None:
        """Forget every edit since ``mark``."""
        lists: tuple[list, ...] = (self.writes, self.attributes, self.additions, self.partners)
        for edits, length in zip(lists, mark, strict=True):
            del edits[length:]

    def commit(self, names: Names) -> None:
        """Make the edits; asks nothing."""
        for node, index, array in self.writes:
            _assign(node, index, array, names)
        for node, attribute in self.attributes:
            node.attributes[attribute.name] = attribute
        for value, array in self.additions:
            _insert_add(value, array, names)


def remove_norm(node: ir.Node) -> None:
    """Remove a norm whose map has moved: its readers read its input, which takes over the name of a graph output."""
    before, after, graph = node.inputs[0], node.outputs[0], node.graph
    assert before is not None
    assert graph is not None
    if after.is_graph_output():
        before = _renamable(before, node)
        before.shape, before.type = after.shape, after.type
        after.replace_all_uses_with(before, replace_graph_outputs=True)
        name, after.name = after.name, None
        before.name = name
    else:
        after.replace_all_uses_with(before)
    parameters = node.inputs[1:]
    graph.remove(node, safe=True)
    for value in parameters:
        prune(value)


def prune(value: ir.Value | None) -> None:
    """Remove what produced a value that nothing reads any more, and its own inputs in turn."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    if value.is_initializer():
        assert value.graph is not None
        assert value.name is not None
        value.graph.initializers.pop(value.name)
        return
    node = value.producer()
    if node is None or node.graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
        return
    inputs = node.inputs
    node.graph.remove(node, safe=True)
    for before in inputs:
        prune(before)


def _renamable(value: ir.Value, reader: ir.Node) -> ir.Value:
    """Return the value, or an Identity of it where it has a name to keep or belongs to another graph."""
    producer, graph = value.producer(), reader.graph
    assert graph is not None
    if producer is not None and producer.graph is graph and len(value.uses()) == 1 and not value.is_graph_output():
        return value
    copy = ir.Node("", "Identity", [value], name=label(reader))
    graph.insert_before(reader, copy)
    return copy.outputs[0]


def _cast(array: np.ndarray, dtype: np.dtype, node: ir.Node) -> np.ndarray:
    if not np.isfinite(array).all():
        raise Refused(Reason.NONFINITE, f"folding into {label(node)} gives non-finite numbers")
    with np.errstate(over="ignore", under="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast.astype(np.float64)).all():
        raise Refused(
            Reason.RANGE,
            f"{label(node)} would hold {np.abs(array).max():.4g}, beyond {np.dtype(dtype).name}",
            "fold in float32 first",
        )
    return cast


def _assign(node: ir.Node, index: int, array: np.ndarray, names: Names) -> None:
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    old = node.inputs[index]
    if old is not None and old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output():
        _fill(old, array)
        return
    stem = old.name if old is not None and old.name else f"{label(node)}_{'shift' if index else 'scale'}"
    new = ir.Value(name=names.fresh(f"{stem}_folded"))
    _fill(new, array)
    assert node.graph is not None
    node.graph.initializers.add(new)
    node.replace_input_with(index, new)
    prune(old)


def _fill(value: ir.Value, array: np.ndarray) -> None:
    tensor = ir.tensor(array, name=value.name)
    value.const_value = tensor
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)


def _insert_add(value: ir.Value, array: np.ndarray, names: Names) -> None:
    producer = value.producer()
    assert producer is not None
    assert producer.graph is not None
    graph, stem = producer.graph, value.name or label(producer)
    shift = ir.Value(name=names.fresh(f"{stem}_shift"))
    _fill(shift, array)
    graph.initializers.add(shift)
    total = ir.Value(name=names.fresh(f"{stem}_shifted"), shape=value.shape, type=value.type)
    value.replace_all_uses_with(total, replace_graph_outputs=True)
    graph.insert_after(producer, ir.Node("", "Add", [value, shift], outputs=[total], name=f"{stem}_shift"))
    if total.is_graph_output():
        value.name, total.name = total.name, value.name
