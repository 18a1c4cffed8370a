"""Walk a per-channel map from a norm to the constants that absorb it, backwards or forwards.

Backwards, the value in front of the norm must come to carry the map, so each value on the way may have one reader
only. Forwards, every reader of the norm's output must absorb the map. Each operation states its rule in a table; an
operation without one refuses, by name. A route only collects edits in its plan; nothing changes before it is complete.

The rule of an operation that hands the map on, ``follow(node, map, forwards) -> map``, serves both directions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from normfuse.base import Reason, Refused
from normfuse.lowering.onnx_graph.channel_map import ChannelMap
from normfuse.lowering.onnx_graph.plan import Plan
from normfuse.lowering.onnx_graph.values import constant, exact, is_standard, label, require_sole_use, weight

MAX_STEPS = 256  # bounds the work on a hostile graph; the routes of real models have fewer than 20 steps

Backward = Callable[["Route", ir.Node, ChannelMap], None]
Forward = Callable[["Route", ir.Node, int, ChannelMap], None]
Follow = Callable[["Route", ir.Node, ChannelMap, bool], ChannelMap]

BACKWARDS: dict[str, Backward] = {}
FORWARDS: dict[str, Forward] = {}


class Route:
    """One attempt to place the map of one norm.

    Attributes:
        opset: Version of the standard operator set, which decides what a BatchNormalization means.
        plan: The edits collected so far.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.plan = Plan()
        self._steps = 0

    def backwards(self, node: ir.Node, index: int, m: ChannelMap) -> None:
        """Make input ``index`` of ``node`` carry the map.

        Raises:
            Refused: Naming the operation or value that stopped the route.
        """
        value = node.inputs[index]
        if m.is_identity or value is None:
            return
        if constant(value) is not None:
            self._into_constant(node, index, m)
            return
        producer = value.producer()
        if producer is None:
            raise Refused(Reason.NO_PRODUCER, f"{value.name} is an input of the graph")
        if producer.graph is not node.graph:
            raise Refused(Reason.OPAQUE_OPERATION, f"{value.name} comes from outside the subgraph of {label(node)}")
        require_sole_use(value)
        rule = BACKWARDS.get(producer.op_type) if is_standard(producer) else None
        if rule is None or value is not producer.outputs[0]:
            raise _opaque(producer)
        self._step(producer)
        with named(producer):
            rule(self, producer, m)

    def forwards(self, value: ir.Value, m: ChannelMap) -> None:
        """Make every reader of ``value`` act as if it carried the map.

        Raises:
            Refused: Naming the operation or value that stopped the route.
        """
        if m.is_identity:
            return
        if value.is_graph_output():
            raise Refused(Reason.EXTRA_CONSUMER, f"{value.name} is an output of the graph")
        producer = value.producer()
        for node, index in list(value.uses()):
            if producer is not None and node.graph is not producer.graph:
                raise Refused(Reason.OPAQUE_OPERATION, f"{value.name} is read inside a subgraph by {label(node)}")
            rule = FORWARDS.get(node.op_type) if is_standard(node) else None
            if rule is None:
                raise _opaque(node)
            self._step(node)
            with named(node):
                rule(self, node, index, m)

    def add_after(self, value: ir.Value, array: np.ndarray, dtype: np.dtype) -> None:
        """Plan a constant added to a value; see :meth:`Plan.add_after`."""
        if self.opset < 7:
            raise Refused(Reason.NO_BIAS, f"{value.name} needs an Add that broadcasts, which opset {self.opset} lacks")
        self.plan.add_after(value, array, dtype)

    def first_of(self, attempts: list[Callable[[], None]]) -> None:
        """Run the attempts until one is not refused, undoing the others; raise the first refusal if all are."""
        refused: Refused | None = None
        for attempt in attempts:
            mark = self.plan.mark()
            try:
                attempt()
            except Refused as refusal:
                self.plan.rollback(mark)
                refused = refused or refusal
            else:
                return
        if refused is not None:
            raise refused

    def _into_constant(self, node: ir.Node, index: int, m: ChannelMap) -> None:
        array = exact(node, index)
        if array.ndim <= m.axis:
            raise Refused(Reason.AXIS, f"the constant input of {label(node)} has no axis {m.axis}")
        scale, shift = m.aligned(array.ndim)
        self.plan.write(node, index, scale * array + shift, weight(node, index).dtype)

    def _step(self, node: ir.Node) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise Refused(Reason.OPAQUE_OPERATION, f"the route is longer than {MAX_STEPS} steps at {label(node)}")


@contextlib.contextmanager
def named(node: ir.Node) -> Iterator[None]:
    """Turn any error of a rule into a refusal that names the node: a fold never fails for one that it can leave.

    Raises:
        Refused: The rule's own, or that the node cannot be followed.
    """
    try:
        yield
    except Refused:
        raise
    except (OSError, MemoryError):  # weights outside the file cannot be read: no matter of the graph
        raise
    except Exception as error:
        text = f"{label(node)} ({node.op_type}) cannot be followed ({type(error).__name__})"
        raise Refused(Reason.OPAQUE_OPERATION, text) from error


def register(op_type: str, backward: Backward | None, forward: Forward | None) -> None:
    """Enter the rules of an operation in the tables; None where a direction has none."""
    if backward is not None:
        BACKWARDS[op_type] = backward
    if forward is not None:
        FORWARDS[op_type] = forward


def register_follow(op_type: str, follow: Follow) -> None:
    """Enter an operation that hands the map from its first input to its first output, and the reverse."""

    def backward(route: Route, node: ir.Node, m: ChannelMap) -> None:
        route.backwards(node, 0, follow(route, node, m, False))

    def forward(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
        if index != 0:
            raise Refused(Reason.OPAQUE_OPERATION, f"{label(node)} reads the value as its input {index}")
        route.forwards(node.outputs[0], follow(route, node, m, True))

    register(op_type, backward, forward)


def _opaque(node: ir.Node) -> Refused:
    kind = node.op_type if is_standard(node) else f"{node.domain}::{node.op_type}"
    return Refused(Reason.OPAQUE_OPERATION, f"{label(node)} ({kind}) has no rule")
