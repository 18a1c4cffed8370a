"""What activations lose in a narrower type: found where they arise, on the data, once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from normfuse.activations import activation_ranges, overflowing


class Residual(nn.Module):
    """A sum that no module returns but the model itself."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(inplace=True)
        nn.init.constant_(self.conv.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) * 2


def test_the_module_that_overflows_is_named_and_counted_once():
    x = torch.ones(1, 2, 3, 3)
    found = {one.name: one for one in activation_ranges(Residual(2e4), [x])}
    assert found["conv"].largest == 4e4
    assert [one.name for one in overflowing(found.values())] == [""]  # only the doubled sum passes 65504
    assert found[""].overflowed == x.numel()
    assert found[""].largest == 8e4
    assert "act" not in found  # it handed on, in place, what the convolution returned
    assert not overflowing(activation_ranges(Residual(2e4), [x], torch.bfloat16))


def test_fractions_of_small_values():
    values = torch.tensor([[1.0, 3e-5, 1e-9, 0.0]])  # normal, subnormal and flushed in float16, zero
    (one,) = activation_ranges(nn.Identity(), [values])
    assert (one.subnormal, one.flushed, one.overflowed) == (0.25, 0.25, 0)
    assert one.to_dict()["largest"] == 1.0


def test_a_norm_whose_input_squares_out_of_range_is_marked():
    edge = math.sqrt(torch.finfo(torch.float16).max)
    norm = nn.LayerNorm(4)
    for factor, expected in ((0.99, False), (1.01, True)):
        (one,) = activation_ranges(norm, [torch.tensor([[edge * factor, 0.0, 0.0, 0.0]])])
        assert one.squares_overflow is expected
        assert not one.overflowed


def test_the_model_keeps_its_mode_and_its_hooks():
    model = Residual(1.0).train()
    activation_ranges(model, [torch.ones(1, 2, 3, 3)])
    assert model.training
    assert not model.conv._forward_hooks


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="no data"):
        activation_ranges(nn.Identity(), [])
