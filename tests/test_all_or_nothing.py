"""Whatever fails, wherever it fails: a model that was to be edited in place is as it was before, to the last bit.

Each pass runs on a model in which it edits several layers. Every step of the run is then made to fail at each of its
calls, before it does its work and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normfuse
from normfuse import computed, deploy, families, pipeline, proof, surgery
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.errors import PassContractError
from normfuse.passes import PASSES, tune_mode
from normfuse.passes.merge_branches import MergeBranches
from normfuse.passes.quantize import Quantize
from normfuse.passes.recalibrate import Recalibrate
from normfuse.passes.swap_l1 import SwapL1
from normfuse.passes.swap_unified import SwapUnified
from tests.fingerprint import fingerprint
from tests.parity import randomize_norms
from tests.passes.residual_streams import Residual, X
from tests.statistics.networks import images, network

IMAGES = images(3)


class Interrupt(BaseException):
    """Stands for what is no Exception, such as a user's Ctrl-C."""


class Calls(nn.Module):
    """One convolution that is called twice, each time with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(x)).tanh()))


def normed_twice() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4))


class Branches(nn.Module):
    """A sum of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def computed_weights() -> nn.Module:
    inner = parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*inner, parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))


def without_norms() -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Conv2d(4, 3, 1)))


def with_dead_channels() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[1].weight[:2], model[4].weight[1] = 0, 0  # pyright: ignore[reportOptionalSubscript]
    return model


def quantizing() -> nn.Module:
    return normfuse.quantize(network(), example_inputs=IMAGES)


def models() -> Iterator[tuple[str, Callable[[], Pass], Callable[[], nn.Module], Tensor]]:
    """Yield, for each pass, what makes it, a model that it edits at several places, and an input."""
    data: dict[str, Any] = {
        "quantize": lambda: Quantize([IMAGES]),
        "recalibrate": lambda: Recalibrate([IMAGES]),
        "swap-l1": lambda: SwapL1([X]),
        "swap-unified": lambda: SwapUnified([X]),
    }
    special: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "center-norm": (Residual, X),
        "duplicate-shared": (Calls, IMAGES),
        "equalize-ranges": (without_norms, IMAGES),
        "fold-affine": (normed_twice, X),
        "materialize": (computed_weights, IMAGES),
        "merge-branches": (lambda: nn.Sequential(Branches(), nn.Tanh(), Branches()), IMAGES),
        "prune-constant": (with_dead_channels, IMAGES),
        "shiftquant-off": (quantizing, IMAGES),
        "swap-l1": (Residual, X),
        "swap-unified": (Residual, X),
    }
    for name, cls in PASSES.items():
        yield name, data.get(name, cls), *special.get(name, (network, IMAGES))


CASES = {name: (one, model, x) for name, one, model, x in models()}
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


def prepared(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a model in which much could get lost: mixed modes and flags, hooks, modules and tensors outside tables."""
    torch.manual_seed(0)
    model = randomize_norms(build().double())
    vars(model).pop("train", None)
    nn.Module.train(model)
    first = next(model.children())
    first.eval()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    model.held = [first, {"again": [first]}]  # type: ignore[assignment]
    layers = [module for module in model.modules() if not list(module.children())]
    model.record = SimpleNamespace(layers=tuple(layers), last=layers[-1])  # type: ignore[assignment]
    model.history = {"losses": [0.5], "best": torch.ones(2)}  # type: ignore[assignment]
    return model


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
