"""What the pass ``tune-mode`` says of statistics that it does not fix: the truth."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.base import Reason
from normfuse.layers import EstimatedBatchNorm2d
from normfuse.report import Status
from tests.gradients import hard_norms
from tests.zoo.trap import image


class AsFunction(nn.Module):
    """Gives the statistics of a layer to a function, by position or by keyword."""

    def __init__(self, training: bool | None, keywords: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.follows = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), training is None
        self.given, self.keywords = bool(training), keywords

    def forward(self, x: Tensor) -> Tensor:
        bn, y, training = self.bn, self.conv(x), self.training if self.follows else self.given
        if self.keywords:
            stored = {"running_mean": bn.running_mean, "running_var": bn.running_var}
            return F.batch_norm(y, weight=bn.weight, bias=bn.bias, training=training, eps=bn.eps, **stored)
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, 0.1, bn.eps)


class Own(nn.Module):
    """A norm of the user's own, called what nobody would take for one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.gain, None, self.training)


class OwnBatchNorm2d(Own):
    """One that is called a norm."""


class ByHand(Own):
    """One that is written out."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var, 0.1)
        return (x - mean[:, None, None]) * (torch.rsqrt(var + 1e-5) * self.gain)[:, None, None]


class InstanceAsFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.instance_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training)


def behind(norm: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(4, 6, 3), norm, nn.ReLU())


MOVING: dict[str, Callable[[], nn.Module]] = {
    "F.batch_norm": lambda: AsFunction(None, False),
    "F.batch_norm, keywords": lambda: AsFunction(None, True),
    "F.batch_norm, always": lambda: AsFunction(True, False),
    "F.instance_norm": InstanceAsFunction,
    "own class": behind(Own()),
    "own class, called a norm": behind(OwnBatchNorm2d()),
    "own class, written out": behind(ByHand()),
    "of normfuse": behind(EstimatedBatchNorm2d(6)),
}
FIXED: dict[str, Callable[[], nn.Module]] = {
    "F.batch_norm": lambda: AsFunction(False, False),
    "InstanceNorm": behind(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
    "InstanceNorm, first": lambda: nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.Conv2d(4, 6, 3)),
    "SyncBatchNorm": behind(nn.SyncBatchNorm(6)),
}


def moves(model: nn.Module) -> bool:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(image())
    return any(not torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("example", [None, image()])
@pytest.mark.parametrize("name", MOVING)
def test_statistics_that_move_are_reported_as_such(name: str, example: Tensor | None):
    model = hard_norms(MOVING[name]().double())
    report = normfuse.apply(model, ["tune-mode"], inplace=True, example_inputs=example).report
    [outcome] = report.outcomes
    assert outcome.status is Status.REFUSED
    assert outcome.refusal is not None
    assert outcome.refusal.reason is Reason.BATCH_STATISTICS
    assert outcome.refusal.detail.endswith(("moves them in training mode", "may move in training mode"))
    assert moves(model)


@pytest.mark.parametrize("example", [None, image()])
@pytest.mark.parametrize("name", FIXED)
def test_statistics_that_are_reported_as_fixed_are(name: str, example: Tensor | None):
    model = hard_norms(FIXED[name]().double())
    report = normfuse.apply(model, ["tune-mode"], inplace=True, example_inputs=example).report
    assert [outcome.status for outcome in report.norms] == [Status.APPLIED]
    assert not moves(model)


@pytest.mark.parametrize("name", ["own class", "own class, written out", "of normfuse"])
def test_advice_for_a_layer(name: str):
    model: Any = normfuse.tune_mode(hard_norms(MOVING[name]().double())).train()
    model[1].eval()
    before = [buffer.clone() for buffer in model.buffers()]
    model(image())
    assert all(torch.equal(one, two) for one, two in zip(before, model.buffers(), strict=True))


def test_it_is_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "normfuse"):
        normfuse.tune_mode(AsFunction(None, False))
    text = "bn is not in Tune mode: batch statistics: F.batch_norm is given the statistics of bn and moves them"
    assert any(record.getMessage().startswith(text) for record in caplog.records)
