"""Whatever fails, wherever it fails: a model that was to be edited in place is as it was before, to the last bit.

Each pass runs on a model in which it edits several layers. Every step of the run is then made to fail at each of its
calls, before it does its work and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor, nn

import normfuse
from normfuse import computed, deploy, families, pipeline, proof, surgery
from normfuse.base import Exactness, Match, Reason, Refusal, Refused
from normfuse.errors import PassContractError
from normfuse.passes import PASSES, tune_mode
from normfuse.passes.merge_branches import MergeBranches
from normfuse.passes.recalibrate import Recalibrate
from tests.edited_models import CASES, IMAGES, prepared
from tests.fingerprint import fingerprint
from tests.statistics.networks import network


class Interrupt(BaseException):
    """Stands for what is no Exception, such as a user's Ctrl-C."""


STEPS: dict[str, tuple[Any, str]] = {
    "capture": (pipeline, "capture"),
    "edit": (surgery, "perform"),
    "assign": (surgery, "assign"),
    "make plain": (computed, "make_plain"),
    "enter Tune mode": (tune_mode, "enter"),
    "notes": (families, "notes"),
    "manifest": (pipeline, "make_manifest"),
    "guard": (deploy, "guard"),
    "look at the source": (proof.Proof, "observe"),
    "verify": (pipeline, "verified"),
}
QUESTIONS = ("detect", "check", "apply")


class Fault:
    """Makes one step of a run raise at a call, before or after it has done its work; counts the calls."""

    def __init__(self, at: int | None, after: bool, error: type[BaseException]) -> None:
        self.at, self.after, self.error, self.calls = at, after, error, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            due = self.calls - 1 == self.at
            if due and not self.after:
                raise self.error("on purpose")
            result = function(*args, **kwargs)
            if due:
                raise self.error("on purpose")
            return result

        return wrapped


def run(name: str, step: str, fault: Fault, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a pass in place with a fault in one of its steps."""
    make, _, x = CASES[name]
    one: Any = make()
    with monkeypatch.context() as patch:
        owner, attribute = (one, step) if step in QUESTIONS else STEPS[step]
        patch.setattr(owner, attribute, fault.wrap(getattr(owner, attribute)))
        normfuse.apply(model, [one], example_inputs=x, inplace=True)


@pytest.mark.parametrize("step", [*QUESTIONS, *STEPS])
@pytest.mark.parametrize("name", PASSES)
def test_a_failure_at_any_call_of_any_step_leaves_the_model_as_it_was(
    name: str, step: str, monkeypatch: pytest.MonkeyPatch
):
    build = CASES[name][1]
    counted = Fault(None, False, RuntimeError)
    run(name, step, counted, prepared(build), monkeypatch)
    assert counted.calls or step in STEPS  # not every pass makes every kind of edit, but each asks and applies
    model = prepared(build)
    before = fingerprint(model)
    first = Interrupt if step == "make plain" else RuntimeError  # an error of a trial on a copy is a reason to refuse
    for call in range(counted.calls):
        for after, error in ((False, first), (True, Interrupt)):
            with pytest.raises(error, match="on purpose"):
                run(name, step, Fault(call, after, error), model, monkeypatch)
            assert fingerprint(model) == before, (call, after)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_edits_its_model(name: str):
    """The cases above would show little if a run had nothing to undo: all but one edit two layers and more."""
    make, build, x = CASES[name]
    model = prepared(build)
    before = fingerprint(model)
    report = normfuse.apply(model, [make()], example_inputs=x, inplace=True).report
    assert len(report.applied) >= (1 if name == "duplicate-shared" else 2), str(report)
    assert fingerprint(model) != before


def test_a_copy_is_edited_where_the_model_is_not(monkeypatch: pytest.MonkeyPatch):
    model = prepared(network)
    before = fingerprint(model)
    with monkeypatch.context() as patch:
        patch.setattr(surgery, "assign", Fault(1, True, RuntimeError).wrap(surgery.assign))
        with pytest.raises(RuntimeError, match="on purpose"):
            normfuse.fold(model, example_inputs=IMAGES)
    assert fingerprint(model) == before


def test_a_model_that_does_not_run_is_left_in_tune_mode():
    model = normfuse.tune_mode(prepared(network))
    before = fingerprint(model)
    with pytest.raises(normfuse.CaptureError):
        normfuse.tune_mode(model, example_inputs=IMAGES[:, :2])
    assert fingerprint(model) == before


# the functions that edit in several steps


def data_that_ends(count: int) -> Any:
    """Return data that fails at the item after so many that were read."""

    class Data:
        read = 0

        def __iter__(self) -> Iterator[Tensor]:
            for item in IMAGES.split(1):
                Data.read += 1
                if Data.read > count:
                    raise Interrupt("on purpose")
                yield item

    return Data()


S = normfuse.statistics
FUNCTIONS: dict[str, Callable[[nn.Module, Any], object]] = {
    "reestimate": lambda model, data: S.reestimate(model, data, order="sequential"),
    "adabn": S.adabn,
    "adaptive_batch_norm": lambda model, data: S.adaptive_batch_norm(model, data, progress=False),
    "correct_bias": lambda model, data: S.correct_bias(model, data, progress=False),
    "swap": lambda model, data: normfuse.swap_norms(model, "l1", data, inplace=True, reconstruct=2, progress=False),
    "quantize": lambda model, data: normfuse.quantize(model, calibration=data, inplace=True, progress=False),
    "recalibrate": lambda model, data: normfuse.apply(model, [Recalibrate(data)], example_inputs=IMAGES, inplace=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_reads_data_is_all_or_nothing_wherever_the_data_ends(name: str):
    model = prepared(network)
    before = fingerprint(model)
    failed = 0
    for count in range(0, 60, 2):
        try:
            FUNCTIONS[name](model, data_that_ends(count))
        except Interrupt:
            failed += 1
            assert fingerprint(model) == before, count
        else:
            break
    assert failed > 1


# adaptation, and refusals


class Momentless(nn.Module):
    """The second of two norms has no momentum, which some adaptations refuse when they come to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None))


def test_adaptation_that_fails_at_a_later_norm_has_not_begun():
    model = prepared(Momentless)
    before = fingerprint(model)
    for begin in (lambda: S.AdaB2N(model, 3), lambda: S.unmix_tns(model)):
        with pytest.raises(ValueError, match="momentum"):
            begin()
        assert fingerprint(model) == before


class Reluctant(MergeBranches):
    """Raises its refusals instead of returning them, at one of its three questions."""

    exactness = Exactness.EXACT

    def __init__(self, where: str) -> None:
        self.where = where

    def _refuse(self, where: str) -> None:
        if where == self.where:
            raise Refused(Reason.RANGE, f"{where} would rather not")

    def detect(self, graph: Any) -> Iterator[Match]:
        self._refuse("detect")
        for name, module in graph.root.named_modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                yield Match(name, type(module).__name__)

    def check(self, match: Match, graph: Any) -> Match | Refusal:
        self._refuse("check")
        return match

    def apply(self, match: Match, graph: Any) -> None:
        graph.assign({f"{match.subject}.bias": graph.tensor(f"{match.subject}.bias") + 1})
        self._refuse("apply")


@pytest.mark.parametrize("where", ["detect", "check"])
def test_a_refusal_that_a_question_raises_is_reported_for_every_norm(where: str):
    report = normfuse.apply(network(), [Reluctant(where)], example_inputs=IMAGES).report
    assert len(report.refused) == len(report.norms) == 3
    assert {o.refusal.detail for o in report.refused if o.refusal} == {f"{where} would rather not"}
    assert {o.pass_name for o in report.refused} == {"merge-branches"}


def test_a_refusal_while_applying_is_a_fault_of_the_pass():
    model = prepared(network)
    before = fingerprint(model)
    with pytest.raises(PassContractError, match=r"merge-branches refused .* while it applied it"):
        normfuse.apply(model, [Reluctant("apply")], example_inputs=IMAGES, inplace=True)
    assert fingerprint(model) == before
