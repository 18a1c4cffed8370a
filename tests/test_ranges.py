"""The range report: figures that can be worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from normfuse.ranges import overflowing, ranges

TINY = torch.finfo(torch.float16).tiny  # 6.1e-5, the smallest normal number
SMALLEST = 2.0**-24  # the smallest subnormal


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None, dtype=torch.float64)
    layer.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
    if bias is not None:
        layer.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float64))
    return layer


def test_each_kind_of_loss_is_counted():
    layer = linear([[1.0, TINY / 2], [SMALLEST / 4, 1e5]], [0.0, -2.0])
    (found,) = ranges(nn.Sequential(layer), torch.float16)
    assert (found.name, found.layer, found.dtype) == ("0", "Linear", "float16")
    assert (found.max_weight, found.max_bias) == (1e5, 2.0)
    assert (found.subnormal, found.flushed, found.overflowed) == (1 / 6, 1 / 6, 1 / 6)


def test_zero_weights_are_not_flushed():
    (found,) = ranges(nn.Sequential(linear([[0.0, 0.0], [1.0, 0.0]])), torch.float16)
    assert (found.flushed, found.channel_ratio, found.max_bias) == (0.0, 1.0, 0.0)


def test_bfloat16_has_the_range_of_float32():
    model = nn.Sequential(linear([[1e5, SMALLEST / 4]]))
    assert overflowing(model, torch.bfloat16) == ()
    assert [layer.name for layer in overflowing(model, torch.float16)] == ["0"]
    assert ranges(model, torch.bfloat16)[0].flushed == 0.0


def test_infinite_weights_do_not_count_as_lost_to_the_cast():
    assert overflowing(nn.Sequential(linear([[float("inf"), 1.0]]))) == ()


@pytest.mark.parametrize("groups", [1, 2])
def test_channel_ratio_is_over_output_channels_of_a_transposed_convolution(groups: int):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    with torch.no_grad():
        layer.weight.fill_(1.0)  # (in, out/groups, 3, 3)
        for channel in range(6):
            group, place = divmod(channel, 6 // groups)
            rows = slice(group * 4 // groups, (group + 1) * 4 // groups)
            layer.weight[rows, place] *= scale[channel]
    assert ranges(nn.Sequential(layer))[0].channel_ratio == 32.0


def test_channel_ratio_is_over_output_channels_of_a_depthwise_convolution():
    layer = nn.Conv1d(3, 3, 5, groups=3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -10.0, 0.5]).reshape(3, 1, 1).expand(3, 1, 5))
    assert ranges(nn.Sequential(layer))[0].channel_ratio == 20.0


def test_layers_without_values_are_left_out_and_order_is_kept():
    model = nn.Sequential(nn.LazyLinear(3), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Linear(2, 2))
    assert [layer.name for layer in ranges(model)] == ["1", "3"]


def test_parametrized_weights_are_read_as_used():
    layer = nn.utils.parametrizations.weight_norm(linear([[3.0, 4.0], [0.0, 1.0]]))
    magnitude = dict(layer.named_parameters())["parametrizations.weight.original0"]
    magnitude.data *= 2
    assert ranges(nn.Sequential(layer))[0].max_weight == pytest.approx(8.0)


def test_reports_are_text_and_json():
    (found,) = ranges(nn.Sequential(linear([[1.0, 1e5]])))
    assert json.loads(json.dumps(found.to_dict()))["overflowed"] == 0.5
    assert "max |w| 1e+05" in str(found)
    assert "50.0% overflow" in str(found)
