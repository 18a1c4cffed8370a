"""Refusals of what would take a map: layers and constants that are shared, computed, watched or of another kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.refusals.cases import Alone, Case, Net, sequence
from tests.refusals.route_cases import bn, conv
from tests.zoo.trap import image


class OwnConv(nn.Conv2d):
    """Its forward asks for a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


def twice(function: Any, **parts: Any) -> Any:
    return lambda: Net(function, conv=conv(), bn=bn(), **{name: make() for name, make in parts.items()})


def tie(model: Any) -> None:
    model.other.weight = model.conv.weight


def with_buffer(net: nn.Module, name: str, value: Tensor) -> nn.Module:
    net.register_buffer(name, value)
    return net


LAYERS = [
    # channels
    Case("the map varies along axis 1, the channels of 0 lie along axis 2",
         lambda: sequence(nn.Linear(6, 6), nn.BatchNorm1d(4), nn.Sigmoid()), ((2, 4, 6),)),
    Case("the map is one of 5 channels, 0 has 7", lambda: sequence(nn.Conv1d(4, 7, 1), nn.BatchNorm1d(5)), None),
    Case("0 normalises over several axes", lambda: sequence(
        nn.LayerNorm((6, 6)), nn.BatchNorm1d(6), nn.Sigmoid()), ((2, 6, 6),)),
    # shifts
    Case("a shift cannot enter 1, which pads with zeros", lambda: sequence(bn(), nn.Conv2d(4, 2, 3, padding=1))),
    Case("a shift cannot enter 1, whose border sees fewer taps", lambda: sequence(bn(), nn.ConvTranspose2d(4, 2, 3))),
    Case("0 adds no bias", lambda: sequence(nn.RMSNorm(6), nn.BatchNorm1d(6), nn.Sigmoid()), ((2, 6),)),
    Case("conv2d in the model adds no bias to what it makes of conv.weight | let the call add one, of zeros",
         lambda: Net(lambda m, x: m.bn(F.conv2d(x, m.conv.weight, *m.given(m))).sigmoid(), conv=conv(), bn=bn(),
                     given=lambda m: ()),
         advice=lambda m: (m.conv.bias.data.zero_(), setattr(m, "given", lambda m: (m.conv.bias,)))),
    # forwards of their own, computed weights
    Case("0 (OwnConv) has its own forward, which cannot be traced | pass example_inputs",
         lambda: sequence(OwnConv(4, 4, 1), bn(), nn.Sigmoid()), None,
         advice=lambda m: {"example_inputs": image(2, 4, 6, 6)}),
    Case("what conv2d in the model multiplies by is computed at every call", lambda: Net(
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight.exp(), m.conv.bias)).sigmoid(), conv=conv(), bn=bn())),
    Case("0.weight is computed from other tensors | the materialize pass makes it plain",
         lambda: sequence(parametrizations.weight_norm(conv()), bn(), nn.Sigmoid())),
    Case("what conv2d in the model multiplies by is computed at every call | materialize it first", lambda: Net(
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight, m.conv.bias)).sigmoid(),
        conv=parametrizations.weight_norm(conv()), bn=bn()),
        advice=lambda m: nn.utils.parametrize.remove_parametrizations(m.conv, "weight")),
    # shared
    Case("conv is called 2 times | pass duplicate_shared=True",
         twice(lambda m, x: m.bn(m.conv(x)).sigmoid() + m.conv(x)), advice=lambda m: {"duplicate_shared": True}),
    Case("conv is called 2 times, and its calls would need different weights | pass duplicate_shared=True",
         twice(lambda m, x: m.bn(m.conv(x)).sigmoid() + m.bn(-m.conv(x)).sigmoid()),
         advice=lambda m: {"duplicate_shared": True}),
    Case("conv.weight is also read by add in the model", twice(
        lambda m, x: m.bn(m.conv(x)).sigmoid() + m.conv.weight.mean())),
    Case("conv.weight is also other.weight | pass duplicate_shared=True",
         twice(lambda m, x: m.bn(m.conv(x)).sigmoid() + m.other(x), other=conv), prepare=tie,
         advice=lambda m: {"duplicate_shared": True}),
    # hooks, kinds of numbers, values
    Case("a hook on 0 would see other values | remove it first",
         lambda: sequence(conv(), bn(), nn.Sigmoid()),
         prepare=lambda m: m[0].register_forward_hook(lambda *a: None),
         advice=lambda m: m[0]._forward_hooks.clear()),
    Case("0 has no values yet | run the model once",
         lambda: sequence(nn.LazyConv2d(4, 1), bn(), nn.Sigmoid()), None,
         advice=lambda m: m(image(2, 4, 6, 6))),
    Case("0.weight would hold NaN or infinity", lambda: sequence(conv(), bn(), nn.Sigmoid()),
         prepare=lambda m: (m[0].weight.data.fill_(1e300), m[1].weight.data.fill_(1e300))),
    Case("0.weight would reach 1e+05, beyond torch.float16 | fold in float32",
         lambda: sequence(conv().half(), bn().half(), nn.Sigmoid()),
         prepare=lambda m: (m[0].weight.data.fill_(1e3), m[1].weight.data.fill_(1e2), m[1].running_var.fill_(1.0)),
         advice=lambda m: {"example_inputs": image(2, 4, 6, 6).to(m.float()[0].weight)}),
    Case("only parts of the model could be traced, callers may be unseen | pass example_inputs",
         lambda: Alone(
        lambda m, x: m.part(x) if x.sum() > 0 else x, part=sequence(conv(), bn(), nn.Sigmoid())), None,
        advice=lambda m: {"example_inputs": image(2, 4, 6, 6).abs()}),
    Case("index is torch.int64", lambda: with_buffer(Net(
        lambda m, x: m.bn(m.conv(x) + m.index).sigmoid(), conv=conv(), bn=bn()), "index", torch.ones(4, 1, 1).long())),
    Case("scale is not saved with the model, but made anew", lambda: Net(
        lambda m, x: m.bn(m.conv(x) + m.scale).sigmoid(), conv=conv(), bn=bn(), scale=torch.rand(4, 1, 1).double())),
]  # fmt: skip
