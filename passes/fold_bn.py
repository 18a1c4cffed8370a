"""Fold norms with a fixed affine inference form into the weights around them.

    y = gamma (x - mean) / sqrt(var + eps) + beta = a x + c

    backwards:  x = W h + b   =>   W' = a W,  b' = a b + c           (per output channel)
    forwards:   z = W y + b   =>   W' = W a,  b' = b + W c           (per input channel, no zero padding where c != 0)

The map need not be adjacent to the weights: :mod:`normfuse.routes` carries it along operations that let it pass.
Backwards is tried first, then forwards. The norm is replaced by ``nn.Identity``, or by what followed it in its module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from normfuse import adapters, norms, surgery
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.graph import ModelGraph
from normfuse.norms import Norm
from normfuse.routes import Plan, Router, finish
from normfuse.scopes import tail_after


@dataclass(frozen=True, slots=True)
class _Fold:
    """What ``apply`` does at one norm."""

    norm: Norm
    tensors: dict[str, Tensor]
    edits: list[surgery.Edit]


class FoldBN(Pass):
    """BatchNorm of every kind, and every other norm of fixed affine form, into weights."""

    name = "fold-bn"
    exactness = Exactness.EXACT

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every norm of fixed affine form that the captured run reached."""
        for norm in norms.norm_nodes(graph):
            yield Match(norm.name, norm.layer, payload=norm)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Find a route, backwards or else forwards, and work out the new tensors."""
        norm: Norm = match.payload
        try:
            _require_no_hooks(norm, graph)
            plan, tensors = _find(norm, graph)
            edits, neutral = _removal(norm, graph)
        except Refused as refused:
            return refused.refusal
        return replace(match, partners=plan.partners, payload=_Fold(norm, tensors | neutral, edits))

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Assign the new tensors and remove the norm."""
        fold: _Fold = match.payload
        graph.assign(fold.tensors)
        for edit in fold.edits:
            graph.perform(edit)
        for node in fold.norm.nodes:
            graph.remove(node)


def _require_no_hooks(norm: Norm, graph: ModelGraph) -> None:
    module = graph.module(norm.module) if norm.module is not None else None
    if module is not None and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
        raise Refused(Reason.HAS_HOOKS, f"a hook on {norm.name} would no longer see it", "remove it first")


def _find(norm: Norm, graph: ModelGraph) -> tuple[Plan, dict[str, Tensor]]:
    """Return a plan that takes the map of every call of a norm, with the tensors that carry it out."""
    refusals = []
    for direction in (_backward, _forward):
        try:
            plan = Plan()
            for node in norm.nodes:
                plan = direction(norm, node, graph, plan)
            return plan, finish(plan, graph)
        except Refused as refused:
            refusals.append(refused.refusal)
    raise _joined(*refusals)


def _backward(norm: Norm, node: fx.Node, graph: ModelGraph, plan: Plan) -> Plan:
    value, m = norms.source(norm, node, graph)
    return Router(graph).backward(value, m, node, plan)


def _forward(norm: Norm, node: fx.Node, graph: ModelGraph, plan: Plan) -> Plan:
    _, m = norms.source(norm, node, graph)
    return Router(graph).forward(node, m, plan)


_SEARCH_ENDED = (Reason.OPAQUE_OPERATION, Reason.EXTRA_CONSUMER, Reason.NO_PRODUCER, Reason.SIGN)


def _joined(back: Refusal, ahead: Refusal) -> Refused:
    """One refusal of the two directions: the reason of the route that came closest, the details of both."""
    if back == ahead:
        return Refused(back.reason, back.detail, back.hint)
    closest = ahead if back.reason in _SEARCH_ENDED and ahead.reason not in _SEARCH_ENDED else back
    detail = f"backwards, {back.detail}; forwards, {ahead.detail}"
    return Refused(closest.reason, detail, closest.hint)


def _removal(norm: Norm, graph: ModelGraph) -> tuple[list[surgery.Edit], dict[str, Tensor]]:
    """Return the edits that take a folded norm out of its model, or the tensors that make its call an identity."""
    if norm.module is not None:
        module = graph.module(norm.module)
        known = adapters.frozen(module) if adapters.is_known(module) else None
        tail = _function_tail(norm, graph) if norm.nodes[0].op != "call_module" else list(known.tail if known else ())
        if tail is not None:
            names = tail if not known else [f"{norm.module}.{name}" for name in tail]
            return [{"op": "replace", "path": norm.module, "module": _chain(names)}], {}
    return [], _neutral(norm, graph)


def _function_tail(norm: Norm, graph: ModelGraph) -> list[str] | None:
    tails = [_tail_of_call(norm, node, graph) for node in norm.nodes]
    return tails[0] if all(tail == tails[0] for tail in tails) else None


def _tail_of_call(norm: Norm, node: fx.Node, graph: ModelGraph) -> list[str] | None:
    call = next((c for c in reversed(node.meta.get("scope", ())) if c.name == norm.module), None)
    if call is None or call.inputs != (node.args[0],):
        return None
    return tail_after(node, call, graph)


def _chain(names: list[str]) -> surgery.Spec:
    refs: list[dict[str, Any]] = [{"ref": name} for name in names]
    return surgery.IDENTITY if not refs else refs[0] if len(refs) == 1 else {"sequential": refs}


def _neutral(norm: Norm, graph: ModelGraph) -> dict[str, Tensor]:
    """Return statistics and affine parameters with which a ``batch_norm`` call, which stays, changes nothing."""
    given = norms.arguments(norm.nodes[0])
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
            if source.op != "get_attr" or len(graph.uses(str(source.target))) > len(norm.nodes):
                raise Refused(Reason.PARAMETRIZED, f"{key} of {norm.name} is computed or read elsewhere")
            tensors[str(source.target)] = make(graph.tensor(str(source.target)).detach().double())
    return tensors
