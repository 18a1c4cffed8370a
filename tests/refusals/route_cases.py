"""Refusals on the way of a map: operations, what joins values, what moves them, and who else reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.refusals.cases import Alone, Case, Net, sequence
from tests.zoo.trap import image


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1, **options)


def bn() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def plain(function: Any, kind: type[Net] = Net, **made: Any) -> Any:
    """Return what makes a convolution, a function and a norm, which nothing takes behind it, with further parts."""

    def body(m: Any, *x: Tensor) -> Tensor:
        return m.bn(function(m, m.conv(x[0]), *x[1:])).sigmoid()

    return lambda: kind(body, conv=conv(), bn=bn(), **{name: make() for name, make in made.items()})


def vector(*shape: int) -> Any:
    return lambda: nn.Parameter(torch.randn(*shape))


class Own(nn.Module):
    """A function of one value as a layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


ROUTES = [
    # one value
    Case("no rule lets a map pass sigmoid in the model", plain(lambda m, x: x.sigmoid())),
    Case("no rule lets a map pass 1 (Softmax)", lambda: sequence(conv(), nn.Softmax(1), bn(), nn.Sigmoid())),
    Case("dropout in the model stays active in eval mode", plain(lambda m, x: F.dropout(x, training=True))),
    Case("1 (Dropout) stays active in eval mode", lambda: sequence(conv(), nn.Dropout(), bn(), nn.Sigmoid()),
         prepare=lambda m: m[1].train()),
    Case("to in the model converts to torch.int64", plain(lambda m, x: x.to(torch.int64).double())),
    Case("1 (AvgPool2d) averages zeros in", lambda: sequence(conv(), nn.AvgPool2d(3, 1, 1), bn(), nn.Sigmoid())),
    Case("a shift cannot pass 1 (AvgPool2d), which has a divisor of its own",
         lambda: sequence(conv(), nn.AvgPool2d(2, divisor_override=3), bn(), nn.Sigmoid())),
    Case("the positions of pool (MaxPool2d) are read", lambda: Net(
        lambda m, x: (lambda y: m.bn(y[0]).sigmoid() + y[1])(m.pool(m.conv(x))), conv=conv(), bn=bn(),
        pool=nn.MaxPool2d(2, return_indices=True)), positive=True),
    Case("a shift cannot pass 1 (ReLU)", lambda: sequence(conv(), nn.ReLU(), bn(), nn.Sigmoid())),
    Case("a scale of the map is negative, which 1 (MaxPool2d) would turn around",
         lambda: sequence(conv(), nn.MaxPool2d(2), bn(), nn.Sigmoid())),
    Case("a channel of scale zero is a negative constant behind 1 (ReLU), which makes no such value",
         lambda: sequence(conv(), nn.ReLU(), bn(), nn.Sigmoid()), prepare=lambda m: constant_channel(m[2])),
    Case("a channel of scale zero cannot pass rrelu in the model, whose slope is not constant",
         plain(lambda m, x: F.rrelu(x)), prepare=lambda m: constant_channel(m.bn)),
    Case("a shift cannot pass sum in the model", plain(lambda m, x: x.sum((2, 3), keepdim=True))),
    Case("the positions of max in the model are read", plain(lambda m, x: sum(x.max(3, keepdim=True))), positive=True),
    Case("pad in the model pads with 2, which the map would have to change",
         plain(lambda m, x: F.pad(x, (1, 1), value=2.0))),
    Case("the shapes around mean in the model are not known | pass example_inputs",
         plain(lambda m, x: x.flip(3).mean(3, keepdim=True), Alone), None,
         advice=lambda m: {"example_inputs": image(2, 4, 6, 6)}),
    Case("mean in the model mixes values along axis 1, where the map varies", lambda: Net(
        lambda m, x: m.conv(m.bn(x).mean(1, keepdim=True)), bn=bn(), conv=nn.Conv2d(1, 2, 1))),
    Case("1 pads along axis 2, where the map varies", lambda: sequence(
        conv(), nn.ZeroPad2d(1), Own(lambda x: x.transpose(1, 2)), nn.BatchNorm2d(8), nn.Sigmoid())),
    # what joins
    Case("a scale cannot pass add in the model, which adds a value that would have to be scaled too", lambda: Net(
        lambda m, x, y: m.conv(m.bn(x) + y), bn=bn(), conv=conv()), ((2, 4, 6, 6), (2, 4, 6, 6))),
    Case("a shift cannot pass mul in the model, which multiplies two activations",
         plain(lambda m, x, y: x * y), ((2, 4, 6, 6), (2, 4, 6, 6))),
    Case("forwards, a shift cannot pass mul in the model, which multiplies two activations", lambda: Net(
        lambda m, x, y: m.conv(m.bn(x) * y), bn=bn(), conv=conv()), ((2, 4, 6, 6), (2, 4, 6, 6))),
    Case("a shift cannot pass the zero factors of mul in the model", plain(lambda m, x: x * m.w, w=vector(4, 1, 1)),
         prepare=lambda m: m.w.data.zero_()),
    Case("the factor of div in the model is not finite", plain(lambda m, x: x / m.w, w=vector(4, 1, 1)),
         prepare=lambda m: m.w.data.zero_()),
    Case("the shapes around cat in the model are not known | pass example_inputs", lambda: Alone(
        lambda m, x: m.bn(torch.cat([x.sigmoid(), x.tanh()], 1)).sigmoid(), bn=nn.BatchNorm2d(8)), None),
    Case("add in the model repeats mean in the model along axis 1, where the map varies",
         plain(lambda m, x: x.tanh() + x.mean((1, 2, 3), keepdim=True))),
    # what moves
    Case("expand in the model repeats values that would need different maps",
         plain(lambda m, x: x[:, :1].expand(-1, 4, -1, -1))),
    Case("getitem in the model depends on other values", plain(lambda m, x, i: x[:, (i[0, 0, 0, :4] > 9).long()]),
         ((2, 4, 6, 6), (1, 1, 1, 4))),
    Case("view in the model makes other numbers of the same bits",
         plain(lambda m, x: x.view(torch.int64).view(torch.float64))),
    Case("the shapes around flip in the model are not known | pass example_inputs",
         plain(lambda m, x: x.flip(3), Alone), None,
         advice=lambda m: {"example_inputs": image(2, 4, 6, 6)}),
    # who reads
    Case("input_0 is an input of the model", lambda: sequence(bn(), nn.Sigmoid())),
    Case("conv (Conv2d) is also read by mean in the model", lambda: Net(
        lambda m, x: (lambda y: m.bn(y).sigmoid() + y.mean())(m.conv(x)), conv=conv(), bn=bn())),
    Case("conv (Conv2d) is also an output of the model", lambda: Net(
        lambda m, x: (lambda y: (m.bn(y).sigmoid(), y))(m.conv(x)), conv=conv(), bn=bn())),
    Case("no rule lets a map pass mul in the model as it is called here", plain(lambda m, x: x * x)),
    Case("neg in the model reads conv (Conv2d) more than once", plain(lambda m, x: torch.neg(x, out=x))),
    Case("forwards, mul in the model reads bn (BatchNorm2d) more than once", lambda: Net(
        lambda m, x: m.conv((lambda y: y * y)(m.bn(x))), bn=bn(), conv=conv())),
    Case("nothing reads bn (BatchNorm2d)", lambda: Net(lambda m, x: (m.bn(x), x.sigmoid())[1], bn=bn())),
    Case("bn (BatchNorm2d) is an output of the model", lambda: Net(lambda m, x: m.bn(x.sigmoid()), bn=bn())),
    Case("1 pads with 0, which a map with a scale of zero makes another constant",
         lambda: sequence(bn(), nn.ZeroPad2d(1), conv())),
    Case("backwards, no rule lets a map pass 0 (Sigmoid); forwards, no rule lets a map pass 2 (Sigmoid)",
         lambda: sequence(nn.Sigmoid(), bn(), nn.Sigmoid())),
]  # fmt: skip


def constant_channel(norm: Any) -> None:
    """Make a norm a positive scale and no shift, but for the first channel, which is -1 whatever comes in."""
    with torch.no_grad():
        norm.weight.abs_().clamp_(min=0.1)
        norm.running_mean.zero_()
        norm.bias.zero_()
        norm.weight[0], norm.bias[0] = 0, -1
