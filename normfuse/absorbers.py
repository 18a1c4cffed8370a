"""The layers and parameters that take an affine map into their own values.

On the output side: convolutions, linear layers, embeddings, constant addends and factors, and the trailing gain and
shift of a norm. On the input side: convolutions, linear layers and the projections of an attention. A layer may be a
module or a call of its function on parameters (``F.conv2d(x, self.weight)``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from normfuse import numerics
from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.capture.leaves import base_layer
from normfuse.graph import ModelGraph, function_name

Kind = Literal["conv", "linear", "embedding", "addend", "factor", "norm", "attention"]
_CONV_FUNCTIONS = {f"conv{t}{n}d": t == "_transpose" for t in ("", "_transpose") for n in (1, 2, 3)}
_CONV_ARGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE_ARGS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True, slots=True)
class Absorber:
    """A place in the graph that can take a map into named tensors of the model.

    Attributes:
        kind: What it computes.
        name: Qualified name of the layer, for reports.
        weight: Qualified name of the tensor that is scaled.
        bias: Qualified name of the tensor that is shifted; it may be None in the model yet.
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
    if isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) and module.weight is not None:
        return Absorber("norm", name, f"{name}.weight", None if layer is nn.RMSNorm else f"{name}.bias")
    return _layer(node, module, name)


def input_side(node: fx.Node, value: fx.Node, graph: ModelGraph) -> Absorber | None:
    """Return the absorber that ``node`` is for its input ``value``, if it is one."""
    if function_name(node) == "multi_head_attention_forward":
        return _attention(node, value)
    module = graph.module_of(node)
    absorber = _function(node, graph) if module is None else _layer(node, module, str(node.target))
    first = node.args[0] if node.args else node.kwargs.get("input")
    if absorber is None or absorber.kind not in ("conv", "linear"):
        return None
    return absorber if first is value and _occurs_once(node, value) else None


def _occurs_once(node: fx.Node, value: fx.Node) -> bool:
    return sum(n is value for n in [*node.args, *node.kwargs.values()]) == 1


def _layer(node: fx.Node, module: nn.Module, name: str) -> Absorber | None:
    layer = base_layer(module)
    if layer is None:
        if isinstance(module, _ConvNd | nn.Linear):
            text = f"{name} ({type(module).__name__}) has its own forward, which cannot be traced"
            raise Refused(Reason.FORWARD_OVERRIDDEN, text, "pass example_inputs")
        return None
    if issubclass(layer, _ConvNd) and isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        zeros = module.padding_mode == "zeros" and _pads(module.padding, module.kernel_size)
        return Absorber("conv", name, f"{name}.weight", f"{name}.bias", module.groups, transposed, zeros or transposed)
    if issubclass(layer, nn.Linear):
        return Absorber("linear", name, f"{name}.weight", f"{name}.bias")
    return None


def _function(node: fx.Node, graph: ModelGraph) -> Absorber | None:
    plain = function_name(node)
    if plain in _CONV_FUNCTIONS:
        transposed = _CONV_FUNCTIONS[plain]
        args = _bound(node, _CONV_TRANSPOSE_ARGS if transposed else _CONV_ARGS)
        return _on_parameters("conv", node, args, graph, args.get("groups", 1), transposed)
    if plain == "linear":
        return _on_parameters("linear", node, _bound(node, ("input", "weight", "bias")), graph)
    if plain == "embedding":
        args = _bound(node, ("input", "weight"))
        if "max_norm" in args and args["max_norm"] is not None:
            return None
        swapped = {"input": args.get("weight"), "weight": args.get("input")}
        by_torch = isinstance(args.get("input"), fx.Node) and args["input"].op == "get_attr"
        return _on_parameters("embedding", node, swapped if by_torch else args, graph)
    if plain == "layer_norm":
        return _on_parameters("norm", node, _bound(node, ("input", "shape", "weight", "bias")), graph)
    if plain in ("batch_norm", "group_norm") and node.target is getattr(nn.functional, plain):
        order = ("input", "running_mean", "running_var", "weight", "bias")
        order = order if plain == "batch_norm" else ("input", "groups", "weight", "bias")
        return _on_parameters("norm", node, _bound(node, order), graph)
    return None


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
    order = (
        "query",
        "key",
        "value",
        "embed_dim",
        "heads",
        "in_proj_weight",
        "in_proj_bias",
        "bias_k",
        "bias_v",
        "zero",
    )
    args = _bound(node, order)
    weight, bias = args.get("in_proj_weight"), args.get("in_proj_bias")
    own = all(args.get(key) is value for key in ("query", "key", "value"))
    if not own or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    name = str(weight.target).rpartition(".")[0]
    return Absorber("attention", name, str(weight.target), str(bias.target) if isinstance(bias, fx.Node) else None)


def _bound(node: fx.Node, order: tuple[str, ...]) -> dict[str, Any]:
    return {**dict(zip(order, node.args, strict=False)), **dict(node.kwargs)}


def _pads(padding: Any, kernel: tuple[int, ...]) -> bool:
    if isinstance(padding, str):
        return padding == "same" and any(k > 1 for k in kernel)
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)


def _scope(node: fx.Node) -> str:
    scope = node.meta.get("scope", ())
    return scope[-1].name if scope else node.name


# new values


def absorb_output(absorber: Absorber, m: AffineMap, graph: ModelGraph) -> dict[str, Tensor]:
    """Return the float64 tensors, by name, with which the absorber's output is ``m`` of what it was.

    Raises:
        Refused: The map varies along another axis, or there is no place for its shift.
    """
    weight = graph.tensor(absorber.weight).detach()
    if absorber.kind in ("addend", "factor"):
        return _absorb_constant(absorber, weight, m)
    scale, shift = _vectors(m, _channel_axis(absorber, weight, graph), _out_size(absorber, weight), absorber)
    if absorber.kind == "embedding":
        return {absorber.weight: numerics.exact(weight) * scale + shift}
    if absorber.kind == "norm":
        return _absorb_gain(absorber, weight, scale, shift, m, graph)
    new = numerics.scale_outputs(weight, scale, groups=absorber.groups, transposed=absorber.transposed)
    old_bias = _bias(absorber, graph)
    return _with_bias(absorber, new, old_bias, shift if old_bias is None else scale * old_bias + shift, graph)


def absorb_input(absorber: Absorber, m: AffineMap, graph: ModelGraph) -> dict[str, Tensor]:
    """Return the float64 tensors, by name, with which the absorber does on ``x`` what it did on ``m`` of ``x``.

    Raises:
        Refused: As :func:`absorb_output`, or a shift would meet zero padding.
    """
    weight = graph.tensor(absorber.weight).detach()
    if m.has_shift and absorber.padded:
        raise Refused(Reason.NONZERO_PADDING, f"{absorber.name} pads with zeros, which a shift cannot enter")
    in_size = weight.shape[0] if absorber.transposed else weight.shape[1] * absorber.groups
    scale, shift = _vectors(m, _channel_axis(absorber, weight, graph), in_size, absorber)
    new = numerics.scale_inputs(weight, scale, groups=absorber.groups, transposed=absorber.transposed)
    if not m.has_shift:
        return {absorber.weight: new}
    added = numerics.output_of_shift(weight, shift, groups=absorber.groups)
    old_bias = _bias(absorber, graph)
    return _with_bias(absorber, new, old_bias, added if old_bias is None else old_bias + added, graph)


def _vectors(m: AffineMap, axis: int, size: int, absorber: Absorber) -> tuple[Tensor, Tensor]:
    try:
        return m.vectors(axis, size)
    except RuntimeError as error:
        raise Refused(Reason.AXIS, f"the map has another number of channels than {absorber.name}") from error


def _out_size(absorber: Absorber, weight: Tensor) -> int:
    if absorber.transposed:
        return weight.shape[1] * absorber.groups
    return weight.shape[1] if absorber.kind == "embedding" else weight.shape[0]


def _channel_axis(absorber: Absorber, weight: Tensor, graph: ModelGraph) -> int:
    """Return the axis of channels; that of a convolution counts from the end, as its batch axis may be missing."""
    if absorber.kind == "conv":
        return 1 - weight.dim()
    if absorber.kind != "norm":
        return -1
    node, module = absorber.args.get("node"), graph.module(absorber.name)
    if node is not None:
        return -1 if function_name(node) == "layer_norm" else 1
    if isinstance(module, _InstanceNorm):
        return -module._get_no_batch_dim()
    return 1 if isinstance(module, _NormBase | nn.GroupNorm) else -1


def _absorb_constant(absorber: Absorber, weight: Tensor, m: AffineMap) -> dict[str, Tensor]:
    if absorber.kind == "factor" and m.has_shift:
        raise Refused(Reason.OPAQUE_OPERATION, f"the factor {absorber.name} cannot take a shift")
    value = numerics.exact(weight) * m.scale + (0 if absorber.kind == "factor" else m.shift)
    if value.numel() != weight.numel():
        raise Refused(Reason.NOT_CHEAPER, f"{absorber.name} would have to grow from {tuple(weight.shape)}")
    return {absorber.weight: value.reshape(weight.shape)}


def _absorb_gain(
    absorber: Absorber, weight: Tensor, scale: Tensor, shift: Tensor, m: AffineMap, graph: ModelGraph
) -> dict[str, Tensor]:
    if weight.dim() != 1:
        raise Refused(Reason.AXIS, f"{absorber.name} normalises over several axes")
    bias = _bias(absorber, graph)
    new_bias = shift if bias is None else scale * bias + shift
    return _with_bias(absorber, numerics.exact(weight) * scale, bias, new_bias, graph)


def _bias(absorber: Absorber, graph: ModelGraph) -> Tensor | None:
    if absorber.bias is None:
        return None
    owner, _, attribute = absorber.bias.rpartition(".")
    value = getattr(graph.module(owner), attribute, None)
    return numerics.exact(value) if isinstance(value, Tensor) else None


def _with_bias(
    absorber: Absorber, weight: Tensor, old: Tensor | None, new: Tensor, graph: ModelGraph
) -> dict[str, Tensor]:
    if old is None and not bool((new != 0).any()):
        return {absorber.weight: weight}
    if absorber.bias is None or (old is None and not _passes_bias(absorber, graph)):
        raise Refused(Reason.NO_BIAS, f"the forward of {absorber.name} adds no bias", "give the layer a bias")
    return {absorber.weight: weight, absorber.bias: new}


def _passes_bias(absorber: Absorber, graph: ModelGraph) -> bool:
    """Whether a bias assigned to the layer, which has none, would be added: true of a torch forward, else tried."""
    module = graph.module(absorber.name)
    if base_layer(module) is not None:
        return True
    if not isinstance(module, _ConvNd | nn.Linear) or module.bias is not None:
        return False
    return _bias_shows(module, _probe_shape(absorber, module, graph))


def _probe_shape(absorber: Absorber, module: nn.Module, graph: ModelGraph) -> tuple[int, ...]:
    calls = [graph.shape(call.inputs[0]) for call in graph.calls_of(absorber.name) if call.inputs]
    if calls and calls[0] is not None:
        return calls[0]
    if isinstance(module, _ConvNd):
        return (1, module.in_channels, *[16] * len(module.kernel_size))
    return (1, int(getattr(module, "in_features", 1)))


def _bias_shows(module: Any, shape: tuple[int, ...]) -> bool:
    """Run the layer with a bias of zeros and one of random values, and see whether exactly that is the difference."""
    axis = 1 if isinstance(module, _ConvNd) else -1
    size = module.out_channels if isinstance(module, _ConvNd) else module.out_features
    weight = module.weight
    probe = torch.rand(size, dtype=torch.float64).to(weight)
    results = []
    with torch.no_grad():
        for bias in (torch.zeros_like(probe), probe):
            module.bias = nn.Parameter(bias, requires_grad=False)
            try:
                results.append(module(torch.zeros(shape, dtype=weight.dtype, device=weight.device)))
            except Exception:
                return False
            finally:
                module.bias = None
        expected = AffineMap.along(axis, results[0].dim(), torch.ones(size), probe.cpu()).shift
        return bool(torch.allclose((results[1] - results[0]).double().cpu(), expected.expand(results[0].shape), 1e-2))
