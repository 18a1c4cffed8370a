"""The layers of an exported program: calls of operators on tensors of their own become layers of torch again.

    conv2d(x, conv.weight, None, ...)            conv(x)
    batch_norm(x, bn.weight, bn.bias, ...)       bn(x)

An exported program keeps the tensors of each layer where the layer stood, in a module that computes nothing, and calls
an operator on them. A layer in that place computes the same, under the same names, and can be named, replaced and given
a bias. Both forms are read: that of ``torch.export.export``, and with its operators decomposed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse.call_arguments import arguments_of
from normfuse.graph import function_name

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_CONVOLUTIONS = {(t, n): getattr(nn, f"Conv{'Transpose' if t else ''}{n}d") for t in (False, True) for n in (1, 2, 3)}
_NORMS_OF_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def restore(module: fx.GraphModule) -> None:
    """Put layers in the place of the tensors that operators are called on, in the module of an exported program."""
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        owner = _owner(node, module)
        if owner is not None:
            calls.setdefault(owner, []).append(node)
    for owner, nodes in calls.items():
        layers = [_layer(node, module.get_submodule(owner)) for node in nodes]
        if all(layer is not None and repr(layer) == repr(layers[0]) for layer in layers):
            _replace(owner, layers[0], nodes, module)
    for node in module.graph.nodes:  # what a fold leaves may have another memory layout than what the operator returned
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
    module.recompile()


def _owner(node: fx.Node, module: fx.GraphModule) -> str | None:
    """Return the name of the module that holds all tensors of a call, if it does nothing but hold them."""
    given = [arguments_of(node).get(name) for name in _TENSORS] if node.op == "call_function" else []
    held = [source for source in given if isinstance(source, fx.Node)]
    owners = {str(source.target).rpartition(".")[0] for source in held}
    if len(owners) != 1 or not all(source.op == "get_attr" for source in held):
        return None
    (owner,) = owners
    holder = module.get_submodule(owner)
    passive = type(holder).forward is nn.Module.forward and not list(holder.children())
    return owner if owner and passive else None


def _layer(node: fx.Node, holder: nn.Module) -> nn.Module | None:
    """Return the layer that a call is, on the tensors of its holder; None if it is none, or they are not its own."""
    given = arguments_of(node)
    tensors = {name: given[name] for name in _TENSORS if isinstance(given.get(name), fx.Node)}
    if any(str(source.target).rpartition(".")[2] != name for name, source in tensors.items()):
        return None
    make = _MAKERS.get(function_name(node))
    layer = make(node, given, holder) if make is not None else None
    if layer is None:
        return None
    given_to = {*tensors, "num_batches_tracked"}  # what the holder has beside them, the call does not take
    for name in given_to & layer._parameters.keys():
        layer._parameters[name] = holder._parameters.get(name)
    for name in given_to & layer._buffers.keys():
        layer._buffers[name] = holder._buffers.get(name)
    same = {name for name, _ in _held(holder)} == {name for name, _ in _held(layer)} >= tensors.keys()
    return layer.train(False) if same else None


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((n, t) for table in (module._parameters, module._buffers) for n, t in table.items() if t is not None)


def _replace(owner: str, layer: Any, nodes: list[fx.Node], module: fx.GraphModule) -> None:
    module.set_submodule(owner, layer)
    for node in nodes:
        given = arguments_of(node)
        with module.graph.inserting_before(node):
            call = module.graph.call_module(owner, (given.get("indices", given.get("input")),))
        results = [user for user in node.users if user.target is operator.getitem] or [node]
        for result in results:
            result.replace_all_uses_with(call)
            call.meta = dict(result.meta)
        for spent in dict.fromkeys((*results, node)):
            module.graph.erase_node(spent)


# what each operator is


def _convolution(node: fx.Node, given: dict[str, Any], holder: nn.Module) -> nn.Module | None:
    weight: Any = holder.weight
    transposed = bool(given.get("transposed", "transpose" in function_name(node)))
    dims, groups = weight.dim() - 2, given.get("groups", 1)
    make = _CONVOLUTIONS.get((transposed, dims))
    settings = {"groups": groups, "bias": isinstance(given.get("bias"), fx.Node), "device": "meta"}
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
        if transposed or name != "output_padding":
            settings[name] = _spread(given.get(name, default), dims)
    numbers = (groups, *(n for value in settings.values() if isinstance(value, tuple) for n in value))
    if make is None or not all(isinstance(number, int) for number in numbers):
        return None
    size = weight.shape[1] * groups
    return make(*((weight.shape[0], size) if transposed else (size, weight.shape[0])), weight.shape[2:], **settings)


def _spread(value: Any, dims: int) -> Any:
    """Return a setting of a convolution with a number for each dimension; ``"same"`` stays."""
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    return value if isinstance(value, str) else numbers * dims if len(numbers) == 1 else numbers


def _linear(node: fx.Node, given: dict[str, Any], holder: nn.Module) -> nn.Module:
    weight: Any = holder.weight
    return nn.Linear(weight.shape[1], weight.shape[0], bias=isinstance(given.get("bias"), fx.Node), device="meta")


def _embedding(node: fx.Node, given: dict[str, Any], holder: nn.Module) -> nn.Module:
    weight: Any = holder.weight
    padding = given.get("padding_idx", -1)
    return nn.Embedding(*weight.shape, padding_idx=padding if padding >= 0 else None, device="meta")


def _batch_norm(node: fx.Node, given: dict[str, Any], holder: nn.Module) -> nn.Module | None:
    value = given["input"].meta.get("val")
    make = _NORMS_OF_RANK.get(value.dim()) if isinstance(value, Tensor) else None
    stored = all(isinstance(given.get(name), fx.Node) for name in ("running_mean", "running_var"))
    affine = {isinstance(given.get(name), fx.Node) for name in ("weight", "bias")}
    if make is None or not stored or len(affine) != 1 or given.get("training") or not _gives_one_value(node):
        return None
    mean: Any = holder.running_mean
    return make(mean.numel(), eps=given["eps"], momentum=given["momentum"], affine=affine.pop(), device="meta")


def _layer_norm(node: fx.Node, given: dict[str, Any], holder: nn.Module) -> nn.Module | None:
    if not isinstance(given.get("weight"), fx.Node) or not _gives_one_value(node):
        return None
    bias = isinstance(given.get("bias"), fx.Node)
    return nn.LayerNorm(given["normalized_shape"], given.get("eps", 1e-5), bias=bias, device="meta")


def _rms_norm(node: fx.Node, given: dict[str, Any], holder: nn.Module) -> nn.Module:
    return nn.RMSNorm(given["normalized_shape"], given.get("eps"), device="meta")


def _group_norm(node: fx.Node, given: dict[str, Any], holder: nn.Module) -> nn.Module | None:
    if not all(isinstance(given.get(name), fx.Node) for name in ("weight", "bias")) or not _gives_one_value(node):
        return None
    weight: Any = holder.weight
    groups = given["num_groups"] if "num_groups" in given else given["group"]
    return nn.GroupNorm(groups, weight.numel(), given["eps"], device="meta")


def _gives_one_value(node: fx.Node) -> bool:
    """Whether nothing but the normalized value is taken of what a decomposed norm returns."""
    several = isinstance(node.meta.get("val"), list | tuple)
    return not several or all(u.target is operator.getitem and u.args[1] == 0 for u in node.users)


_MAKERS: dict[str, Callable[[fx.Node, dict[str, Any], nn.Module], nn.Module | None]] = {
    **dict.fromkeys(("convolution", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))), _convolution),
    "linear": _linear,
    "embedding": _embedding,
    **dict.fromkeys(("batch_norm", "native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), _layer_norm),
    "rms_norm": _rms_norm,
    **dict.fromkeys(("group_norm", "native_group_norm"), _group_norm),
}
