"""Run passes over a model: capture, detect, check, apply; and say what became of every norm.

A pass sees the model as the passes before it left it. The model is captured again where a pass changed its structure.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import nn

from normfuse import deploy, families, norms, order, reach, surgery, torchscript
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.capture import capture, unwrap
from normfuse.capture.modes import unchanged
from normfuse.default_device import on_cpu
from normfuse.errors import CaptureError, PassContractError
from normfuse.examples import Examples, Inputs
from normfuse.exclusive import exclusive
from normfuse.graph import ModelGraph, module_names
from normfuse.layers import change_of_class
from normfuse.manifest import make_manifest
from normfuse.outcomes import Outcomes
from normfuse.proof import Proof
from normfuse.report import Report
from normfuse.settlement import Passes, verified
from normfuse.structure import Structure, restored_on_error

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Result(Generic[M]):
    """A model after a run of passes, and what was done to it."""

    model: M
    report: Report


@dataclass(frozen=True, slots=True)
class Selection:
    """Which layers the passes may touch: qualified names that match a glob of ``include`` and none of ``exclude``."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def refuses(self, name: str) -> Refusal | None:
        """Return a refusal for a layer that the user left out."""
        wanted = not self.include or any(fnmatch.fnmatchcase(name, glob) for glob in self.include)
        if wanted and not self._excludes(name):
            return None
        return Refusal(Reason.EXCLUDED, f"{name} was left out by the user")

    def protects(self, answer: Match | Refusal) -> Refusal | None:
        """Return a refusal for a match that would change a layer that the user excluded."""
        partners = answer.partners if isinstance(answer, Match) else ()
        left_out = next((name for name in partners if self._excludes(name)), None)
        return Refusal(Reason.EXCLUDED, f"{left_out} was left out by the user") if left_out is not None else None

    def _excludes(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.exclude)


@dataclass(slots=True)
class _Run:
    """The state of one run.

    Attributes:
        selection: What the user chose.
        original: The names that modules had before any pass, by ``id``.
        outcomes: What became of the layers so far.
        proof: What the result is to be compared with; None where it is not.
    """

    selection: Selection
    original: dict[int, str]
    outcomes: Outcomes
    proof: Proof | None


@exclusive
def run(
    model: M,
    passes: Sequence[Pass],
    *,
    example_inputs: Inputs | Examples | None = None,
    selection: Selection = Selection(),
    inplace: bool = False,
    verify: bool = False,
) -> Result[M]:
    """Run passes in order on a model, or on a copy of it, and return it with the report.

    The model returned is in eval mode, unless all passes are reversible: those leave its mode alone. Where an error
    is raised, whatever its kind and wherever it stems from, the model is as it was.

    Raises:
        CaptureError: The model could not be read.
        OrderError: A pass comes after one that must follow it, in this run or an earlier one.
        VerificationError: The result of exact passes was to be verified, and does not compute what the model computes.
    """
    user_model = unwrap(model)
    order.require_for_passes(user_model, [one.name for one in passes])
    work = user_model if inplace else surgery.copy(user_model)
    proof = Proof.of(example_inputs) if verify and all(one.exactness is Exactness.EXACT for one in passes) else None
    with restored_on_error(work) if inplace else contextlib.nullcontext() as before:
        report = _edit(work, user_model, passes, example_inputs, selection, proof)
        if proof is not None and report:

            def again(model: nn.Module, count: int, inputs: Inputs | Examples | None, verify: bool) -> Report:
                options = {"selection": selection, "inplace": True, "verify": verify}
                return run(model, passes[:count], example_inputs=inputs, **options).report  # type: ignore[arg-type]

            names = [one.name for one in passes]
            source = functools.partial(_fresh, user_model, before)
            verification = verified(proof, work, Passes(names, example_inputs, source, again))
            report = replace(report, verification=verification)
        return Result(work, report)  # type: ignore[arg-type]


def _fresh(source: nn.Module, before: Structure | None) -> nn.Module:
    """Return a copy of the model that passes ran on, which ``before`` remembers where they edited it in place."""
    with before.for_a_moment(source) if before is not None else contextlib.nullcontext():
        return surgery.copy(source)


@on_cpu()
def _edit(
    work: nn.Module,
    source: nn.Module,
    passes: Sequence[Pass],
    example_inputs: Inputs | Examples | None,
    selection: Selection,
    proof: Proof | None,
) -> Report:
    """Carry out the passes on a model, which is the source or a copy of it, and put it in its final mode."""
    notes = _notes(work, passes)
    change_of_class.leave_all(work)  # the passes read layers as they are outside of Tune mode
    before = list(work.state_dict())
    if work.training and not all(one.reversible for one in passes):
        for module in work.modules():  # a weight that is computed may follow each read of it in training
            module.training = False
    original = {key: names[0] for key, names in module_names(work).items()}
    state = _Run(selection, original, Outcomes(tuple(one.name for one in passes)), proof)
    with unchanged(source) if source is not work else contextlib.nullcontext():  # whose layers a function may call
        graph = capture(work, example_inputs)
    _require_own_layers(graph, source)
    if proof is not None:
        proof.returned.extend(graph.returned or ())
    inventory, first = norms.find_norms(graph), graph
    whole, unreached = graph, reach.unreached(graph)
    for index, one in enumerate(passes):
        if _run_pass(one, graph, state) and index + 1 < len(passes):
            again = capture(work, example_inputs)
            graph = replace(again, edits=graph.edits, ties=graph.ties, changed_scopes=graph.changed_scopes)
            if whole.partial:  # what a computed weight kept from being traced was not seen
                whole, unreached = again, reach.unreached(again)
    notes += (*families.notes(inventory, first), *_unseen(graph, passes), *_not_copied(first, source))
    state.outcomes.guarded = _guard(unreached, whole, graph)
    _tie_calls(graph)
    report = state.outcomes.report(inventory, notes, first)
    if all(one.reversible for one in passes):
        return report
    for name, module in work.named_modules():
        module.training = name in graph.training
    if report:
        deploy.guard(work, make_manifest(work, before, graph.edits, report))
    return report


def _notes(model: nn.Module, passes: Sequence[Pass]) -> tuple[str, ...]:
    if all(one.reversible for one in passes):
        return ()
    folds = model.training and not deploy.TRAINABLE.issuperset(one.name for one in passes)
    notes = ["the model was in training mode; what was folded is its eval form"] if folds else []
    if any(isinstance(module, change_of_class.TunedLayer) for module in model.modules()):
        notes.append("the model was in Tune mode; it was taken out of it first")
    notes += [f"{part} is TorchScript: it is left as it is, with all norms in it" for part in torchscript.parts(model)]
    return tuple(notes)


def _unseen(graph: ModelGraph, passes: Sequence[Pass]) -> tuple[str, ...]:
    """Return what a partial capture leaves open for the passes that do not refuse it, since they can be undone."""
    if not (graph.partial and any(one.reversible for one in passes)):
        return ()
    return (
        "only parts of the model could be traced: code outside them that calls a paired layer by itself raises; "
        "pass example_inputs that go this way",
    )


def _require_own_layers(graph: ModelGraph, source: nn.Module) -> None:
    """Refuse a copy that calls a layer of a source in training mode, which would go on to learn from each call.

    Raises:
        CaptureError: A function holds one, which a copy of the model shares.
    """
    names = {} if graph.root is source else module_names(source)
    for module in graph.strangers:
        if module.training and id(module) in names:
            name = names[id(module)][0]
            text = f"the copy to fold calls {name} of the model, which a function holds and which is in training mode"
            raise CaptureError(f"{text}: call model.eval() first")


def _not_copied(graph: ModelGraph, source: nn.Module) -> tuple[str, ...]:
    """Return which modules of the source its copy calls: functions hold them, and are not copied."""
    names = {} if graph.root is source else module_names(source)
    called = [names[id(module)][0] for module in graph.strangers if id(module) in names]
    return tuple(
        f"{name} is held by a function, which a copy shares: the result calls that of the source" for name in called
    )


def _guard(unreached: list[str], whole: ModelGraph, graph: ModelGraph) -> dict[str, str]:
    """Let the layers raise that no example reached and that may read a changed value; return their classes by name."""
    modules = dict(graph.root.named_modules())
    names = reach.concerned([name for name in unreached if name in modules], whole, graph.changed_scopes)
    names = reach.not_run(names, graph.root, whole.inputs) if names else []
    for name in names:
        graph.perform({"op": "guard", "path": name})
    return {name: type(modules[name]).__name__ for name in names}


def _tie_calls(graph: ModelGraph) -> None:
    """Let the model raise where a run leaves out a norm that was folded, or the layer that took it."""
    modules = dict(graph.root.named_modules())
    for edit in graph.ties:
        if edit["path"] in modules and edit["to"] in modules:
            graph.perform(edit)


def _run_pass(one: Pass, graph: ModelGraph, state: _Run) -> bool:
    """Apply one pass until nothing more gives way; return whether it changed more than values and plain identities."""
    done: set[str] = set()
    while True:
        before = len(done)
        structural = _sweep(one, graph, state, done)
        if structural or len(done) == before:
            return structural


def _sweep(one: Pass, graph: ModelGraph, state: _Run, done: set[str]) -> bool:
    """Apply one pass wherever it may and did not yet: a norm that was folded may have stood in another's way."""
    structural = False
    for match in _detect(one, graph, state):
        name = _original_name(match, graph, state)
        if name in done:
            continue
        answer = state.selection.refuses(name) or _check(one, match, graph)
        answer = state.selection.protects(answer) or answer
        if isinstance(answer, Match):
            edits = len(graph.edits)
            _apply(one, answer, graph, state)
            done.add(name)
            structural |= any(edit.get("module") != surgery.IDENTITY for edit in graph.edits[edits:])
        state.outcomes.note(one, match, answer, name)
    return structural


def _detect(one: Pass, graph: ModelGraph, state: _Run) -> list[Match]:
    """Return the places that a pass looks for; none, and the reason for the report, where it refused to look."""
    try:
        return list(one.detect(graph))
    except Refused as refused:
        state.outcomes.unread.setdefault(one.name, refused.refusal)
        return []


def _check(one: Pass, match: Match, graph: ModelGraph) -> Match | Refusal:
    """Ask a pass about a place; a refusal that it raises is its answer."""
    try:
        return one.check(match, graph)
    except Refused as refused:
        return refused.refusal


def _apply(one: Pass, match: Match, graph: ModelGraph, state: _Run) -> None:
    """Let a pass edit the model; it is past asking, so a refusal is a fault of the pass."""
    if state.proof is not None:
        state.proof.observe(graph.root)
    try:
        one.apply(match, graph)
    except Refused as refused:
        raise PassContractError(f"{one.name} refused {match.subject} while it applied it: {refused}") from refused


def _original_name(match: Match, graph: ModelGraph, state: _Run) -> str:
    """Return the name a layer had before any pass moved it."""
    try:
        return state.original.get(id(graph.module(match.subject)), match.subject)
    except AttributeError:
        return match.subject
