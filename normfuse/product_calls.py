"""Calls of functions on parameters that do what a layer does, read from the call: what goes in, weight and bias.

    F.conv2d(x, w, b)   F.linear(x, w, b)   addmm(b, x, w)   x @ w   F.embedding(x, w)   F.layer_norm(x, s, w, b)

What the modules that hold the parameters are, and what else they hold, does not matter: a call that passes no bias adds
none, whatever bias there is beside the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from normfuse.base import Reason, Refused
from normfuse.call_arguments import arguments_of
from normfuse.graph import ModelGraph, function_name
from normfuse.operations import describe
from normfuse.shown_tensors import materializing, shown_tensor

Kind = Literal["conv", "linear", "embedding", "norm", "attention"]
_CONVOLUTIONS = {f"conv{t}{n}d": t == "_transpose" for t in ("", "_transpose") for n in (1, 2, 3)}
_PRODUCTS = ("matmul", "mm")
_NORMS = ("layer_norm", "rms_norm", "batch_norm", "instance_norm", "group_norm")


@dataclass(frozen=True, slots=True)
class ProductCall:
    """One call.

    Attributes:
        kind: Which layer it is like.
        value: What it is applied to.
        weight: Qualified name of its weight.
        bias: Qualified name of its bias; None where the call passes none.
        groups: Groups of channels of a convolution.
        transposed: Whether the inputs are along axis 0 of the weight.
        padding: What a convolution pads with zeros: a number, numbers, or ``"same"``.
    """

    kind: Kind
    value: Any
    weight: str
    bias: str | None = None
    groups: int = 1
    transposed: bool = False
    padding: Any = 0


def read(node: fx.Node, graph: ModelGraph) -> ProductCall | None:
    """Return what a call does, None where it is no such call, or works on activations alone.

    Raises:
        Refused: Its weight or bias is computed from parameters.
    """
    if node.meta.get("removed"):  # its norm was folded, and its tensors may be gone
        return None
    name, given = function_name(node), arguments_of(node)
    transposed = _CONVOLUTIONS.get(name, bool(given.get("transposed")))
    if name in _CONVOLUTIONS or name == "convolution":
        settings = (given.get("groups", 1), transposed, given.get("padding", 0))
        return _on_parameters("conv", node, given.get("input"), given, graph, *settings)
    if name == "linear" or name in _NORMS:
        return _on_parameters("linear" if name == "linear" else "norm", node, given.get("input"), given, graph)
    if name == "embedding" and given.get("max_norm") is None:  # with it, a forward pass rescales the rows it reads
        return _on_parameters("embedding", node, given.get("indices", given.get("input")), given, graph)
    if name == "addmm" and given.get("alpha", 1) == 1 and given.get("beta", 1) == 1 and "out" not in given:
        passed = {"weight": given.get("mat2"), "bias": given.get("input")}
        return _on_parameters("linear", node, given.get("mat1"), passed, graph, transposed=True)
    if name in _PRODUCTS and "out" not in given:
        passed = {"weight": given.get("other", given.get("mat2"))}
        return _on_parameters("linear", node, given.get("input"), passed, graph, transposed=True)
    if name == "multi_head_attention_forward" and _attends_to_itself(given):
        passed = {"weight": given.get("in_proj_weight"), "bias": given.get("in_proj_bias")}
        return _on_parameters("attention", node, given.get("query"), passed, graph)
    return None


def _attends_to_itself(given: dict[str, Any]) -> bool:
    return given.get("query") is given.get("key") is given.get("value")


def _on_parameters(
    kind: Kind,
    node: fx.Node,
    value: Any,
    passed: dict[str, Any],
    graph: ModelGraph,
    groups: int = 1,
    transposed: bool = False,
    padding: Any = 0,
) -> ProductCall | None:
    weight, bias = passed.get("weight"), passed.get("bias")
    if not (isinstance(weight, fx.Node) and graph.is_constant(weight)):
        return None
    if isinstance(bias, fx.Node) and not graph.is_constant(bias):
        return None
    name, flipped = _named(weight, node, graph)
    bias_name = _named(bias, node, graph)[0] if isinstance(bias, fx.Node) else None
    if (graph.tensor(name).dim() != 2) if kind == "linear" else flipped:
        return None
    call = ProductCall(kind, value, name, bias_name, groups, transposed != flipped, padding)
    return call if bias_name is None or graph.tensor(bias_name).shape == shape_of_bias(call, graph) else None


def shape_of_bias(call: ProductCall, graph: ModelGraph) -> tuple[int, ...]:
    """Return the shape of the bias of a call: a number for each channel that it writes."""
    shape = tuple(graph.tensor(call.weight).shape)
    if call.kind == "norm":
        return shape
    return (shape[1] * call.groups,) if call.transposed or call.kind == "embedding" else shape[:1]


def _named(node: fx.Node, call: fx.Node, graph: ModelGraph) -> tuple[str, bool]:
    """Return the name of the tensor that a constant operand shows, and whether it shows it transposed.

    Raises:
        Refused: It is computed.
    """
    name, flipped = shown_tensor(node, graph)
    if name is None:
        text = f"what {describe(call, graph).label} multiplies by is computed at every call"
        raise Refused(Reason.PARAMETRIZED, text, materializing(node, graph))
    return name, flipped
