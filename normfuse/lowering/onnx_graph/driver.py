"""Try every BatchNormalization of a model, backwards and then forwards, until no further one can be folded.

A fold removes an operation from the way of others, so a norm that was refused is asked again after each round.
"""

from __future__ import annotations

import collections
import fnmatch
from collections.abc import Iterator

import onnx_ir as ir

from normfuse.base import Reason, Refusal, Refused
from normfuse.lowering.onnx_graph import absorb, branch, follow, norm  # noqa: F401 - they fill the tables of the routes
from normfuse.lowering.onnx_graph.channel_map import ChannelMap
from normfuse.lowering.onnx_graph.plan import Names, remove_norm
from normfuse.lowering.onnx_graph.routes import Route, named
from normfuse.lowering.onnx_graph.values import is_standard, label
from normfuse.report import Outcome, Status

PASS_NAME = "fold-bn"
LAYER = "BatchNormalization"
VAGUE = (Reason.OPAQUE_OPERATION, Reason.SIGN)  # the other direction's reason may tell more


def fold_norms(model: ir.Model, include: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[Outcome, ...]:
    """Fold what can be folded in a model, in place, and return one outcome per BatchNormalization node."""
    names, opset = Names(model), _opset(model)
    subjects = _subjects(_norms(model))
    outcomes: dict[ir.Node, Outcome] = {}
    pending = []
    for node, subject in subjects.items():
        refusal = _out_of_reach(node, model) or _excluded(subject, include, exclude)
        outcomes[node] = _outcome(subject, refusal)
        if refusal is None:
            pending.append(node)
    moved = True
    while moved and pending:
        moved = False
        for node in tuple(pending):
            answer = _fold_one(node, opset, names)
            outcomes[node] = _outcome(subjects[node], answer)
            if not isinstance(answer, Refusal):
                pending.remove(node)
                moved = True
    return tuple(outcomes.values())


def _fold_one(node: ir.Node, opset: int, names: Names) -> tuple[str, ...] | Refusal:
    """Fold one norm and return the names of what absorbed it, or why neither direction can."""
    try:
        with named(node):
            m = norm.channel_map(node, opset)
    except Refused as refused:
        return refused.refusal
    refusals = []
    for forwards in (False, True):
        route = Route(opset)
        try:
            _walk(route, node, m, forwards)
        except Refused as refused:
            refusals.append(refused.refusal)
        else:
            route.plan.commit(names)
            remove_norm(node)
            return tuple(label(partner) for partner in route.plan.partners)
    return _clearer(*refusals)


def _walk(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> None:
    if forwards:
        route.forwards(node.outputs[0], m)
    else:
        route.backwards(node, 0, m)


def _clearer(backwards: Refusal, forwards: Refusal) -> Refusal:
    """Return the refusal that tells more, with the other direction's in its detail."""
    if backwards.reason is Reason.NO_PRODUCER:
        swap = forwards.reason is not Reason.EXTRA_CONSUMER
    else:
        swap = backwards.reason in VAGUE and forwards.reason not in (*VAGUE, Reason.EXTRA_CONSUMER)
    first, second = (forwards, backwards) if swap else (backwards, forwards)
    return Refusal(first.reason, f"{first.detail}; the other way, {second.detail}", first.hint)


def _norms(model: ir.Model) -> Iterator[ir.Node]:
    for body in (model.graph, *model.functions.values()):
        for node in body.all_nodes():
            if node.op_type == LAYER and is_standard(node):
                yield node


def _subjects(nodes: Iterator[ir.Node]) -> dict[ir.Node, str]:
    """Return a name for each node, its output's where the node's own name is not unique."""
    named = {node: label(node) for node in nodes}
    counts = collections.Counter(named.values())
    taken: collections.Counter[str] = collections.Counter()
    for node, name in named.items():
        if counts[name] > 1:
            name = node.outputs[0].name or name
            taken[name] += 1
            named[node] = name if taken[name] == 1 else f"{name}#{taken[name]}"
    return named


def _out_of_reach(node: ir.Node, model: ir.Model) -> Refusal | None:
    for function in model.functions.values():
        if any(node is other for other in function.all_nodes()):
            detail = f"{label(node)} is in the function {function.name}, which several nodes may call"
            return Refusal(Reason.SHARED_MODULE, detail, "inline functions first (onnx.inliner)")
    return None


def _excluded(subject: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> Refusal | None:
    if any(fnmatch.fnmatchcase(subject, pattern) for pattern in exclude):
        return Refusal(Reason.EXCLUDED, f"{subject} matches an excluded pattern")
    if include and not any(fnmatch.fnmatchcase(subject, pattern) for pattern in include):
        return Refusal(Reason.EXCLUDED, f"{subject} matches no included pattern")
    return None


def _outcome(subject: str, answer: tuple[str, ...] | Refusal | None) -> Outcome:
    if isinstance(answer, tuple):
        return Outcome(PASS_NAME, Status.APPLIED, subject, LAYER, partners=answer)
    return Outcome(PASS_NAME, Status.REFUSED, subject, LAYER, refusal=answer)


def _opset(model: ir.Model) -> int:
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
