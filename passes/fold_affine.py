"""Move gains and shifts, which end a norm or stand on their own, into the layers around them.

    y = gamma n(x) + beta,  z = W y + b    =>    y' = n(x),  W' = W gamma,  b' = b + W beta         (forwards)
    y = gamma (W x + b)                    =>    W' = gamma W,  b' = gamma b                        (backwards)

The first is a LayerNorm, RMSNorm, GroupNorm or InstanceNorm: its statistics stay, its gain and shift leave. The second
is a LayerScale, or any other product of an activation and a parameter. What was moved is dropped where the norm does
without, and one and zero where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse import adapters, gains, norms, surgery, ties
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.capture.modes import eval_mode
from normfuse.gains import Gain
from normfuse.graph import ModelGraph
from normfuse.legality import finish, require_no_hooks, require_replaceable
from normfuse.norms import Norm
from normfuse.operations import named
from normfuse.routes import Plan, Router, joined, pad_edits
from normfuse.scopes import common_tail

_LISTINGS = ("parameters", "named_parameters", "state_dict", "_parameters", "__dict__")
_READ_THEIR_NORMS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # for one fused kernel


@dataclass(frozen=True, slots=True)
class _Fold:
    """What ``apply`` does."""

    tensors: dict[str, Tensor]
    edits: list[surgery.Edit] = field(default_factory=list)
    removed: list[fx.Node] = field(default_factory=list)
    pads: dict[str, Tensor] = field(default_factory=dict)
    changed: frozenset[fx.Node] = frozenset()
    ties: list[surgery.Edit] = field(default_factory=list)


class FoldAffine(Pass):
    """Gains and shifts of norms forwards, LayerScale backwards."""

    name = "fold-affine"
    exactness = Exactness.EXACT

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield the products of activations and parameters, then the norms, where they change anything."""
        found = norms.find_norms(graph)
        for gain in gains.products(graph, found):
            if gain.changes_something(graph):
                yield _match(gain, graph)
        for norm in found:
            answer = _gain_of(norm, graph)
            if answer is not None:
                yield Match(norm.name, norm.layer, remains=True, payload=answer)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Find a route, and work out the new tensors."""
        gain: Gain | Refusal = match.payload
        if isinstance(gain, Refusal):
            return gain
        try:
            if gain.norm is None:
                require_replaceable(gain.module, graph)
            else:  # it stays, without its gain, wherever it is held
                require_no_hooks(gain.module, graph)
            for name in gain.tensors:
                _require_own(name, gain, graph)
            plan, tensors = _find(gain, graph)
        except Refused as refused:
            return refused.refusal
        edits, values = pad_edits(plan, graph)
        left = _left_behind(gain, graph)
        tied = ties.find(gain.module, [call.node for call in gain.calls], plan, graph)
        fold = _Fold(tensors | left.tensors, [*edits, *left.edits], left.removed, values, frozenset(plan.changed), tied)
        return replace(match, partners=plan.partners, payload=fold)

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Assign the new tensors, and drop what they took over."""
        fold: _Fold = match.payload
        graph.note_changed(fold.changed)
        graph.ties.extend(fold.ties)
        graph.assign(fold.tensors)
        for edit in fold.edits:
            graph.perform(edit)
        graph.assign(fold.pads)
        for node in fold.removed:
            graph.remove(node)


def _match(gain: Gain, graph: ModelGraph) -> Match:
    if gain.norm is not None:
        return Match(gain.norm.name, gain.norm.layer, remains=True, payload=gain)
    owner = graph.module(gain.module)
    alone = len(list(owner.parameters())) == len(gain.tensors)  # a LayerScale, and not a block that has one
    return Match(gain.module if alone else gain.tensors[0], type(owner).__name__, norm=False, payload=gain)


def _gain_of(norm: Norm, graph: ModelGraph) -> Gain | Refusal | None:
    """Return the gain of a norm; why there is none to move; or None where there is nothing to move."""
    try:
        gain = gains.of_norm(norm, graph)
    except Refused as refused:
        return refused.refusal
    return gain if gain is not None and gain.changes_something(graph) else None


def _find(gain: Gain, graph: ModelGraph) -> tuple[Plan, dict[str, Tensor]]:
    """Return a plan that takes the map of every call of a gain, with the tensors that carry it out."""
    refusals = []
    for direction in (_forward,) if gain.norm is not None else (_backward, _forward):
        try:
            plan = Plan()
            for call in gain.calls:
                plan = direction(gain, call, graph, plan)
            return plan, finish(plan, graph)
        except Refused as refused:
            refusals.append(refused.refusal)
    raise joined(refusals[0], refusals[-1])


def _backward(gain: Gain, call: gains.Call, graph: ModelGraph, plan: Plan) -> Plan:
    return Router(graph).backward(call.value, gain.map(call, graph), call.node, plan)


def _forward(gain: Gain, call: gains.Call, graph: ModelGraph, plan: Plan) -> Plan:
    return Router(graph).forward(call.output, gain.map(call, graph), plan)


def _require_own(name: str, gain: Gain, graph: ModelGraph) -> None:
    """Refuse a gain or shift that anything but its calls reads."""
    owner, _, attribute = name.rpartition(".")
    if attribute not in graph.module(owner)._parameters:
        raise Refused(Reason.PARAMETRIZED, f"{name} is computed from other tensors", "materialize it first")
    if len(graph.owners(name)) > 1:
        others = ", ".join(other for other in graph.owners(name) if other != name)
        raise Refused(Reason.SHARED_PARAMETER, f"{name} is also {others}")
    own = {node for call in gain.calls for node in (call.node, call.output)}
    for reader in _readers(graph.uses(name), graph):
        if reader not in own:
            raise Refused(Reason.SHARED_PARAMETER, f"{name} is also read by {named(reader, graph)}")


def _readers(nodes: list[fx.Node], graph: ModelGraph) -> Iterator[fx.Node]:
    """Yield the nodes on activations that read a parameter, directly or in another shape."""
    for node in nodes:
        if graph.is_constant(node):
            yield from _readers(list(node.users), graph)
        else:
            yield node


def _left_behind(gain: Gain, graph: ModelGraph) -> _Fold:
    """Return what takes a gain and a shift, which moved, out of their place."""
    nodes = [call.node for call in gain.calls]
    if gain.norm is None and gain.shift is None and len(graph.calls_of(gain.module)) == len(nodes):
        tail = common_tail(nodes, gain.module, graph)
        if tail is not None:
            edit = {"op": "replace", "path": gain.module, "module": surgery.chain(tail)}
            return _Fold({}, [edit], nodes)
    if _runs_without(gain, graph):
        return _Fold({}, [{"op": "drop", "tensor": name} for name in gain.tensors])
    neutral = {gain.scale: gain.neutral, gain.shift: 0.0}
    return _Fold({n: torch.full_like(graph.tensor(n), v).double() for n, v in neutral.items() if n is not None})


def _runs_without(gain: Gain, graph: ModelGraph) -> bool:
    """Whether the norm does without its gain and shift, and nothing outside of it asks for them."""
    norm = gain.norm
    if norm is None or norm.module is None or any(graph.shape(call.node) is None for call in gain.calls):
        return False
    if gain.neutral != 1:
        return False
    parent = graph.module(norm.module.rpartition(".")[0])
    if norm.module != gain.module or isinstance(parent, _READ_THEIR_NORMS):
        return False
    if not graph.asked.get(norm.module, set()).isdisjoint(("weight", "bias", *_LISTINGS)):
        return False
    if adapters.token_norm(graph.module(norm.module)) is not None:
        return False
    if all(call.node.op == "call_module" for call in gain.calls):
        return not any(node.op == "get_attr" and node.target in gain.tensors for node in graph.nodes)
    module = graph.module(norm.module)
    calls = graph.calls_of(norm.module)
    return bool(calls) and all(_runs_on_none(module, call.inputs, gain, graph) for call in calls)


def _runs_on_none(module: Any, inputs: tuple[fx.Node, ...], gain: Gain, graph: ModelGraph) -> bool:
    """Try a norm with its own ``forward`` on None, against what it returns on ones and zeros."""
    shapes = [graph.shape(node) for node in inputs]
    if len(shapes) != 1 or shapes[0] is None:
        return False
    x = torch.rand(shapes[0], dtype=inputs[0].meta.get("dtype"))
    results = []
    for plain in (False, True):
        trial = surgery.copy(module)
        for name, value in ((gain.scale, 1.0), (gain.shift, 0.0)):
            if name is not None:
                _set(trial, name.rpartition(".")[2], None if plain else value)
        try:
            with eval_mode(trial), torch.no_grad():
                results.append(trial.cpu()(x))
        except Exception:
            return False
    return isinstance(results[0], Tensor) and torch.allclose(results[0], results[1])


def _set(module: nn.Module, name: str, value: float | None) -> None:
    old = module._parameters[name]
    assert old is not None
    module._parameters[name] = None if value is None else nn.Parameter(torch.full_like(old, value))
