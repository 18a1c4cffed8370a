"""Calls of norm functions: one norm for each set of arguments, each in the report once, each folded by its own map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse import api
from normfuse.report import Status
from tests.parity import assert_parity
from tests.zoo.trap import image

INPUT = image(2, 3, 6, 6)
READERS = pytest.mark.parametrize("inputs", [INPUT, None], ids=["recorded", "traced"])


class TwoCalls(nn.Module):
    """Two convolutions, a call of a norm function after each, with two of everything to choose from."""

    def __init__(self, first: Callable[[Any, Tensor], Tensor], second: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3)
        for name in ("mean", "other_mean"):
            self.register_buffer(name, torch.randn(4))
        for name in ("var", "other_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)
        self.g, self.h, self.s = (nn.Parameter(torch.randn(4)) for _ in "ghs")
        self.bn = nn.BatchNorm2d(4)
        self.bn.running_mean, self.bn.running_var = torch.randn(4), torch.rand(4) + 0.5
        self.calls = first, second
        self.double().eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.calls
        return first(self, self.a(x)), second(self, self.b(x))


def plain(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.mean, m.var, m.g, m.s)


OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gain": lambda m, x: F.batch_norm(x, m.mean, m.var, m.h, m.s),
    "no gain": lambda m, x: F.batch_norm(x, m.mean, m.var, None, m.s),
    "shift": lambda m, x: F.batch_norm(x, m.mean, m.var, m.g, bias=m.h),
    "no shift": lambda m, x: F.batch_norm(x, m.mean, m.var, weight=m.g),
    "eps": lambda m, x: F.batch_norm(x, m.mean, m.var, m.g, m.s, eps=0.5),
    "mean": lambda m, x: F.batch_norm(x, m.other_mean, m.var, m.g, m.s),
    "variance": lambda m, x: F.batch_norm(x, running_mean=m.mean, running_var=m.other_var, weight=m.g, bias=m.s),
    "training": lambda m, x: F.batch_norm(x, m.mean, m.var, m.g, m.s, training=True),
    "torch.batch_norm": lambda m, x: torch.batch_norm(x, m.h, m.s, m.mean, m.var, False, 0.1, 1e-5, False),
    "aten": lambda m, x: torch.ops.aten.batch_norm.default(x, m.h, m.s, m.mean, m.var, False, 0.1, 1e-5, False),
    "module": lambda m, x: m.bn(x),
    "group_norm": lambda m, x: F.group_norm(x, 2, m.g, m.s),
}


@READERS
@pytest.mark.parametrize("other", OTHERS)
def test_calls_with_other_arguments_are_other_norms(other: str, inputs: Tensor | None):
    model = TwoCalls(plain, OTHERS[other])
    result = api.apply(model, api.EXACT_PASSES, example_inputs=inputs)
    assert len({norm.subject for norm in result.report.norms}) == len(result.report.norms) == 3 - (other == "module")
    assert_parity(model, result.model, INPUT)


@READERS
def test_equal_arguments_are_one_norm_however_they_are_spelled(inputs: Tensor | None):
    model = TwoCalls(plain, lambda m, x: F.batch_norm(x, m.mean.data, m.var, bias=m.s.detach(), weight=m.g, eps=1e-5))
    result = api.apply(model, ["fold-bn"], example_inputs=inputs)
    reached = [norm for norm in result.report.norms if norm.status is not Status.NOT_REACHED]
    assert [(norm.subject, norm.status) for norm in reached] == [(":batch_norm", Status.APPLIED)]
    assert_parity(model, result.model, INPUT)


class TokensByTwoGains(nn.Module):
    """The tokens of one model by two gains, each with an eps of its own; a layer that adds no bias reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.h, self.w = (nn.Parameter(torch.randn(*size)) for size in ((6,), (6,), (3, 6)))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        first = F.linear(F.layer_norm(x, (6,), self.g), self.w)
        return first + F.linear(F.layer_norm(x, [6], weight=self.h, eps=0.1), self.w)


@READERS
def test_layer_norms_with_two_gains(inputs: Tensor | None):
    model = TokensByTwoGains()
    result = api.apply(model, api.EXACT_PASSES, example_inputs=inputs)
    assert [norm.subject for norm in result.report.norms] == [":layer_norm", ":layer_norm_1"]
    assert_parity(model, result.model, INPUT)


class CallsTheNorm(nn.Module):
    """A norm module that is called, and whose statistics a function uses as well."""

    def __init__(self, gain: bool) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.bn.running_mean, self.bn.running_var = torch.randn(4), torch.rand(4) + 0.5
        self.gain = gain
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.bn.weight if self.gain else None
        other = F.batch_norm(self.b(x), self.bn.running_mean, self.bn.running_var, weight, None)
        return self.bn(self.a(x)) + other


@READERS
@pytest.mark.parametrize("gain", [True, False])
def test_a_norm_module_that_a_function_reads_stays(inputs: Tensor | None, gain: bool):
    model = CallsTheNorm(gain)
    result = api.apply(model, api.EXACT_PASSES, example_inputs=inputs)
    assert isinstance(result.model.bn, nn.BatchNorm2d)
    assert {norm.subject for norm in result.report.norms} == {"bn", ":batch_norm"}
    details = {norm.subject: norm.refusal.detail for norm in result.report.norms if norm.refusal}
    assert "is also read by batch_norm in the model" in details["bn"]
    assert_parity(model, result.model, INPUT)
