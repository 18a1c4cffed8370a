"""The layers and parameters that take an affine map into their own values.

On the output side: convolutions, linear layers, embeddings, constant addends and factors, and the trailing gain and
shift of a norm. On the input side: convolutions, linear layers and the projections of an attention. A layer may be a
module or a call of its function on parameters (``F.conv2d(x, self.weight)``), a linear layer also
``torch.addmm(bias, x, weight)`` with a weight of ``(in, out)``, as the ``Conv1D`` of GPT-2 calls it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normfuse import adapters
from normfuse.base import Reason, Refused
from normfuse.call_arguments import arguments_of
from normfuse.capture.leaves import base_layer
from normfuse.graph import ModelGraph, function_name
from normfuse.layers.l1_layer_norm import L1TokenNorm

Kind = Literal["conv", "linear", "embedding", "addend", "factor", "norm", "attention"]
_CONV_FUNCTIONS = {f"conv{t}{n}d": t == "_transpose" for t in ("", "_transpose") for n in (1, 2, 3)}
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, L1TokenNorm)


@dataclass(frozen=True, slots=True)
class Absorber:
    """A place in the graph that can take a map into named tensors of the model.

    Attributes:
        kind: What it computes.
        name: Qualified name of the layer, for reports.
        weight: Qualified name of the tensor that is scaled.
        bias: Qualified name of the tensor that is shifted; it may be None in the model yet.
        transposed: Whether the inputs are along axis 0 of the weight: a transposed convolution, or ``addmm``.
        padded: Whether an input shift would be missing in zeros that the layer pads with.
    """

    kind: Kind
    name: str
    weight: str
    bias: str | None = None
    groups: int = 1
    transposed: bool = False
    padded: bool = False
    args: dict[str, Any] = field(default_factory=dict, compare=False)


def output_side(node: fx.Node, graph: ModelGraph) -> Absorber | None:
    """Return the absorber whose output ``node`` is, if it is one."""
    if node.op == "get_attr":
        return Absorber("addend", str(node.target), str(node.target))
    if node.meta.get("removed"):
        return None
    module = graph.module_of(node)
    if module is None:
        return _function(node, graph)
    layer = base_layer(module)
    name = str(node.target)
    if isinstance(module, nn.Embedding) and layer is not None:
        # with max_norm the forward pass rescales the rows it reads, so scaled rows would not stay scaled
        return Absorber("embedding", name, f"{name}.weight") if module.max_norm is None else None
    if isinstance(module, _NormBase) and layer is None:
        raise _untraced(name, module)
    if isinstance(module, _NORMS) and module.weight is not None:
        return Absorber("norm", name, f"{name}.weight", None if layer is nn.RMSNorm else f"{name}.bias")
    return _layer(node, module, name)


def input_side(node: fx.Node, value: fx.Node, graph: ModelGraph) -> Absorber | None:
    """Return the absorber that ``node`` is for its input ``value``, if it is one."""
    if function_name(node) == "multi_head_attention_forward":
        return _attention(node, value)
    module = graph.module_of(node)
    absorber = _function(node, graph) if module is None else _layer(node, module, str(node.target))
    first = _operand(node)
    if absorber is None or absorber.kind not in ("conv", "linear"):
        return None
    return absorber if first is value and _occurs_once(node, value) else None


def _operand(node: fx.Node) -> Any:
    """Return what a layer or its function is applied to."""
    if function_name(node) == "addmm":
        return arguments_of(node).get("mat1")
    return node.args[0] if node.args else node.kwargs.get("input")


def _occurs_once(node: fx.Node, value: fx.Node) -> bool:
    return sum(n is value for n in [*node.args, *node.kwargs.values()]) == 1


def _layer(node: fx.Node, module: nn.Module, name: str) -> Absorber | None:
    layer = base_layer(module)
    if layer is None:
        if isinstance(module, _ConvNd) and adapters.pads_same(module):
            return Absorber("conv", name, f"{name}.weight", f"{name}.bias", module.groups, padded=True)
        if isinstance(module, _ConvNd | nn.Linear):
            raise _untraced(name, module)
        return None
    if issubclass(layer, _ConvNd) and isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        zeros = module.padding_mode == "zeros" and _pads(module.padding, module.kernel_size)
        return Absorber("conv", name, f"{name}.weight", f"{name}.bias", module.groups, transposed, zeros or transposed)
    if issubclass(layer, nn.Linear):
        return Absorber("linear", name, f"{name}.weight", f"{name}.bias")
    return None


def _untraced(name: str, module: nn.Module) -> Refused:
    text = f"{name} ({type(module).__name__}) has its own forward, which cannot be traced"
    return Refused(Reason.FORWARD_OVERRIDDEN, text, "pass example_inputs")


def _function(node: fx.Node, graph: ModelGraph) -> Absorber | None:
    plain = function_name(node)
    if plain in _CONV_FUNCTIONS:
        transposed = _CONV_FUNCTIONS[plain]
        args = arguments_of(node)
        return _on_parameters("conv", node, args, graph, args.get("groups", 1), transposed)
    if plain == "linear":
        return _on_parameters("linear", node, arguments_of(node), graph)
    if plain == "addmm":
        return _matrix_product(node, graph)
    if plain == "embedding":
        args = arguments_of(node)
        return None if args.get("max_norm") is not None else _on_parameters("embedding", node, args, graph)
    if plain in ("layer_norm", "batch_norm", "group_norm"):
        return _on_parameters("norm", node, arguments_of(node), graph)
    return None


def _matrix_product(node: fx.Node, graph: ModelGraph) -> Absorber | None:
    """``addmm(bias, x, weight)``: a linear layer with a weight of ``(in, out)`` and a bias of ``(out,)``."""
    args = arguments_of(node)
    weight, bias = args.get("mat2"), args.get("input")
    if args.get("alpha", 1) != 1 or args.get("beta", 1) != 1 or node.kwargs.get("out") is not None:
        return None
    if not isinstance(bias, fx.Node) or not graph.is_constant(bias):
        return None
    absorber = _on_parameters("linear", node, {"weight": weight, "bias": bias}, graph, transposed=True)
    if absorber is None or graph.tensor(str(bias.target)).dim() != 1:
        return None
    size = graph.tensor(absorber.weight).shape[1]
    return absorber if graph.tensor(str(bias.target)).numel() == size else None


def _on_parameters(
    kind: Kind, node: fx.Node, args: dict[str, Any], graph: ModelGraph, groups: int = 1, transposed: bool = False
) -> Absorber | None:
    weight, bias = args.get("weight"), args.get("bias")
    if not (isinstance(weight, fx.Node) and graph.is_constant(weight)):
        return None
    if weight.op != "get_attr" or (isinstance(bias, fx.Node) and bias.op != "get_attr"):
        raise Refused(
            Reason.PARAMETRIZED, f"the weight of {_scope(node)} is computed at every call", "materialize it first"
        )
    name = str(weight.target).rpartition(".")[0]
    shape = graph.tensor(str(weight.target)).shape
    padded = kind == "conv" and (transposed or _pads(args.get("padding", 0), tuple(shape[2:])))
    bias_name = str(bias.target) if isinstance(bias, fx.Node) else f"{name}.bias" if kind != "embedding" else None
    return Absorber(kind, name, str(weight.target), bias_name, groups, transposed, padded, {"node": node})


def _attention(node: fx.Node, value: fx.Node) -> Absorber | None:
    args = arguments_of(node)
    weight, bias = args.get("in_proj_weight"), args.get("in_proj_bias")
    own = all(args.get(key) is value for key in ("query", "key", "value"))
    if not own or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    name = str(weight.target).rpartition(".")[0]
    return Absorber("attention", name, str(weight.target), str(bias.target) if isinstance(bias, fx.Node) else None)


def _pads(padding: Any, kernel: tuple[int, ...]) -> bool:
    if isinstance(padding, str):
        return padding == "same" and any(k > 1 for k in kernel)
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)


def _scope(node: fx.Node) -> str:
    scope = node.meta.get("scope", ())
    return scope[-1].name if scope else node.name
