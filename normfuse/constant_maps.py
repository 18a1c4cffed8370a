"""A module that only adds constants to its input and multiplies it by constants, read from what it did.

    y = (x - mean) / (var + eps).sqrt() * weight + bias,      y = (x + b) * exp(s),      ...

A BatchNorm on frozen or estimated statistics, or an ActNorm, that somebody wrote out: one value comes in, every step
has one operand that depends on the input, and one value goes out. The constants may have any shape that broadcasts to
the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.affine import AffineMap
from normfuse.graph import ModelGraph, ModuleCall
from normfuse.numerics import exact
from normfuse.operations import describe

_STEPS = ("add", "sub", "rsub", "mul", "div", "neg")


@dataclass(frozen=True, slots=True)
class ConstantMap:
    """One call of such a module.

    Attributes:
        value: What comes in.
        nodes: Its steps, in order; the first reads ``value``, the last is what goes out.
    """

    value: fx.Node
    nodes: tuple[fx.Node, ...]

    def affine(self, graph: ModelGraph, rank: int) -> AffineMap | None:
        """Return the map over an input of this rank, None where a constant has more axes than the input."""
        m = AffineMap(torch.ones((1,) * rank).double(), torch.zeros((1,) * rank).double())
        for node in self.nodes:
            step = _step(node, graph)
            if step.rank > rank:
                return None
            m = step.after(m)
        return m


def of_call(call: ModuleCall, graph: ModelGraph) -> ConstantMap | None:
    """Return the map of one call of a module that was read through, None if it does anything else."""
    if not call.single_output or len(call.outputs) != 1 or len(call.inputs) != 1:
        return None
    nodes: list[fx.Node] = []
    node, value = call.outputs[0], call.inputs[0]
    while node is not value:
        source = _source(node, graph) if call in node.meta.get("scope", ()) else None
        if source is None or (nodes and set(node.users) != {nodes[0]}):
            return None
        nodes.insert(0, node)
        node = source
    changing = any(describe(node, graph).name != "identity" for node in nodes)
    return ConstantMap(value, tuple(nodes)) if changing else None


def _source(node: fx.Node, graph: ModelGraph) -> fx.Node | None:
    """Return the one value that depends on the input in a step, None if the node is no such step."""
    name = describe(node, graph).name
    active = [n for n in node.all_input_nodes if not graph.is_constant(n)]
    if node.op == "call_module" or len(active) != 1 or (name not in _STEPS and name != "identity"):
        return None
    if name == "identity" or name == "neg":
        return active[0]
    plain = len(node.args) == 2 and not node.kwargs and active[0] in node.args
    divides = name == "div" and node.args[1] is active[0]
    return active[0] if plain and not divides and _constant(node, graph) is not None else None


def _constant(node: fx.Node, graph: ModelGraph) -> Any:
    """Return the operand of a step that does not depend on the input: a constant node or a number."""
    if describe(node, graph).name in ("identity", "neg"):
        return None
    others = [a for a in node.args if not isinstance(a, fx.Node) or graph.is_constant(a)]
    known = len(others) == 1 and isinstance(others[0], fx.Node | int | float)
    return others[0] if known else None


def _values(operand: Any, graph: ModelGraph) -> Tensor:
    return exact(graph.value(operand)) if isinstance(operand, fx.Node) else torch.tensor(float(operand)).double()


def _step(node: fx.Node, graph: ModelGraph) -> AffineMap:
    """Return what one step does, of the rank of its constant."""
    name = describe(node, graph).name
    operand = _constant(node, graph)
    if operand is None:
        sign = torch.tensor(-1.0 if name == "neg" else 1.0).double()
        return AffineMap(sign, torch.zeros(()).double())
    constant = _values(operand, graph)
    one, zero = torch.ones_like(constant), torch.zeros_like(constant)
    if name in ("mul", "div"):
        return AffineMap(constant if name == "mul" else 1 / constant, zero)
    if name == "add":
        return AffineMap(one, constant)
    from_first = node.args[1] is operand  # x - constant, or with rsub constant - x
    return AffineMap(one, -constant) if from_first == (name == "sub") else AffineMap(-one, constant)
