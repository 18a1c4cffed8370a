"""A norm stays where an identity in its place would let somebody write into a value that others hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import Status
from tests.parity import assert_parity, outputs, randomize_norms
from tests.zoo.trap import image


class NormAct(nn.BatchNorm2d):
    """Is replaced by its activation, which writes into what it is given."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        args = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(nn.functional.batch_norm(input, *args, eps=self.eps))


class Net(nn.Module):
    """A norm of what the model is given, something that is done to its result, and a layer that takes its map."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.bn, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def of_the_input(net: Any, x: Tensor) -> Tensor:
    return net.last(net.bn(x).mul_(2))


def augmented(net: Any, x: Tensor) -> Tensor:
    y = net.bn(x)
    y *= 0.5
    return net.last(y)


def through_a_view(net: Any, x: Tensor) -> Tensor:
    y = net.bn(x)
    y.flatten(2).mul_(2)
    return net.last(y)


def of_a_view(net: Any, x: Tensor) -> Tensor:
    return net.last(net.bn(x.flip(1).transpose(2, 3)).mul_(2)) + x.sum()


def of_what_others_read(net: Any, x: Tensor) -> Any:
    y = x.sigmoid()
    return net.last(net.bn(y).mul_(2)), y * 3


def nobody_reads(net: Any, x: Tensor) -> Tensor:
    net.bn(x).mul_(2)
    return x


WRITES = (of_the_input, augmented, through_a_view, of_a_view, of_what_others_read, nobody_reads)


@pytest.mark.parametrize("forward", WRITES)
@pytest.mark.parametrize("recorded", [True, False])
def test_nothing_is_written_into_what_others_hold(forward: Callable[[Any, Tensor], Any], recorded: bool):
    model, x = randomize_norms(Net(forward).double().eval()), image()
    result = normfuse.apply(model, ["fold-bn"], example_inputs=x if recorded else None)
    assert_parity(model, result.model, x)
    given = x.clone()
    result.model(given)
    expected = x.clone()
    model(expected)
    assert torch.equal(given, expected)
    copies = forward is of_a_view
    assert copies or result.report.norms[0].status is Status.REFUSED


def test_what_nobody_else_holds_may_be_written_to():
    model = randomize_norms(Net(lambda net, x: net.last(net.bn(net.first(x)).mul_(2))).double().eval())
    result = normfuse.apply(model, ["fold-bn"], example_inputs=image())
    assert result.report.norms[0].status is Status.APPLIED
    assert_parity(model, result.model, image())


def test_an_activation_that_takes_the_place_of_its_norm():
    model = randomize_norms(
        nn.Sequential(nn.Conv2d(4, 4, 1), NormAct(4), nn.BatchNorm2d(4), NormAct(4)).double().eval()
    )
    result = normfuse.apply(model, ["fold-bn"], example_inputs=image())
    assert result.report.norms[0].status is Status.APPLIED
    assert_parity(model, result.model, image())
    assert outputs(result.model, image())
