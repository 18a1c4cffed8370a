"""Make computed weights plain, so that other passes can change them.

    weight norm                w = g v / |v|                       (1602.07868)
    spectral norm              w = W / (u' W v), stored u and v    (1802.05957)
    weight standardization     w = (W - mean) / std per output     (1903.10520), times a gain if scaled (2101.08692)

and every other parametrization: what the weight is in eval mode is evaluated once, by the module's own code. A
convolution that standardizes its weight in its ``forward`` becomes a plain convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from normfuse import computed, surgery
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.call_arguments import arguments_of
from normfuse.capture import record
from normfuse.capture.leaves import base_layer
from normfuse.capture.modes import eval_mode
from normfuse.errors import CaptureError
from normfuse.graph import ModelGraph, function_name
from normfuse.operations import named
from normfuse.patches import patched

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_SAME_PADDED = {
    "timm.layers.std_conv.StdConv2dSame": "timm.layers.conv2d_same.Conv2dSame",
    "timm.layers.std_conv.ScaledStdConv2dSame": "timm.layers.conv2d_same.Conv2dSame",
}


@dataclass(frozen=True, slots=True)
class _Parametrized:
    """A tensor that torch computes for a module, and those that it computes alike from the same tensors."""

    module: str
    tensor: str
    twins: tuple[_Parametrized, ...] = ()


@dataclass(frozen=True, slots=True)
class _OwnForward:
    """A layer that computes its weight in its ``forward``, as the graph of that ``forward`` alone."""

    module: str
    graph: ModelGraph
    node: fx.Node
    tensors: tuple[tuple[str, Tensor], ...] = ()
    edits: tuple[surgery.Edit, ...] = ()


class Materialize(Pass):
    """Computed weights as plain parameters."""

    name = "materialize"
    exactness = Exactness.EXACT

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every parametrized tensor, and every convolution or linear layer that computes its weight."""
        for name, module in graph.root.named_modules():
            for tensor, maker in computed.makers(module).items():
                yield Match(_joined(name, tensor), maker, norm=False, payload=_Parametrized(name, tensor))
            found = _own_forward(name, module)
            if found is not None:
                yield Match(_joined(name, "weight"), type(module).__name__, norm=False, payload=found)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Work out the value, and refuse where the model would not come out the same."""
        site = match.payload
        try:
            if isinstance(site, _OwnForward):
                site = _as_plain_layer(site, graph)
            elif site.tensor in computed.makers(graph.module(site.module)):  # else it was made plain with its twin
                _require_fixed(match.subject, site, graph)
                site = replace(site, twins=tuple(_twins(site, graph)))
        except Refused as refused:
            return refused.refusal
        return replace(match, partners=(site.module,) if site.module else (), payload=site)

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Replace the tensor, and what computed it."""
        site = match.payload
        if isinstance(site, _OwnForward):
            for edit in site.edits:
                graph.perform(edit)
            graph.assign(dict(site.tensors))
            return
        for one in (site, *site.twins) if site.tensor in computed.makers(graph.module(site.module)) else ():
            with eval_mode(graph.module(one.module)):
                graph.perform({"op": "materialize", "path": one.module, "tensor": one.tensor})
            if one is not site:
                tied = {"tensor": _joined(one.module, one.tensor), "to": _joined(site.module, site.tensor)}
                graph.perform({"op": "tie", **tied})


def _joined(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


# what torch computes


def _twins(site: _Parametrized, graph: ModelGraph) -> Iterator[_Parametrized]:
    """Yield the tensors of other modules that have the same value, computed from the same parameters: a tied table."""
    module = graph.module(site.module)
    shared = computed.originals(module, site.tensor)
    for name, other in graph.root.named_modules() if shared else ():
        for tensor in computed.makers(other) if other is not module else ():
            if computed.originals(other, tensor) != shared:
                continue
            values = []
            for owner, attribute in ((module, site.tensor), (other, tensor)):
                with eval_mode(owner), torch.no_grad():
                    values.append(getattr(owner, attribute))
            if torch.equal(*values):
                yield _Parametrized(name, tensor)


def _require_fixed(subject: str, site: _Parametrized, graph: ModelGraph) -> None:
    """Refuse a tensor that cannot be evaluated, or has another value each time, trying it on a copy of its module."""
    try:
        trial = surgery.copy(graph.module(site.module))
        with eval_mode(trial), torch.no_grad():
            before = getattr(trial, site.tensor).detach().clone()
            computed.make_plain(trial, site.tensor)
    except Exception as error:
        text = f"{subject} cannot be computed: {type(error).__name__}: {error}"
        raise Refused(Reason.PARAMETRIZED, text.splitlines()[0]) from error
    if torch.equal(before.nan_to_num(), getattr(trial, site.tensor).nan_to_num()):
        return
    if nn.utils.parametrize.is_parametrized(graph.module(site.module), site.tensor):
        raise Refused(Reason.PARAMETRIZED, f"{subject} has another value at each call, also in eval mode")
    _require_hook_to_run(subject, site, graph)


def _require_hook_to_run(subject: str, site: _Parametrized, graph: ModelGraph) -> None:
    """Refuse a tensor that a hook has not brought up to date, where something reads it without a call of its module."""
    _require_whole(graph)
    for node in graph.uses(subject):
        scopes = {call.name for call in node.meta.get("scope", ())} | {str(node.target)}
        if site.module not in scopes:
            text = f"{named(node, graph)} reads {subject} without a call of {site.module}, which would compute it first"
            raise Refused(Reason.PARAMETRIZED, text, "torch.nn.utils.parametrizations compute it at every read")


# what a layer computes in its forward


def _own_forward(name: str, module: nn.Module) -> _OwnForward | None:
    """Return a layer whose own ``forward`` applies a computed weight; it is run on zeros to see that."""
    if not isinstance(module, _PLAIN) or base_layer(module) is not None or not isinstance(module.weight, Tensor):
        return None
    try:
        graph = record(module, _probe(module))
    except (CaptureError, RuntimeError):
        return None
    for node in graph.nodes:
        if function_name(node) in ("conv1d", "conv2d", "conv3d", "linear") and not graph.is_constant(node):
            weight = arguments_of(node).get("weight")
            if isinstance(weight, fx.Node) and weight.op != "get_attr" and graph.is_constant(weight):
                return _OwnForward(name, graph, node)
    return None


def _probe(module: Any) -> Tensor:
    """Return zeros of a size that needs padding, where a layer pads only as far as its input needs it."""
    like = {"dtype": module.weight.dtype, "device": module.weight.device}
    if isinstance(module, nn.Linear):
        return torch.zeros(1, module.in_features, **like)
    rows = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    return torch.zeros(1, module.in_channels, *(k * s * d + 1 for k, s, d in rows), **like)


def _as_plain_layer(site: _OwnForward, graph: ModelGraph) -> _OwnForward:
    """Return the site with the weight, and the edits that make its layer one with a plain weight."""
    module: Any = graph.module(site.module)
    target = _plain_class(site, module)
    value = site.graph.value(arguments_of(site.node)["weight"])
    if value.shape != module.weight.shape or value.dtype != module.weight.dtype:
        text = f"the weight that {site.module} computes is not of the shape and dtype it stores"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text)
    names = [_joined(site.module, key) for key in module._parameters if module._parameters[key] is not None]
    for name in dict.fromkeys((_joined(site.module, "weight"), *names)):  # that a hook computes is no parameter
        _require_own_readers(name, graph)
    weight, bias = _joined(site.module, "weight"), _joined(site.module, "bias")
    edits = [{"op": "untie", "tensor": weight}] if len(graph.owners(weight)) > 1 else []
    edits += [{"op": "drop", "tensor": name} for name in names if name not in (weight, bias)]
    edits.append({"op": "retype", "path": site.module, "class": target})
    return replace(site, tensors=((weight, value.double()),), edits=tuple(edits))


def _plain_class(site: _OwnForward, module: nn.Module) -> str:
    """Return the class that does with a plain weight what the layer does with the computed one."""
    if (method := patched(module)) is not None:
        text = f"{_joined(site.module, method)} was replaced on the instance, and would compute the weight again"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text, f"del {_joined(site.module, method)}")
    own = f"{type(module).__module__}.{type(module).__qualname__}"
    if own in _SAME_PADDED and getattr(module, "same_pad", False):
        return _SAME_PADDED[own]
    active = [n for n in site.graph.nodes if n.op.startswith("call") and not site.graph.is_constant(n)]
    call = site.graph.calls_of("")[0]
    source = arguments_of(site.node).get("input")
    alone = active == [site.node] and call.outputs == (site.node,) and call.inputs == (source,)
    if not alone or not _as_declared(site.node, module):
        text = f"{site.module} ({type(module).__name__}) does more than apply a computed weight"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text)
    plain = next(cls for cls in _PLAIN if isinstance(module, cls))
    return f"{plain.__module__}.{plain.__qualname__}"


def _as_declared(node: fx.Node, module: Any) -> bool:
    """Whether a call of a convolution or linear function uses the bias and the numbers that its layer stores."""
    given = arguments_of(node)
    bias = given.get("bias")
    same_bias = module.bias is None if bias is None else isinstance(bias, fx.Node) and bias.target == "bias"
    if not isinstance(module, _ConvNd):
        return same_bias
    numbers = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    count = len(module.kernel_size)
    same = [_spread(given.get(k, n), count) == _spread(getattr(module, k), count) for k, n in numbers.items()]
    return same_bias and module.padding_mode == "zeros" and all(same)


def _spread(value: Any, count: int) -> Any:
    return (value,) * count if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else value


def _require_whole(graph: ModelGraph) -> None:
    if graph.partial:
        text = "only parts of the model could be traced, other readers may be unseen"
        raise Refused(Reason.PARTIAL_CAPTURE, text, "pass example_inputs")


def _require_own_readers(name: str, graph: ModelGraph) -> None:
    """Refuse a tensor that anything but the layers it belongs to reads."""
    _require_whole(graph)
    owners = {owner.rpartition(".")[0] for owner in graph.owners(name)}
    for node in graph.uses(name):
        scopes = {call.name for call in node.meta.get("scope", ())} | {str(node.target)}
        if not owners & scopes:
            raise Refused(Reason.SHARED_PARAMETER, f"{name} is also read by {named(node, graph)}")
