"""Refusals of a norm itself: what map it is, whether it is called so that it is one, and what the report says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.layers import ActNorm
from tests.refusals.cases import Alone, Case, Net, sequence
from tests.refusals.route_cases import bn, conv
from tests.zoo.trap import image


class OwnBatchNorm(nn.BatchNorm2d):
    """Its forward does more than normalize."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + x.mean()


class Untraceable(nn.BatchNorm2d):
    """Its forward asks for a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(range(x.shape[0])) > 0 else x


class Wide(nn.Module):
    """A map of constants, one of which has more axes than what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(1, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class WideNorm(Wide):
    """Named like a norm."""


class ShiftNorm(nn.Module):
    """A map of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def functional(**given: Any) -> Any:
    """Return what makes a convolution and a call of F.batch_norm with statistics that are buffers."""

    def body(m: Any, x: Tensor) -> Tensor:
        values = {"running_mean": m.mean, "running_var": m.var, **{k: v(m, x) for k, v in given.items()}}
        return F.batch_norm(m.conv(x), **values).sigmoid()

    def make() -> nn.Module:
        net = Net(body, conv=conv())
        net.register_buffer("mean", torch.randn(4))
        net.register_buffer("var", torch.rand(4) + 0.5)
        return net

    return make


NORMS = [
    Case("1 (OwnBatchNorm) has a forward of its own", lambda: sequence(conv(), OwnBatchNorm(4), nn.Sigmoid())),
    Case("1 (Untraceable) has its own forward, which cannot be traced | pass example_inputs",
         lambda: sequence(conv(), Untraceable(4), nn.Sigmoid()), None,
         advice=lambda m: {"example_inputs": image(2, 4, 6, 6)}),
    Case("1 has no values yet | run the model once",
         lambda: sequence(conv(), nn.LazyBatchNorm2d(), nn.Sigmoid()), None, norms=False,
         advice=lambda m: m(image(2, 4, 6, 6))),
    Case("1 normalises each sample by its own statistics",
         lambda: sequence(conv(), nn.InstanceNorm2d(4), nn.Sigmoid())),
    Case("1 has no running statistics | recalibrate it, or leave it",
         lambda: sequence(conv(), nn.BatchNorm2d(4, track_running_stats=False), nn.Sigmoid())),
    Case("1 is in training mode in a model in eval mode | call .eval()",
         lambda: sequence(conv(), bn(), nn.Sigmoid()),
         prepare=lambda m: m[1].train(), advice=lambda m: m.eval()),
    Case("1 has not seen its first batch | train it first",
         lambda: sequence(conv(), ActNorm(4), nn.Sigmoid()), None, norms=False,
         advice=lambda m: (m.train(), m(image(2, 4, 6, 6)), m.eval())),
    Case(":batch_norm is called with training=True | it needs stored statistics",
         functional(training=lambda m, x: True), advice=None),
    Case("running_mean of :batch_norm is computed from the input",
         functional(running_mean=lambda m, x: x.mean((0, 2, 3)))),
    Case("running_mean of :batch_norm is computed at every call", functional(running_mean=lambda m, x: m.mean * 2)),
    Case("the rank of the input of 1 is not known | pass example_inputs",
         lambda: sequence(Alone(lambda m, x: x.flatten(2)), nn.BatchNorm1d(4), nn.Linear(36, 2)), None),
    Case("1 is called on an unbatched input",
         lambda: sequence(conv(), nn.InstanceNorm2d(4, track_running_stats=True), nn.Sigmoid()), ((4, 6, 6),)),
    Case("the rank of the input of 1 is not known | pass example_inputs",
         lambda: sequence(Alone(lambda m, x: x.flip(1)), ShiftNorm(), conv()), None,
         advice=lambda m: {"example_inputs": image(2, 4, 6, 6)}),
    Case("1 has a constant of more axes than its input", lambda: sequence(conv(), WideNorm(), nn.Sigmoid())),
    # what an identity in the place of a norm would let somebody write into
    Case("mul in 1 writes into what 0 returns; without it that would be an input of the model",
         lambda: sequence(bn(), Alone(lambda m, x: x.mul_(2)), nn.Conv2d(4, 3, 1))),
    Case("1 (ReLU) writes into what 0 returns; without it that would be an input of the model",
         lambda: sequence(nn.BatchNorm2d(4, affine=False), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 1)),
         prepare=lambda m: m[0].running_mean.zero_()),
    # what the report says of those that no pass looked at
    Case("1 was left out by the user", lambda: sequence(conv(), bn(), nn.Sigmoid()), options={"exclude": ["1"]},
         advice=lambda m: {"exclude": []}),
    Case("0 was left out by the user", lambda: sequence(conv(), bn(), nn.Sigmoid()), options={"exclude": ["0"]},
         advice=lambda m: {"exclude": []}),
]  # fmt: skip
