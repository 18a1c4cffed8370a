"""A traced model that writes into its values is read as it runs: who reads later reads what was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse import Status
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image


class Writes(nn.Module):
    """A convolution, a norm, what is written between them or behind, and a convolution."""

    def __init__(self, write: Callable[[Any, Tensor], Tensor], *, before: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.relu, self.same = nn.ReLU(inplace=True), nn.Identity()
        self.write, self.before = write, before

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.bn(self.write(self, y)) if self.before else self.write(self, self.bn(y.sigmoid()))
        return self.last(y)


def augmented(net: Any, y: Tensor) -> Tensor:
    other = y
    other += 1
    return y


def multiplied(net: Any, y: Tensor) -> Tensor:
    view = y[:, :2]
    view *= 3
    return y


def divided(net: Any, y: Tensor) -> Tensor:
    y /= 2
    return y


def by_method(net: Any, y: Tensor) -> Tensor:
    y.mul_(2).sub_(1)
    return y


def through_a_view(net: Any, y: Tensor) -> Tensor:
    y.flatten(2).add_(1.5)
    return y


def into_its_base(net: Any, y: Tensor) -> Tensor:
    view = y.transpose(1, 2).transpose(1, 2)
    y.add_(1)
    return view


def out(net: Any, y: Tensor) -> Tensor:
    new = torch.empty_like(y)
    torch.add(y, 1, out=new)
    return new


def by_function(net: Any, y: Tensor) -> Tensor:
    F.relu(y, inplace=True)
    return y


def by_position(net: Any, y: Tensor) -> Tensor:
    F.leaky_relu(y, 0.1, True)
    return y


def by_layer(net: Any, y: Tensor) -> Tensor:
    net.relu(y)
    return y


def through_a_layer(net: Any, y: Tensor) -> Tensor:
    same = net.same(y)
    y.add_(1)
    return same


def used_before(net: Any, y: Tensor) -> Tensor:
    double = y * 2
    y.add_(1)
    return double


WRITES = (augmented, multiplied, divided, by_method, through_a_view, into_its_base, out, by_function, by_position)
WRITES += (by_layer, through_a_layer, used_before)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("before", [True, False])
def test_traced_as_it_runs(write: Callable[[Any, Tensor], Tensor], before: bool):
    for positive in (True, False):
        model = randomize_norms(Writes(write, before=before).double().eval(), positive=positive)
        for inputs in (None, image(2, 4, 5, 5)):
            result = normfuse.apply(model, normfuse.api.EXACT_PASSES, example_inputs=inputs, verify=False)
            assert_parity(model, result.model, image(2, 4, 5, 5))


class Rewrites(Writes):
    """Goes on with what the operation returns, as most networks do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.write(self, self.bn(self.conv(x))))


@pytest.mark.parametrize("write", [lambda net, y: net.relu(y), lambda net, y: y.relu_(), lambda net, y: y.mul_(2)])
def test_what_nobody_reads_again_is_no_hindrance(write: Callable[[Any, Tensor], Tensor]):
    model = randomize_norms(Rewrites(write, before=False).double().eval())
    result = normfuse.apply(model, ["fold-bn"])
    assert result.report.norms[0].status is Status.APPLIED
    assert_parity(model, result.model, image())
