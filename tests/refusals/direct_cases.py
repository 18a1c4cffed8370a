"""Refusals that keep the arithmetic safe from what the steps before already refuse: asked for directly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from normfuse import absorbers, absorption, gather, legality, norms, rules
from normfuse.affine import AffineMap
from normfuse.capture import record, trace
from normfuse.graph import ModelGraph
from normfuse.norms import Norm
from normfuse.operations import describe
from normfuse.routes import Plan
from tests.refusals.cases import Alone, Net, sequence
from tests.refusals.route_cases import bn, conv
from tests.zoo.trap import image


def recorded(model: nn.Module) -> ModelGraph:
    return record(model.double().eval(), image(2, 4, 6, 6))


def call(graph: ModelGraph, name: str) -> fx.Node:
    """Return the node of this function or layer."""
    return next(node for node in graph.nodes if name in (describe(node, graph).args.get("function"), str(node.target)))


def flipped() -> tuple[ModelGraph, fx.Node]:
    graph = recorded(Net(lambda m, x: m.conv(x).flip(3), conv=conv()))
    return graph, call(graph, "flip")


@contextmanager
def changed(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def too_large() -> None:
    graph, node = flipped()
    with changed(gather, "_LARGEST", 10):
        gather.index_of(node, graph)


def another_shape() -> None:
    """A function that moves values, but not as it did when it was recorded."""
    graph, node = flipped()
    with changed(gather, "_apply", lambda *a: torch.zeros(1)):
        gather.index_of(node, graph)


def no_shape() -> None:
    graph = trace(Alone(lambda m, x: m.conv(x).flip(3), conv=conv()).eval())
    gather.index_of(call(graph, "flip"), graph)


def grown() -> None:
    net = Net(lambda m, x: x + m.addend, addend=nn.Parameter(torch.ones(1, 1, 1)))
    graph = recorded(net)
    absorber = absorbers.output_side(call(graph, "addend"), graph)
    assert absorber is not None
    absorption.absorb_output(absorber, AffineMap.along(0, 3, torch.ones(4), torch.ones(4)), graph)


def both_sides() -> None:
    graph = recorded(sequence(conv()))
    node = call(graph, "0")
    absorber, m = absorbers.output_side(node, graph), AffineMap.along(1, 4, torch.full((4,), 2.0), torch.zeros(4))
    assert absorber is not None
    plan = Plan()
    plan.add(absorber, "output", node, m)
    plan.add(absorber, "input", node, m)
    legality.finish(plan, graph)


def of_a_layer_norm() -> None:
    graph = recorded(sequence(nn.LayerNorm(6)))
    norms.source(Norm("0", "LayerNorm", "0"), call(graph, "0"), graph)


def of_a_function() -> None:
    graph = recorded(Net(lambda m, x: nn.functional.layer_norm(x, (6,))))
    norms.source(Norm(":layer_norm", "layer_norm", None), call(graph, "layer_norm"), graph)


def of_no_value() -> None:
    graph = recorded(sequence(bn()))
    node = call(graph, "0")
    node.args = ()
    norms.input_of(Norm("0", "BatchNorm2d", "0"), node, graph)


def unforeseen() -> None:
    """An axis that is no number, as no torch function takes it."""
    graph = recorded(Net(lambda m, x: m.conv(x).mean(3, keepdim=True), conv=conv()))
    node = call(graph, "mean")
    operation = describe(node, graph)
    operation.args["dim"] = object()
    rules.backward(node, operation, AffineMap.along(1, 4, torch.ones(4), torch.ones(4)), graph)


def held_weight() -> None:
    net = Net(lambda m, x: m.held(m.conv(x)), conv=conv())
    net.held = functools.partial(lambda weight, y: y + weight.sum() * 0, net.conv.weight)
    graph = recorded(net)
    legality.require_not_frozen("conv.weight", graph)


def watch(module: nn.Module, args: Any, output: Any) -> None:
    """A hook around every module of the process."""


def watched() -> None:
    graph = recorded(sequence(conv()))
    handle = nn.modules.module.register_module_forward_hook(watch)
    try:
        legality.require_no_hooks("0", graph)
    finally:
        handle.remove()


DIRECT: dict[str, Callable[[], None]] = {
    "conv is too large to follow": too_large,
    "flip in the model cannot be followed": another_shape,
    "the shape of conv is not known": no_shape,
    "addend would have to grow from (1, 1, 1)": grown,
    "0 would take a map on both sides": both_sides,
    "0 (LayerNorm) has no rule": of_a_layer_norm,
    ":layer_norm (layer_norm) normalises by statistics of its input": of_a_function,
    "the input of 0 is not a value of the graph": of_no_value,
    "mean in the model cannot be followed (TypeError)": unforeseen,
    "conv.weight is also held by the partial": held_weight,
    "watch, a hook around every module, would see other values": watched,
}
