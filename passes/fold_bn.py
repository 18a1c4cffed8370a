"""Fold norms with a fixed affine inference form into the weights around them.

    y = gamma (x - mean) / sqrt(var + eps) + beta = a x + c

    backwards:  x = W h + b   =>   W' = a W,  b' = a b + c           (per output channel)
    forwards:   z = W y + b   =>   W' = W a,  b' = b + W c           (per input channel, no zero padding where c != 0)

The map need not be adjacent to the weights: :mod:`normfuse.routes` carries it along operations that let it pass.
Backwards is tried first, then forwards. The norm is replaced by ``nn.Identity``, or by what followed it in its module.
The group scaling in front of a PowerNorm depends on the token: it stays, and the map can only go forwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from normfuse import adapters, aliases, norms, standing_in, surgery, ties
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.call_arguments import arguments_of
from normfuse.capture.leaves import affine_inference
from normfuse.graph import ModelGraph
from normfuse.layers.power_norm import GroupScaling, PowerNorm
from normfuse.legality import finish, require_replaceable, require_saved
from normfuse.norms import Norm
from normfuse.operations import describe
from normfuse.routes import Plan, Router, joined, pad_edits
from normfuse.scopes import common_tail
from normfuse.shown_tensors import shown_tensor


@dataclass(frozen=True, slots=True)
class _Fold:
    """What ``apply`` does at one norm."""

    norm: Norm
    tensors: dict[str, Tensor]
    edits: list[surgery.Edit]
    pads: dict[str, Tensor]
    changed: set[fx.Node]
    ties: list[surgery.Edit]


class FoldBN(Pass):
    """BatchNorm of every kind, and every other norm of fixed affine form, into weights."""

    name = "fold-bn"
    exactness = Exactness.EXACT

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every norm of fixed affine form that the captured run reached."""
        for norm in (*norms.norm_nodes(graph), *norms.written_maps(graph)):
            yield Match(norm.name, norm.layer, payload=norm)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Find a route, backwards or else forwards, and work out the new tensors."""
        norm: Norm = match.payload
        try:
            if _is_replaced(norm):
                require_replaceable(norm.module, graph)
            _require_own_readers(norm, graph)
            plan, tensors = _find(norm, graph)
            for node in norm.nodes if _is_replaced(norm) else ():
                value, _ = norms.written_source(norm, node, graph)
                aliases.require_unwritten(norm.name, value, node, graph)
            edits, neutral = _removal(norm, graph)
            edits = [standing_in.answering(edit, graph) for edit in edits]
            rank = norms.assumed_rank(norm, graph)
            edits = [standing_in.of_one_rank(edit, rank) for edit in edits] if rank is not None else edits
        except Refused as refused:
            return refused.refusal
        pads, values = pad_edits(plan, graph)
        tied = ties.find(norm.module, norm.nodes, plan, graph)
        fold = _Fold(norm, tensors | neutral, [*pads, *edits], values, plan.changed, tied)
        kept = _kept(norm, graph)
        return replace(match, partners=plan.partners, remains=kept is not None, kept=kept, payload=fold)

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Assign the new tensors and remove the norm."""
        fold: _Fold = match.payload
        graph.note_changed(fold.changed)
        graph.ties.extend(fold.ties)
        graph.assign(fold.tensors)
        for edit in fold.edits:
            graph.perform(edit)
        graph.assign(fold.pads)
        for node in fold.norm.nodes if match.kept is None else ():
            for step in fold.norm.maps[node].nodes if node in fold.norm.maps else (node,):
                graph.remove(step)


def _require_own_readers(norm: Norm, graph: ModelGraph) -> None:
    """Refuse where code outside of a norm module reads its tensors: the module may be replaced."""
    module = graph.module(norm.module) if norm.module is not None else None
    for key in (*module._parameters, *module._buffers) if module is not None else ():
        name = f"{norm.module}.{key}"
        other = next((use for use in graph.uses(name) if not _is_inside(use, norm)), None)
        if other is not None and len(graph.owners(name)) == 1:
            raise Refused(Reason.SHARED_PARAMETER, f"{name} is also read by {describe(other, graph).label}")


def _is_replaced(norm: Norm) -> bool:
    """Whether a fold puts something in the place of a norm's module: it is called, and not only its function."""
    return any(node.op == "call_module" or _is_in_forward(node, norm) for node in norm.nodes)


def _is_inside(node: fx.Node, norm: Norm) -> bool:
    """Whether a node is a call of the norm, or stands in the ``forward`` of its module."""
    return node in norm.nodes or _is_in_forward(node, norm)


def _is_in_forward(node: fx.Node, norm: Norm) -> bool:
    return any(call.name == norm.module for call in node.meta.get("scope", ()))


def _find(norm: Norm, graph: ModelGraph) -> tuple[Plan, dict[str, Tensor]]:
    """Return a plan that takes the map of every call of a norm, with the tensors that carry it out."""
    refusals = []
    for direction in (_backward, _forward) if _scaling(norm, graph) is None else (_forward,):
        try:
            plan = _plan(direction, norm, graph)
            return plan, finish(plan, graph)
        except Refused as refused:
            refusals.append(refused.refusal)
    raise joined(refusals[0], refusals[-1])


def search(norm: Norm, graph: ModelGraph) -> Iterator[Plan]:
    """Yield the plans that take the map of every call of a norm, backwards and forwards, whether or not legal."""
    for direction in (_backward, _forward) if _scaling(norm, graph) is None else (_forward,):
        with contextlib.suppress(Refused):
            yield _plan(direction, norm, graph)


def _scaling(norm: Norm, graph: ModelGraph) -> str | None:
    """Return the name of the group scaling that runs in a norm before its map, None without one."""
    module = graph.module(norm.module) if norm.module is not None else None
    scaled = isinstance(module, PowerNorm) and isinstance(module.group_scaling, GroupScaling)
    return f"{norm.module}.group_scaling" if scaled else None


def _kept(norm: Norm, graph: ModelGraph) -> Refusal | None:
    """Return what of a folded norm stays, and why."""
    name = _scaling(norm, graph)
    text = f"{name} divides each token by its own root mean square, and stays"
    return None if name is None else Refusal(Reason.UNSUPPORTED_LAYER, text)


def _plan(direction: Callable[[Norm, fx.Node, ModelGraph, Plan], Plan], norm: Norm, graph: ModelGraph) -> Plan:
    plan = Plan()
    for node in norm.nodes:
        plan = direction(norm, node, graph, plan)
    return plan


def _backward(norm: Norm, node: fx.Node, graph: ModelGraph, plan: Plan) -> Plan:
    value, m = norms.written_source(norm, node, graph)
    return Router(graph).backward(value, m, norms.reader(norm, node), plan)


def _forward(norm: Norm, node: fx.Node, graph: ModelGraph, plan: Plan) -> Plan:
    _, m = norms.written_source(norm, node, graph)
    return Router(graph).forward(node, m, plan)


def _removal(norm: Norm, graph: ModelGraph) -> tuple[list[surgery.Edit], dict[str, Tensor]]:
    """Return the edits that take a folded norm out of its model, or the tensors that make its call an identity."""
    if norm.module is not None:
        module = graph.module(norm.module)
        known = adapters.frozen(module) if adapters.is_known(module) else None
        tail: list[str] | None = list(known.tail) if known else []
        scaling = _scaling(norm, graph)
        if norm.maps:
            return [{"op": "replace", "path": norm.module, "module": surgery.IDENTITY}], {}
        if affine_inference(module) is not None:
            left = surgery.IDENTITY if scaling is None else {"ref": scaling}
            return [{"op": "replace", "path": norm.module, "module": _on_input_alone(left, norm)}], {}
        if norm.nodes[0].op != "call_module":
            tail = common_tail(norm.nodes, norm.module, graph)
        if tail is not None:
            names = tail if not known else [f"{norm.module}.{name}" for name in tail]
            return [{"op": "replace", "path": norm.module, "module": surgery.chain(names)}], {}
    return [], _neutral(norm, graph)


def _on_input_alone(spec: surgery.Spec, norm: Norm) -> surgery.Spec:
    """Return the spec of a module that takes what the norm is called with, which may be more than its input."""
    if all(len(node.args) + len(node.kwargs) == 1 and not node.kwargs for node in norm.nodes):
        return spec
    return {"class": "normfuse.layers.deployed.FirstArgument", "kwargs": {"module": spec}}


def _neutral(norm: Norm, graph: ModelGraph) -> dict[str, Tensor]:
    """Return statistics and affine parameters with which a ``batch_norm`` call, which stays, changes nothing."""
    given = arguments_of(norm.nodes[0])
    makers: dict[str, Callable[[Tensor], Tensor]] = {
        "running_mean": torch.zeros_like,
        "running_var": lambda t: torch.ones_like(t) - given.get("eps", 1e-5),
        "weight": torch.ones_like,
        "bias": torch.zeros_like,
    }
    tensors = {}
    for key, make in makers.items():
        source = given.get(key)
        if isinstance(source, fx.Node):
            name = _own_tensor(source, key, norm, graph)
            tensors[name] = make(graph.tensor(name).detach().double())
    if all(torch.equal(new.to(graph.tensor(name)), graph.tensor(name)) for name, new in tensors.items()):
        raise Refused(Reason.NOT_CHEAPER, f"{norm.name} changes nothing already, only its call is left")
    return tensors


def _own_tensor(source: fx.Node, key: str, norm: Norm, graph: ModelGraph) -> str:
    """Return the name of the tensor that a norm takes as its argument ``key``, if only the calls of the norm read it.

    Raises:
        Refused: It is computed, read elsewhere, or no part of what is saved of the model.
    """
    name, _ = shown_tensor(source, graph)
    if name is None:
        raise Refused(Reason.PARAMETRIZED, f"{key} of {norm.name} is computed at every call")
    other = next((use for use in graph.uses(name) if use not in norm.nodes), None)
    if other is not None:
        raise Refused(Reason.SHARED_PARAMETER, f"{name} is also read by {describe(other, graph).label}")
    require_saved(name, graph)
    return name
