"""What became of every layer in a run of passes: noted place by place, and made into the report of the run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from normfuse import families, torchscript
from normfuse.base import Match, Pass, Reason, Refusal
from normfuse.graph import ModelGraph
from normfuse.norms import Norm
from normfuse.report import Outcome, Report, Status


@dataclass(slots=True)
class Outcomes:
    """The outcomes of one run.

    Attributes:
        ran: Names of the passes of the run, in order.
        noted: The outcome of each layer, by its name and whether it is a norm; the best one where passes differ.
        unread: Why a pass, by its name, could not look at the model at all.
        guarded: Layers that raise, should they run, with the names of their classes.
    """

    ran: tuple[str, ...]
    noted: dict[tuple[str, bool], Outcome] = field(default_factory=dict)
    unread: dict[str, Refusal] = field(default_factory=dict)
    guarded: dict[str, str] = field(default_factory=dict)

    def note(self, one: Pass, match: Match, answer: Match | Refusal, name: str) -> None:
        """Note what a pass answered at a place, unless a pass has applied something there, or refused before."""
        done = isinstance(answer, Match)
        before = self.noted.get((name, match.norm))
        if before is not None and before.status is Status.APPLIED and (not done or before.pass_name == one.name):
            return
        if before is not None and not done:
            return
        refusal = answer.kept if isinstance(answer, Match) else answer
        partners = answer.partners if isinstance(answer, Match) else match.partners
        status, remains = Status.APPLIED if done else Status.REFUSED, isinstance(answer, Match) and answer.remains
        about = (one.name, status, name, match.layer, match.norm, partners, refusal, remains)
        self.noted[name, match.norm] = Outcome(*about)
        for norm, layer in answer.absorbed if isinstance(answer, Match) else ():
            self.noted[norm, True] = Outcome(one.name, status, norm, layer, True, (name,))

    def report(self, inventory: list[Norm], notes: tuple[str, ...], graph: ModelGraph) -> Report:
        """Return every norm once, in order of execution, and after them what else was rewritten."""
        about_norms = [self._about(norm, graph) for norm in inventory]
        known = {norm.name for norm in inventory}
        others = [o for (name, is_norm), o in self.noted.items() if not is_norm or name not in known]
        others += [_unrun(name, layer, is_norm=False) for name, layer in self.guarded.items() if name not in known]
        return Report((*about_norms, *others), tuple(dict.fromkeys(self.ran)), notes)

    def _about(self, norm: Norm, graph: ModelGraph) -> Outcome:
        """Return the outcome of a norm; where all of it stays in any case, that its gain does is not the reason."""
        outcome = self.noted.get((norm.name, True))
        if outcome is None:
            return _unrun(norm.name, norm.layer) if norm.name in self.guarded else self._left(norm, graph)
        if outcome.status is Status.REFUSED and families.stays(norm, graph) and norm.nodes:
            return replace(outcome, refusal=families.explain(norm, graph, self.ran))
        return outcome

    def _left(self, norm: Norm, graph: ModelGraph) -> Outcome:
        """Return the outcome of a norm that no pass looked at."""
        part = next((part for name, _, part in torchscript.norms_in(graph.root) if name == norm.name), None)
        if part is not None:
            text = f"{part} is TorchScript, whose code can be neither read nor changed"
            refusal = Refusal(Reason.UNSUPPORTED_LAYER, text, torchscript.REMEDY)
            return Outcome("", Status.UNMATCHED, norm.name, norm.layer, refusal=refusal)
        if not norm.nodes:
            unseen = Refusal(Reason.PARTIAL_CAPTURE, "what calls it could not be traced", "pass example_inputs")
            return Outcome("", Status.NOT_REACHED, norm.name, norm.layer, refusal=unseen if graph.partial else None)
        for name, refusal in self.unread.items():
            return Outcome(name, Status.REFUSED, norm.name, norm.layer, refusal=refusal)
        return Outcome("", Status.UNMATCHED, norm.name, norm.layer, refusal=families.explain(norm, graph, self.ran))


def _unrun(name: str, layer: str, *, is_norm: bool = True) -> Outcome:
    """Return the outcome of a layer that raises, should it run."""
    text = f"{name} may be given values that the fold changed, and raises DeployedModelError if it runs"
    refusal = Refusal(Reason.NOT_REACHED, text, "pass an example that runs it as well")
    return Outcome("", Status.NOT_REACHED, name, layer, is_norm, refusal=refusal)
