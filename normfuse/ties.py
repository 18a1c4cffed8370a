"""Which layers must run together with a norm that was folded into them.

Only where the code around them decides what it runs (:mod:`normfuse.capture.decisions`), and its source does not show
that they always run together (:mod:`normfuse.branching`); or where a layer serves one of the calls of a duplicated
layer, which are told apart by their order. A norm and a layer can be told to run together where both are called as
modules; where no layer of a plan is, the norm is tied to the module that calls it, and where the norm is the call of a
function, the layers are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from normfuse import branching
from normfuse.graph import ModelGraph
from normfuse.layers.deployed import CallSites
from normfuse.routes import Plan
from normfuse.surgery import Edit


def find(norm: str | None, nodes: list[fx.Node], plan: Plan, graph: ModelGraph) -> list[Edit]:
    """Return the edits that tie the calls of a norm to those of the layers that take its map.

    Args:
        norm: Qualified name of its module, None where there is none.
        nodes: Its calls.
        plan: Who takes its map.
        graph: The model before the fold.
    """
    layers = list(dict.fromkeys(absorber.owner for absorber, _ in plan.maps if absorber.owner))
    numbered = any(_is_site(layer, graph) for layer in layers)
    decided = not graph.decided.isdisjoint([norm or "", *layers])
    if not (numbered or (decided and _may_part(nodes, plan, graph))):
        return []
    scope = nodes[0].meta.get("scope", ())
    caller = scope[-1].name if scope else ""
    counted = bool(norm) and bool(graph.calls_by_run(str(norm)))
    tied = [_tie(norm, layer, graph) for layer in layers] if norm and counted else []
    if not any(tied):
        tied = [_tie(one, caller, graph) for one in ([norm] if norm and counted else layers)]
    leads = {absorber.owner for absorber, side in plan.maps if side == "output"}
    return [{**edit, "led": edit["led"] and edit["to"] in leads} for edit in tied if edit is not None]


def _may_part(nodes: list[fx.Node], plan: Plan, graph: ModelGraph) -> bool:
    """Whether a run may reach a call of the norm without one of a layer, or the other way round."""
    calls = [call for calls in plan.maps.values() for call in calls]
    return any(branching.may_part(node, call, graph) for node in nodes for call in calls)


def _tie(norm: str, layer: str, graph: ModelGraph) -> Edit | None:
    """Return the edit, None where one of the two is not called as a module, or not in step with the other."""
    of_norm, of_layer = graph.calls_by_run(norm), _calls_by_run(layer, graph)
    first = next(iter(of_norm), None)
    if first is None or not of_layer.get(first):
        return None
    m, n = of_norm[first], of_layer[first]
    in_step = all(of_norm.get(run, 0) * n == of_layer.get(run, 0) * m for run in {*of_norm, *of_layer})
    if not in_step:
        return None
    return {"op": "tie_calls", "path": norm, "to": layer, "calls": [m, n], "led": _is_site(layer, graph)}


def _is_site(layer: str, graph: ModelGraph) -> bool:
    """Whether a layer serves one of the calls of a duplicated layer."""
    owner, found, _ = layer.rpartition(".sites.")
    return bool(found) and isinstance(graph.module(owner), CallSites)


def _calls_by_run(layer: str, graph: ModelGraph) -> Mapping[int, int]:
    if layer:
        return graph.calls_by_run(layer)
    return {int(node.meta.get("run", 0)): 1 for node in graph.nodes}
