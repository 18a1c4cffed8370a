"""``verify=True``: a right result always comes back, however a network rounds, decides, draws or counts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import surgery
from normfuse.errors import VerificationError
from tests.parity import randomize_norms
from tests.spoilt_folds import X, deep, flipped, spoilt, verification


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_right_result_says_on_what_it_was_verified_and_how_well(dtype: torch.dtype):
    found = verification(deep().to(dtype), X.to(dtype))
    assert found.verified
    assert found.origin == ""
    assert found.inputs == f"input:2x3x9x9 {str(dtype).removeprefix('torch.')}"
    assert found.error <= found.allowed
    assert found.allowed <= torch.finfo(dtype).eps ** 0.5


class Amplifies(nn.Module):
    """A network that multiplies rounding by a factor, and bends what comes of it back into the range of one."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.body, self.factor = deep(2), factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.body(x) * self.factor)


@pytest.mark.parametrize(
    ("dtype", "factor"), [*((torch.float32, f) for f in (1e3, 1e5, 1e7)), *((torch.float16, f) for f in (1e2, 1e3))]
)
def test_rounding_however_amplified_is_no_fault_and_hides_none(
    dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch
):
    x = X.to(dtype)
    for seed in range(4):
        torch.manual_seed(seed)
        assert verification(Amplifies(factor).to(dtype), x).verified
    monkeypatch.setattr(surgery, "assign", spoilt(flipped))
    with pytest.raises(VerificationError):
        normfuse.fold(Amplifies(factor).to(dtype), example_inputs=x)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 1e16), (torch.float32, 1e12)])
def test_a_network_that_is_all_rounding_in_float64_is_not_judged(dtype: torch.dtype, factor: float):
    found = verification(Amplifies(factor).to(dtype), X.to(dtype))
    assert not found.verified
    word = str(dtype).removeprefix("torch.")
    assert f"rounding in {word} alone moves the outputs by" in found.reason


class Answers(nn.Module):
    """Decides: which is the largest, which pass a threshold, in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.body = deep(3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        scores = self.body(x)
        order = scores.flatten().argsort()
        return {"top": scores.argmax(1), "kept": scores[scores > scores.mean()], "order": order, "name": "text"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_integers_and_shapes_that_depend_on_data(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    for seed in range(5):
        torch.manual_seed(seed)
        assert verification(Answers().to(dtype), torch.randn(6, 3, 9, 9).to(dtype)).verified
    monkeypatch.setattr(surgery, "assign", spoilt(flipped))
    with pytest.raises(VerificationError):
        normfuse.fold(Answers().to(dtype), example_inputs=torch.randn(6, 3, 9, 9).to(dtype))


class Draws(nn.Module):
    """Draws numbers in eval mode too, from torch's generator or from the system's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.body, self.draw = deep(2), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.draw()


def test_numbers_that_a_seed_decides_are_the_same_in_both_runs():
    assert verification(Draws(lambda: float(torch.randn(())))).verified


def test_outputs_that_differ_from_run_to_run_are_not_judged():
    found = verification(Draws(lambda: os.urandom(1)[0] * 1.0 + os.urandom(1)[0] / 255))
    assert not found.verified
    assert found.reason == "the outputs of the model differ from run to run"


class Counts(nn.Module):
    """Returns another value at each call, from what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls, self.cache = deep(2), 0, {}
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.cache[self.calls] = x
        return self.body(x) * self.calls + self.seen


def test_what_a_model_keeps_from_call_to_call_stays_out_of_it():
    model = Counts().double()
    for inplace in (False, True):
        result = normfuse.apply(model, ["fold-bn"], example_inputs=X, inplace=inplace)
        assert result.report.verification is not None
        assert result.report.verification.verified
        assert (result.model.calls, float(result.model.seen), result.model.cache) == (0, 0.0, {})


def test_fewer_digits_than_the_type_has_are_allowed_for():
    with torch.autocast("cpu", torch.bfloat16):
        found = verification(deep().float(), X.float())
    assert found.verified


def test_functions_of_the_functional_interface_are_moved_with_their_vectors():
    """Vectors that no module's own ``forward`` reads take part in what rounding is measured by."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gain = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(4) + 0.5)
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, self.gain)

    assert verification(Functional().double()).verified


class Narrow(nn.Module):
    """A norm that computes in a narrower type than it is given, as those of transformers do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = deep(2), dtype
        self.norm, self.last = nn.LayerNorm(7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        rounded = (y / y.norm(dim=-1, keepdim=True)).to(self.dtype).to(y.dtype)
        return self.last(self.norm(rounded))


@pytest.mark.parametrize(("dtype", "narrow"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_digits_that_a_forward_drops_are_no_fault(dtype: torch.dtype, narrow: torch.dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        found = verification(randomize_norms(Narrow(narrow).to(dtype)), X.to(dtype))
        assert found.verified
        assert found.allowed >= torch.finfo(narrow).eps ** 0.75
