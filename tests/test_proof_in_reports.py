"""What a report says of a verification, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import normfuse
from normfuse import surgery
from tests.edited_models import CASES
from tests.parity import randomize_norms
from tests.spoilt_folds import X, deep, verification


class NoTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = deep(2)

    def forward(self, x: Tensor) -> str:
        return f"{float(self.body(x).sum()):.3f}"


class NotANumber(NoTensor):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.body(x) * float("nan")


class Needs(nn.Module):
    """Takes what nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, record: Any) -> Tensor:
        return self.bn(self.conv(record.image))


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (NoTensor, X, "the model returns no tensor with elements"),
        (NotANumber, X, "the model itself gives NaN in output 'output'"),
        (Needs, None, "no example_inputs were given, and the model runs on none that could be made up"),
    ],
)
def test_what_cannot_be_judged_says_why(
    model: Callable[[], nn.Module], x: Any, reason: str, caplog: pytest.LogCaptureFixture
):
    result = normfuse.apply(randomize_norms(model().double().eval()), ["fold-bn"], example_inputs=x)
    found = result.report.verification
    assert found is not None
    assert not found.verified
    assert found.reason == reason
    assert result.report.summary().endswith("; not verified")
    assert f"  not verified: {reason}" in str(result.report).splitlines()
    assert f"not verified: {reason}" in caplog.text


def test_inputs_are_made_up_where_none_are_given():
    found = verification(deep(), None)
    assert found.verified
    assert found.origin == "guessed from 0 (Conv2d)"
    assert "1x3x64x64" in found.inputs
    assert str(found).endswith("guessed from 0 (Conv2d))")


def test_nothing_is_said_where_nothing_was_to_verify():
    report = normfuse.apply(nn.Sequential(nn.ReLU()), ["fold-bn"], example_inputs=X).report
    assert report.verification is None
    assert normfuse.inspect(deep(), example_inputs=X).verification is None
    assert normfuse.apply(deep(), ["fold-bn"], example_inputs=X, verify=False).report.verification is None
    make, build, x = CASES["recalibrate"]
    assert normfuse.apply(build(), [make()], example_inputs=x).report.verification is None


def test_the_report_has_it_as_text_and_as_json():
    report = normfuse.apply(deep(), ["fold-bn"], example_inputs=X).report
    assert report.summary().endswith("folded; verified")
    assert "  verified: off by " in str(report)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))["verification"]
    assert found["verified"] is True
    assert found["dtype"] == "float64"
    assert 0 <= found["error"] <= found["allowed"] < 1e-11


# what it costs


class Metered(nn.Module):
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.body = deep(2)

    def forward(self, x: Tensor) -> Tensor:
        Metered.runs += 1
        return self.body(x)


@pytest.mark.parametrize("one", ["fold-bn", "tune-mode"])
def test_verifying_runs_the_source_and_the_result_once_each(one: str):
    def runs(**options: Any) -> int:
        Metered.runs = 0
        normfuse.apply(Metered(), [one], example_inputs=X, **options)
        return Metered.runs

    assert runs() == runs(verify=False) + 2


def test_a_model_that_nothing_changes_is_not_run_again():
    def runs(**options: Any) -> int:
        Metered.runs = 0
        normfuse.apply(Metered(), ["merge-branches"], example_inputs=X, **options)
        return Metered.runs

    assert runs() == runs(verify=False) == 1


def test_no_second_copy_of_the_weights_is_made(monkeypatch: pytest.MonkeyPatch):
    copies: list[nn.Module] = []
    copy = surgery.copy
    monkeypatch.setattr(surgery, "copy", lambda model: (copies.append(model), copy(model))[1])
    normfuse.apply(deep(), ["fold-bn"], example_inputs=X, inplace=True)
    assert copies == []
    normfuse.apply(deep(), ["fold-bn"], example_inputs=X)
    assert len(copies) == 1
