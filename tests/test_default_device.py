"""Another default device than the CPU changes nothing, and the model's own code still sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from tests.gradients import assert_same, gradients, hard_norms, set_mode
from tests.parity import EXACT, error
from tests.zoo.trap import image


class Asks(nn.Module):
    """Makes a tensor without naming a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.zeros(1).device.type)
        return x


def network() -> Any:
    torch.manual_seed(0)
    first = (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 64, 3), nn.BatchNorm2d(64))
    last = (nn.Flatten(), nn.Linear(64 * 4, 8), nn.BatchNorm1d(8))
    return hard_norms(nn.Sequential(Asks(), *first, *last).double())


@pytest.mark.parametrize("example", [None, image()])
def test_tune_mode(example: Tensor | None):
    expected, model = gradients(set_mode(network(), True), image()), network()
    x, y = image().requires_grad_(), image()
    with torch.device("meta"):
        normfuse.tune_mode(model, example_inputs=example).train()
        model(x).square().sum().backward()
        model.requires_grad_(False)
        frozen = model(y)
    assert set(model[0].seen) == {"meta"}
    assert error(expected["output 0"], frozen) <= EXACT  # type: ignore[arg-type]
    model.requires_grad_(True)
    assert_same(expected, gradients(model, image()))


@pytest.mark.parametrize("example", [None, image()])
def test_fold(example: Tensor | None):
    model = network().eval()
    with torch.device("meta"):
        folded = normfuse.fold_bn(model, example_inputs=example)
    assert not [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert error(model(image()).detach(), folded(image()).detach()) <= EXACT
