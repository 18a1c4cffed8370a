"""Ranges of channels between layers: equal afterwards, the same function, and refused where it would not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import Reason, Status
from normfuse.layers.deployed import ChannelClamp
from normfuse.passes.equalize_ranges import EqualizeRanges
from tests.parity import assert_parity

EXACT = 1e-10


def spread(layer: Any, decades: float = 2.0) -> Any:
    """Give the output channels of a layer very different ranges."""
    with torch.no_grad():
        factors = 10 ** torch.linspace(-decades / 2, decades / 2, layer.weight.shape[0])
        layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(factors)
    return layer


def block(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        spread(nn.Conv2d(3, 6, 3, padding=1)),
        activation,
        spread(nn.Conv2d(6, 6, 3, padding=1, groups=6)),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    ).double()


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8).double()


def equalized(model: nn.Module, calibration: Any = None, example: Any = None) -> Any:
    x = image() if example is None else example
    return normfuse.apply(model, [EqualizeRanges(calibration)], example_inputs=x)


def ranges(model: nn.Sequential, x: Tensor, upto: int) -> Tensor:
    return model[: upto + 1](x).detach().abs().amax((0, 2, 3))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.Identity(), nn.LeakyReLU(0.1), nn.ReLU6(), nn.Sequential(nn.Identity(), nn.ReLU6())]
)
@pytest.mark.parametrize("with_data", [True, False])
def test_the_function_stays_the_same(activation: nn.Module, with_data: bool):
    model, x = block(activation).eval(), image()
    result = equalized(model, [x, image()] if with_data else None, x)
    assert [o.status for o in result.report.outcomes] == [Status.APPLIED, Status.APPLIED, Status.REFUSED]
    assert_parity(model, result.model, x, tolerance=EXACT)
    assert_parity(model, result.model, 3 * image(), tolerance=EXACT)  # beyond what it was calibrated on


def test_ranges_in_front_of_depthwise_weights_become_equal():
    x = image()
    model = block(nn.ReLU()).eval()
    before, after = ranges(model, x, 1), ranges(equalized(model, x, x).model, x, 1)
    assert before.max() / before.min() > 30
    torch.testing.assert_close(after, torch.full_like(after, float(before.max())))


def test_ranges_and_the_weights_that_read_them_become_equal():
    x = image()
    model = block(nn.ReLU()).eval()
    new = equalized(model, x, x).model
    activations, weights = ranges(new, x, 3), new[4].weight.detach().abs().amax((0, 2, 3))
    alive = activations > 0
    assert alive.sum() >= 4
    ratio = (activations / weights)[alive]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    old, new = ranges(model, x, 3)[alive], activations[alive]
    assert new.max() / new.min() < (old.max() / old.min()) ** 0.7


def test_relu6_gets_a_bound_for_each_channel_that_is_reached():
    with torch.no_grad():
        model = block(nn.ReLU6()).eval()
        model[0].weight.mul_(20)
        x = image()
        assert (model[0](x) > 6).any()
        new = equalized(model, x, x).model
    assert isinstance(new[1], ChannelClamp)
    assert new[1].bound.unique().numel() > 1
    assert_parity(model, new, x, tolerance=EXACT)


def test_linear_layers_with_tokens():
    model = nn.Sequential(spread(nn.Linear(4, 6)), nn.ReLU6(), nn.Linear(6, 3)).double().eval()
    x = torch.randn(2, 5, 4).double()
    new = equalized(model, x, x).model
    assert_parity(model, new, x, tolerance=EXACT)
    assert new[1].dim == 2


def test_a_dead_channel_is_left_alone():
    model, x = block(nn.ReLU()).eval(), image()
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = -1.0
    new = equalized(model, x, x).model
    assert torch.equal(new[0].weight[2], model[0].weight[2])
    assert torch.equal(new[0].bias[2], model[0].bias[2])
    assert_parity(model, new, x, tolerance=EXACT)


def test_a_channel_of_next_to_no_range_is_scaled_by_no_more_than_the_limit():
    model, x = block(nn.ReLU()).eval(), image()
    with torch.no_grad():
        model[0].weight[2] *= 1e-30
        model[0].bias[2] = 1e-30
    new = equalized(model, x, x).model
    assert new[2].weight[2].abs().max() >= model[2].weight[2].abs().max() / 2**11
    assert_parity(model, new, x, tolerance=EXACT)


class Shared(nn.Module):
    """One ReLU6 for two layers, a sum, and a function that is not homogeneous."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x))
        y = self.act(self.b(y))
        return self.d(torch.sigmoid(self.c(y)) + x)


def test_where_it_would_be_another_function_the_reason_is_given():
    model, x = Shared().double().eval(), image()
    report = equalized(model, x, x).report
    found = {outcome.subject: outcome.refusal.reason for outcome in report.outcomes if outcome.refusal}
    assert found == {
        "a": Reason.SHARED_MODULE,
        "b": Reason.SHARED_MODULE,
        "c": Reason.OPAQUE_OPERATION,
        "d": Reason.EXTRA_CONSUMER,
    }
    assert not report


def test_equal_channels_are_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1)).double().eval()
    (first, _) = equalized(model, None, torch.randn(1, 1, 4, 4).double()).report.outcomes
    assert first.refusal is not None
    assert first.refusal.reason is Reason.NOT_CHEAPER


def test_it_runs_by_name_and_its_result_is_saved_and_loaded(tmp_path: Any):
    model, x = block(nn.ReLU6()).eval(), image()
    result = normfuse.apply(model, ["equalize-ranges"], example_inputs=x)
    normfuse.save(result.model, tmp_path / "m.safetensors")
    again = normfuse.load(tmp_path / "m.safetensors", model=block(nn.ReLU6()))
    assert torch.equal(again(x), result.model(x))
