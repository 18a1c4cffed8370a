"""Give each call of a shared layer weights of its own, where sharing is all that keeps a norm from folding.

A convolution called twice, with a norm of its own after each call, cannot absorb both norms; two copies can. The pass
runs only on request (``duplicate_shared=True``): it trades memory for norms. A parameter that belongs to two layers is
untied in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

from normfuse import norms
from normfuse.absorbers import Absorber
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.graph import ModelGraph
from normfuse.legality import finish, require_replaceable
from normfuse.passes.fold_bn import search
from normfuse.routes import Plan


class DuplicateShared(Pass):
    """Copies of shared layers, one per call site."""

    name = "duplicate-shared"
    exactness = Exactness.EXACT

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every shared layer that a norm has a route to."""
        seen = set()
        for norm in norms.norm_nodes(graph):
            for plan in search(norm, graph):
                for absorber in _shared(plan, graph):
                    if absorber.weight not in seen:
                        seen.add(absorber.weight)
                        yield Match(absorber.name, type(graph.module(absorber.owner)).__name__, False, payload=absorber)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Refuse a layer whose calls cannot be told apart by a module of their own."""
        absorber: Absorber = match.payload
        try:
            if len(graph.owners(absorber.weight)) == 1:
                _require_separable(absorber, graph)
        except Refused as refused:
            return refused.refusal
        return match

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Untie its parameters, or replace it by one layer per call."""
        absorber: Absorber = match.payload
        owners = graph.owners(absorber.weight)
        for name in owners[1:]:
            graph.perform({"op": "untie", "tensor": name})
        if len(owners) > 1:
            return
        copies = graph.most_calls(absorber.owner)
        kwargs = {"module": {"ref": absorber.owner}, "copies": copies}
        spec = {"class": "normfuse.layers.deployed.CallSites", "kwargs": kwargs}
        graph.perform({"op": "replace", "path": absorber.owner, "module": spec})
        graph.perform({"op": "count_calls"})


def _require_separable(absorber: Absorber, graph: ModelGraph) -> None:
    """Refuse a layer whose calls cannot be told apart by how many came before.

    Raises:
        Refused: They cannot.
    """
    name = absorber.owner
    if set(graph.uses(absorber.weight)) != set(graph.call_sites(name)):
        raise Refused(Reason.SHARED_MODULE, f"{absorber.name} is shared by code that calls its function directly")
    if not graph.has_regular_calls(name):
        raise Refused(Reason.SHARED_MODULE, f"{name} is not called equally often in every example")
    if graph.most_calls(name) < 2:
        raise Refused(Reason.SHARED_MODULE, f"{name} is used in another way by another example")
    require_replaceable(name, graph)


def _shared(plan: Plan, graph: ModelGraph) -> list[Absorber]:
    """Return the absorbers of a plan that only sharing disqualifies."""
    try:
        finish(plan, graph)
    except Refused as refused:
        if refused.refusal.reason not in (Reason.SHARED_MODULE, Reason.SHARED_PARAMETER):
            return []
    else:
        return []
    absorbers = dict.fromkeys(absorber for absorber, _ in plan.maps)
    return [a for a in absorbers if len(graph.uses(a.weight)) > 1 or len(graph.owners(a.weight)) > 1]
