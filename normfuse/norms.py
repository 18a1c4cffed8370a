"""Which parts of a captured model are norms, and which of those are fixed affine maps.

A norm is a module (a torch norm, a known third-party one, or a class that is named like one), a call of a torch norm
function such as ``F.batch_norm`` on an activation, or a norm written out in torch operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from normfuse import adapters, constant_maps, norm_calls, numerics, torchscript, written_norms
from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.call_arguments import arguments_of
from normfuse.capture.leaves import affine_inference, base_layer
from normfuse.constant_maps import ConstantMap
from normfuse.graph import ModelGraph, ModuleCall, function_name, is_uninitialized
from normfuse.layers.affine_inference import AffineInference
from normfuse.norm_classes import is_norm
from normfuse.ranks import ranks
from normfuse.written_norms import WrittenNorm


@dataclass(slots=True)
class Norm:
    """One normalization layer and where it is called.

    Attributes:
        name: Qualified name of the module, or ``"module:batch_norm"`` for a call in a module that is not a norm.
        layer: Class name, or the name of the function.
        nodes: Its call sites in the graph, in order; empty where the captured run did not reach it.
        module: Qualified name of the norm module, None for a bare call.
        maps: What each call of a module does that only adds and multiplies constants, by its last node in ``nodes``.
    """

    name: str
    layer: str
    module: str | None
    nodes: list[fx.Node] = field(default_factory=list)
    maps: dict[fx.Node, ConstantMap] = field(default_factory=dict)


def find_norms(graph: ModelGraph) -> list[Norm]:
    """Return every norm of the model once: the reached ones in order of execution, then the others."""
    norms = {name: Norm(name, type(m).__name__, name) for name, m in _norm_modules(graph.root)}
    for norm in norms.values():
        norm.nodes = list(graph.call_sites(norm.name))
    norms |= {
        name: Norm(name, f"{made_from}, TorchScript", name) for name, made_from, _ in torchscript.norms_in(graph.root)
    }
    for name, module, nodes in norm_calls.groups(graph, norms):
        norms.setdefault(name, Norm(name, function_name(nodes[0]), module)).nodes = nodes
    for written in written_norms.find(graph):
        _attach_written(written, graph, norms)
    for call in graph.calls:  # a norm of our own naming that calls no torch norm was still reached
        if call.name in norms:
            _attach_call(call, norms[call.name], graph)
    return sorted(norms.values(), key=lambda norm: graph.order[norm.nodes[0]] if norm.nodes else len(graph.nodes))


def _norm_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the norms of activations; a parametrization, such as FixNorm, is one of a weight."""
    yield from ((n, m) for n, m in root.named_modules() if is_norm(m) and ".parametrizations." not in f".{n}")


def _attach_written(written: WrittenNorm, graph: ModelGraph, norms: dict[str, Norm]) -> None:
    """Add a norm that is written out, where it is not the inside of a module that is a norm."""
    if any(call.name in norms for call in written.node.meta.get("scope", ())):
        return
    name = f"{norm_calls.scope_name(written.node)}:{written.kind}"
    run = written.node.meta.get("run", 0)
    alike = [norm for key, norm in norms.items() if key.startswith(name)]
    before = sum(norm.nodes[-1].meta.get("run", 0) == run for norm in alike)
    name = f"{name}_{before}" if before else name
    norms.setdefault(name, Norm(name, f"{written.kind}, written out", None)).nodes.append(written.node)


def _attach_call(call: ModuleCall, norm: Norm, graph: ModelGraph) -> None:
    if norm.nodes and not norm.maps:
        return
    found = constant_maps.of_call(call, graph)
    if found is not None:
        norm.maps[found.nodes[-1]] = found
    norm.nodes.extend(graph.body(call)[:1] if found is None else found.nodes[-1:])


@torch.no_grad()
def source(norm: Norm, node: fx.Node, graph: ModelGraph) -> tuple[fx.Node, AffineMap]:
    """Return the input of a norm's call and the fixed affine map that the call applies to it.

    Raises:
        Refused: The norm has no fixed affine inference form, or its statistics or rank are not known.
    """
    if node.op == "call_module":
        _require_one_result(norm, node, graph)
        scale, shift = _module_affine(norm.name, graph)
    elif function_name(node) == "batch_norm":
        scale, shift = _function_affine(norm.name, node, graph)
    elif norm.module is not None and isinstance(graph.module(norm.module), _NormBase | AffineInference):
        raise Refused(Reason.FORWARD_OVERRIDDEN, f"{norm.name} ({norm.layer}) has a forward of its own")
    else:
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{norm.name} ({norm.layer}) normalises by statistics of its input")
    value, rank = input_of(norm, node, graph)
    return value, AffineMap.along(_channel_axis(graph.module_of(node), rank), rank, scale, shift)


@torch.no_grad()
def written_source(norm: Norm, node: fx.Node, graph: ModelGraph) -> tuple[fx.Node, AffineMap]:
    """Return what :func:`source` does, also for a module that was read as a map of constants.

    Raises:
        Refused: As :func:`source`.
    """
    if node not in norm.maps:
        return source(norm, node, graph)
    return norm.maps[node].value, _written_affine(norm, node, graph)


def _written_affine(norm: Norm, node: fx.Node, graph: ModelGraph) -> AffineMap:
    _require_eval(norm.name, graph)
    value = norm.maps[node].value
    shape = graph.shape(value)
    rank = len(shape) if shape is not None else ranks(value, graph)
    if rank is None:
        raise Refused(Reason.RANK_UNKNOWN, f"the rank of the input of {norm.name} is not known", "pass example_inputs")
    m = norm.maps[node].affine(graph, rank)
    if m is None:
        raise Refused(Reason.AXIS, f"{norm.name} has a constant of more axes than its input")
    return m


def reader(norm: Norm, node: fx.Node) -> fx.Node:
    """Return the node of a call that reads what it normalizes."""
    return norm.maps[node].nodes[0] if node in norm.maps else node


def _require_one_result(norm: Norm, node: fx.Node, graph: ModelGraph) -> None:
    known = affine_inference(graph.module_of(node))
    if known is not None and not known.is_map_of(*node.args, **node.kwargs):
        raise Refused(Reason.EXTRA_CONSUMER, f"{norm.name} is asked for more than its map, which a fold would lose")


def _channel_axis(module: nn.Module | None, rank: int) -> int:
    known = affine_inference(module)
    return 1 if known is None else known.dim % rank


def has_affine_form(norm: Norm, graph: ModelGraph) -> bool:
    """Whether a norm belongs to a family whose inference form is a fixed affine map."""
    if norm.module is not None:
        module = graph.module(norm.module)
        return isinstance(module, _NormBase | AffineInference) or adapters.is_known(module)
    return norm.layer == "batch_norm"


def _module_affine(name: str, graph: ModelGraph) -> tuple[Tensor, Tensor]:
    module = graph.module(name)
    if adapters.is_known(module):
        m: Any = module
        return numerics.norm_affine(m.running_mean, m.running_var, m.weight, m.bias, m.eps)
    known = affine_inference(module)
    if known is not None:
        if not known.is_ready():
            raise Refused(Reason.UNINITIALIZED, f"{name} has not seen its first batch", "train it first")
        if not known.fixed_in_training:
            _require_eval(name, graph)
        return known.affine_map()
    if not isinstance(module, _NormBase):
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{name} ({type(module).__name__}) has no rule")
    if base_layer(module) is None:
        text = f"{name} ({type(module).__name__}) has its own forward, which cannot be traced"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text, "pass example_inputs")
    if is_uninitialized(module):
        raise Refused(Reason.UNINITIALIZED, f"{name} has no values yet", "run the model once")
    if module.running_mean is None or module.running_var is None:
        if isinstance(module, _InstanceNorm):
            raise Refused(Reason.UNSUPPORTED_LAYER, f"{name} normalises each sample by its own statistics")
        raise Refused(Reason.BATCH_STATISTICS, f"{name} has no running statistics", "recalibrate it, or leave it")
    _require_eval(name, graph)
    return numerics.norm_affine(module.running_mean, module.running_var, module.weight, module.bias, module.eps)


def _require_eval(name: str, graph: ModelGraph) -> None:
    if name in graph.training:
        raise Refused(Reason.BATCH_STATISTICS, f"{name} is in training mode in a model in eval mode", "call .eval()")


def _function_affine(name: str, node: fx.Node, graph: ModelGraph) -> tuple[Tensor, Tensor]:
    given = arguments_of(node)
    if given.get("training"):
        raise Refused(Reason.BATCH_STATISTICS, f"{name} is called with training=True", "it needs stored statistics")
    values: dict[str, Tensor | None] = {}
    for key in ("running_mean", "running_var", "weight", "bias"):
        argument = given.get(key)
        if isinstance(argument, fx.Node) and not graph.is_constant(argument):
            raise Refused(Reason.OPAQUE_OPERATION, f"{key} of {name} is computed from the input")
        values[key] = graph.value(argument) if isinstance(argument, fx.Node) else None
    if values["running_mean"] is None or values["running_var"] is None:
        raise Refused(Reason.BATCH_STATISTICS, f"{name} has no running statistics", "recalibrate it, or leave it")
    mean, var = values["running_mean"], values["running_var"]
    return numerics.norm_affine(mean, var, values["weight"], values["bias"], given.get("eps", 1e-5))


def input_of(norm: Norm, node: fx.Node, graph: ModelGraph) -> tuple[fx.Node, int]:
    """Return the value that a call of a norm normalizes, and its rank.

    Raises:
        Refused: The rank is not known.
    """
    value = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    if not isinstance(value, fx.Node):
        raise Refused(Reason.NO_PRODUCER, f"the input of {norm.name} is not a value of the graph")
    return value, _rank(norm, node, value, graph)


def _rank(norm: Norm, node: fx.Node, value: fx.Node, graph: ModelGraph) -> int:
    shape = graph.shape(value)
    known = len(shape) if shape is not None else _rank_of_class(norm, graph) or ranks(node, graph)
    if known is None or (shape is None and known > 3 and norm.layer == "BatchNorm1d"):  # a convolution without a batch
        raise Refused(Reason.RANK_UNKNOWN, f"the rank of the input of {norm.name} is not known", "pass example_inputs")
    module = graph.module_of(node)
    if isinstance(module, _InstanceNorm) and known == module._get_no_batch_dim():
        raise Refused(Reason.AXIS, f"{norm.name} is called on an unbatched input")
    return known


def assumed_rank(norm: Norm, graph: ModelGraph) -> int | None:
    """Return the rank that the layers in front of a norm imply for its input, where its class takes another as well.

    A traced convolution of signals gives ``(N, C, L)``, or ``(C, L)`` without a batch. A frozen BatchNorm of pictures
    broadcasts its constants to whatever it is given.
    """
    module = graph.module(norm.module) if norm.module is not None else None
    if graph.inputs is not None or module is None:
        return None
    if adapters.is_known(module):
        return 4
    if not isinstance(module, nn.BatchNorm1d | nn.SyncBatchNorm):
        return None
    known = {ranks(node, graph) for node in norm.nodes}
    return 3 if known == {3} else None


def _rank_of_class(norm: Norm, graph: ModelGraph) -> int | None:
    module = graph.module(norm.module) if norm.module is not None else None
    return 4 if isinstance(module, nn.BatchNorm2d) else 5 if isinstance(module, nn.BatchNorm3d) else None


def written_maps(graph: ModelGraph) -> Iterator[Norm]:
    """Yield the norms of no known affine form of which every call only adds and multiplies constants."""
    for norm in find_norms(graph):
        if norm.maps and all(node in norm.maps for node in norm.nodes) and not has_affine_form(norm, graph):
            yield norm


def norm_nodes(graph: ModelGraph) -> Iterator[Norm]:
    """Yield the norms of fixed affine form that the captured run reached."""
    yield from (norm for norm in find_norms(graph) if norm.nodes and has_affine_form(norm, graph))
