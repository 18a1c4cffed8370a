"""Gains and shifts that are parameters: those that end a norm, and products of an activation and a parameter.

LayerNorm, RMSNorm, L1 norms y = gamma n(x) + beta     gamma, beta of the trailing axes
GroupNorm, InstanceNorm      y = gamma n(x) + beta     gamma, beta of axis 1
LayerScale, a norm by hand   y = gamma x (+ beta)      gamma, beta broadcast to x

A gain may be one plus its parameter, as in the RMSNorm of Gemma.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse import adapters
from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.call_arguments import arguments_of
from normfuse.graph import ModelGraph, function_name
from normfuse.layers.l1_layer_norm import L1TokenNorm
from normfuse.norms import Norm
from normfuse.numerics import exact
from normfuse.operations import describe
from normfuse.ranks import ranks
from normfuse.shown_tensors import materializing

_TRAILING = (nn.LayerNorm, nn.RMSNorm, L1TokenNorm)
_CHANNELS = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_FUNCTIONS = ("layer_norm", "rms_norm", "group_norm", "instance_norm")


@dataclass(frozen=True, slots=True)
class Call:
    """One place where a gain acts.

    Attributes:
        value: The activation that comes in.
        node: The node that reads it.
        output: The node after the shift; ``node`` itself in most cases.
        scale: The constant operand that holds the gain; None where ``node`` calls a leaf module, or there is none.
        shift: The same of the shift.
    """

    value: fx.Node
    node: fx.Node
    output: fx.Node
    scale: fx.Node | None = None
    shift: fx.Node | None = None


@dataclass(slots=True)
class Gain:
    """A gain, a shift, or both.

    Attributes:
        module: Qualified name of the module that holds the parameters.
        scale: Qualified name of the parameter that multiplies, None if there is none.
        shift: Qualified name of the parameter that is added, None if there is none.
        norm: The norm that they end, None for a product that stands on its own.
        axis: The axis of the gain: 1, or None where it is broadcast to the trailing axes.
        calls: Where they act.
        neutral: The value of the parameter ``scale`` with which the gain is one.
    """

    module: str
    scale: str | None
    shift: str | None
    norm: Norm | None
    axis: int | None = None
    calls: list[Call] = field(default_factory=list)
    neutral: float = 1.0

    @property
    def tensors(self) -> list[str]:
        """The names of the parameters."""
        return [name for name in (self.scale, self.shift) if name is not None]

    def changes_something(self, graph: ModelGraph) -> bool:
        """Whether any gain is not one or any shift not zero."""
        scale = self.scale is not None and bool((graph.tensor(self.scale) != self.neutral).any())
        return scale or (self.shift is not None and bool((graph.tensor(self.shift) != 0).any()))

    def map(self, call: Call, graph: ModelGraph) -> AffineMap:
        """Return the map of one call, over its output.

        Raises:
            Refused: The rank of the activation is not known.
        """
        shape = graph.shape(call.output)
        rank = len(shape) if shape is not None else ranks(call.node, graph) or ranks(call.value, graph)
        if rank is None:
            text = f"the rank of the input of {self.module or 'the model'} is not known"
            raise Refused(Reason.RANK_UNKNOWN, text, "pass example_inputs")
        scale = self._values(call.scale, self.scale, graph, torch.ones(1), rank)
        if call.scale is None and self.scale is not None:
            scale = scale + (1 - self.neutral)
        return AffineMap(scale, self._values(call.shift, self.shift, graph, torch.zeros(1), rank))

    def _values(self, node: fx.Node | None, name: str | None, graph: ModelGraph, neutral: Tensor, rank: int) -> Tensor:
        values = graph.value(node) if node is not None else neutral if name is None else graph.tensor(name).detach()
        values = exact(values)
        if values.dim() > rank:
            text = f"a gain or shift of {self.module or 'the model'} has more axes than what it acts on"
            raise Refused(Reason.AXIS, text)
        if self.axis is None or values.numel() == 1:
            return values.reshape((1,) * (rank - values.dim()) + tuple(values.shape))
        return AffineMap.along(self.axis, rank, values, values).scale


# norms


def of_norm(norm: Norm, graph: ModelGraph) -> Gain | None:
    """Return the gain and shift that end a norm by its own statistics, None for other norms and those without.

    Raises:
        Refused: They are computed.
    """
    gains = [g for node in norm.nodes if (g := _of_leaf(norm, node, graph) or _of_function(norm, node, graph))]
    if not gains or len(gains) != len(norm.nodes):
        return None
    first = gains[0]
    first.calls = [call for gain in gains for call in gain.calls]
    return first if first.tensors else None


def _of_leaf(norm: Norm, node: fx.Node, graph: ModelGraph) -> Gain | None:
    module: Any = graph.module_of(node)
    known = adapters.token_norm(module) if module is not None else None
    plain = isinstance(module, _TRAILING + _CHANNELS) and getattr(module, "running_mean", None) is None
    if not plain and known is None:
        return None
    names = [f"{node.target}.{key}" if getattr(module, key, None) is not None else None for key in ("weight", "bias")]
    axis = 1 if isinstance(module, _CHANNELS) else None
    value = node.all_input_nodes[0]
    neutral = 1.0 if known is None else known.neutral
    return Gain(str(node.target), names[0], names[1], norm, axis, [Call(value, node, node)], neutral)


def _of_function(norm: Norm, node: fx.Node, graph: ModelGraph) -> Gain | None:
    name = function_name(node)
    if name not in _FUNCTIONS:
        return None
    given = arguments_of(node)
    if given.get("running_mean") is not None:
        return None
    scale, shift = given.get("weight"), given.get("bias")
    names = [None if part is None else _parameter(part, graph) for part in (scale, shift)]
    for part, found in zip((scale, shift), names, strict=True):
        if part is not None and found is None:
            text = f"the gain or shift of {norm.name} is computed at every call"
            raise Refused(Reason.PARAMETRIZED, text, materializing(part, graph))
    axis = 1 if name in ("group_norm", "instance_norm") else None
    module = next((n.rpartition(".")[0] for n in names if n is not None), "")
    return Gain(module, names[0], names[1], norm, axis, [Call(given["input"], node, node, scale, shift)])


def _parameter(node: Any, graph: ModelGraph) -> str | None:
    """Return the name of the parameter that a constant shows in another shape or dtype, if it does only that."""
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if describe(node, graph).name not in ("identity", "gather") or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node):
        return None
    tensor = graph.tensor(str(node.target))
    return str(node.target) if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else None


# products


def products(graph: ModelGraph, norms: list[Norm]) -> Iterator[Gain]:
    """Yield every parameter that multiplies an activation, with the parameter of the same module that is added next."""
    by_module = {norm.module: norm for norm in norms if norm.module is not None}
    by_node = {node: norm for norm in norms if norm.module is None for node in norm.nodes}
    found: dict[tuple[str, str | None], Gain] = {}
    for node in graph.nodes:
        operands = _operands(node, "mul", graph)
        if operands is None:
            continue
        value, factor, scale, neutral = operands
        output, addend, shift = _addition(node, scale, graph)
        module = scale.rpartition(".")[0]
        inside = any(call.name == module for call in node.meta.get("scope", ()))
        norm = (by_module.get(module) if inside else None) or by_node.get(_plain(value, graph))
        gain = found.setdefault((scale, shift), Gain(module, scale, shift, norm, neutral=neutral))
        gain.calls.append(Call(value, node, output, factor, addend))
    yield from found.values()


def _plain(node: fx.Node, graph: ModelGraph) -> fx.Node:
    """Return the value that a node shows in another dtype."""
    while describe(node, graph).name == "identity" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _operands(node: fx.Node, name: str, graph: ModelGraph) -> tuple[fx.Node, fx.Node, str, float] | None:
    """Return ``(activation, constant, parameter, neutral)`` of a sum or product, in the shape of the activation.

    The last is the value of the parameter with which a product changes nothing.
    """
    operation = describe(node, graph)
    if operation.name != name or len(operation.inputs) != 2 or operation.args.get("alpha", 1) != 1:
        return None
    constant = [source for source in operation.inputs if graph.is_constant(source)]
    active = [source for source in operation.inputs if not graph.is_constant(source)]
    if len(constant) != 1 or graph.shape(active[0]) != graph.shape(node):
        return None
    bare = _without_one(constant[0], graph) if name == "mul" else constant[0]
    parameter = _parameter(bare, graph)
    return None if parameter is None else (active[0], constant[0], parameter, float(bare is constant[0]))


def _without_one(node: fx.Node, graph: ModelGraph) -> fx.Node:
    """Return ``w`` where a constant is ``1 + w``, else the constant itself."""
    operation = describe(node, graph)
    plain = operation.args.get("alpha", 1) == 1 and len(node.args) == 2 and len(operation.inputs) == 1
    if node.op == "get_attr" or operation.name != "add" or not plain:
        return node
    number = next((a for a in node.args if not isinstance(a, fx.Node)), None)
    return operation.inputs[0] if isinstance(number, int | float) and number == 1 else node


def _addition(product: fx.Node, scale: str, graph: ModelGraph) -> tuple[fx.Node, fx.Node | None, str | None]:
    """Return ``(sum, constant, parameter)`` where a parameter beside the gain is added to the product at once."""
    readers = graph.consumers(product)
    found = _operands(readers[0], "add", graph) if len(readers) == 1 and len(product.users) == 1 else None
    if found is None or found[2].rpartition(".")[0] != scale.rpartition(".")[0]:
        return product, None, None
    return readers[0], found[1], found[2]
