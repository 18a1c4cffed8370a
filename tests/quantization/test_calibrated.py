"""Calibrated layers: their definition in integers bit for bit, the bound of their steps, and what they survive."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.quantization import ShiftQuant, grouped
from normfuse.quantization.calibrated import CalibratedConv2d, CalibratedLayer, CalibratedLinear
from normfuse.quantization.calibrated_form import calibrated
from normfuse.quantization.columns import Windows
from normfuse.quantization.shiftquant import channel_ranges
from tests.parity import error
from tests.quantization.operands import RANGES, image
from tests.quantization.test_layers import CONVS, conv, convolve, padded


def form(module: Any, x: Tensor, bits: int = 8, groups: int = 4, **options: Any) -> CalibratedLayer:
    """Return the calibrated form for the ranges of one input."""
    axis = x.dim() - 1 if isinstance(module, nn.Linear) else 1
    scale, shift = ShiftQuant(bits, groups).scales(channel_ranges(x, axis))
    return calibrated(module, scale, shift, bits, **options)


def integers(layer: CalibratedLayer, x: Tensor, dim: int) -> Tensor:
    """Return the quantized input by its definition, in float64."""
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    scaled = x * torch.exp2(layer.input_shift.double()).reshape(shape) / layer.input_scale
    return torch.clamp(torch.round(scaled), -layer.limit, layer.limit)


def scaled(sums: Tensor, layer: CalibratedLayer) -> Tensor:
    """Return ``s_0 t_n`` times the sums, whose outputs lie along the last axis, and the bias."""
    out = sums * (layer.weight_scale * layer.input_scale)
    return out if layer.bias is None else out + layer.bias


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (8, 4), (4, 6), (3, 2)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_linear_is_its_definition_to_the_bit(ranges: str, bits: int, groups: int, per_channel: bool):
    x = RANGES[ranges](13, 20)
    module = nn.Linear(20, 9, bias=per_channel).double()
    layer = form(module, x, bits, groups, per_channel=per_channel)
    for values in (x, 1.7 * x):  # the second saturates
        expected = scaled(integers(layer, values, 1) @ layer.integers.double().T, layer)
        assert torch.equal(layer(values), expected)
    assert int(layer.integers.abs().max()) <= layer.limit


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize(("dims", "options"), list(itertools.product([1, 2], CONVS)), ids=str)
def test_conv_is_its_definition_to_the_bit(bits: int, dims: int, options: dict[str, Any]):
    module: Any = conv(dims, options)
    x = image(3, 4, *(9, 8)[:dims])
    layer = form(module, x, bits)
    seen, padding = padded(x, module)
    plain = copy.deepcopy(module)
    plain.bias = None
    sums = convolve(plain, integers(layer, seen, 1), layer.integers.double(), padding)
    expected = scaled(sums.movedim(1, -1), layer).movedim(-1, 1)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[0]), expected[0])


def test_extremes_of_the_type_over_a_long_sum():
    module = nn.Linear(5000, 3, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0], [-1.0], [1.0]]).expand(3, 5000))
    x = torch.ones(2, 5000, dtype=torch.float64)
    x[1, ::2] = -1
    layer = form(module, x)
    sums = torch.tensor([[1, -1, 1], [0, 0, 0]]) * 127 * 127 * 5000
    assert torch.equal(layer(x), sums * (layer.weight_scale * layer.input_scale))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_within_half_a_step(bits: int):
    torch.manual_seed(0)
    for module in (nn.Linear(20, 9), nn.Conv2d(8, 6, 3, groups=2), nn.Conv1d(6, 6, 3, groups=6)):
        x = (
            image(4, 20)
            if isinstance(module, nn.Linear)
            else image(2, module.in_channels, *[7] * len(module.kernel_size))
        )
        layer = form(module.double(), x, bits, 5)
        columns = torch.exp2(layer.input_shift.double()).reshape(getattr(module, "groups", 1), 1, -1)
        by_output = columns.expand(-1, len(module.weight) // len(columns), -1).flatten(0, 1)
        step = layer.weight_scale.reshape(-1, 1) * by_output
        step = step.reshape(*step.shape, *[1] * (module.weight.dim() - 2))
        assert bool(((layer.integers * step - module.weight).abs() <= step * 0.5000001).all())
        assert torch.equal(layer.weight, layer.integers * step)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_tensors_answer_as_those_of_the_layer(dtype: torch.dtype, bias: bool):
    """Networks ask layers for dtype, device and shape, and some read the numbers."""
    for module in (nn.Linear(20, 9, bias), nn.Conv2d(8, 6, 3, groups=2, bias=bias), nn.Conv1d(6, 6, 3, groups=6)):
        module = module.to(dtype)
        size = [20] if isinstance(module, nn.Linear) else [module.in_channels, *[7] * len(module.kernel_size)]
        layer: Any = form(module, image(4, *size, dtype=dtype))
        for found, given in ((layer.weight, module.weight), (layer.bias, layer.weight.new_zeros(len(module.weight)))):
            assert (found.dtype, found.shape, found.device) == (dtype, given.shape, given.device)
        assert next(layer.parameters()).dtype == dtype
        assert not layer.weight.requires_grad
        assert error(module.weight.detach(), layer.weight) < 0.05


def test_state_dicts_have_the_entries_of_the_first_version():
    layer = form(nn.Conv2d(4, 5, 3), image(2, 4, 6, 6, dtype=torch.float32))
    floats = {"bias": torch.float32, "weight_scale": torch.float32, "input_scale": torch.float32}
    state = layer.state_dict()
    assert {k: v.dtype for k, v in state.items()} == {**floats, "weight": torch.int8, "input_shift": torch.int8}
    fresh = CalibratedConv2d(4, 5, (3, 3))
    fresh.load_state_dict(state, assign=True)
    assert fresh.integers.data_ptr() == layer.integers.data_ptr()
    assert torch.equal(fresh.weight, layer.weight)


def test_depthwise_shifts_cost_the_weights_nothing():
    module = nn.Conv2d(6, 6, 3, groups=6).double()
    x = image(2, 6, 8, 8)
    one, many = form(module, x, groups=1), form(module, x, groups=7)
    assert many.input_groups > 2
    assert torch.equal(one.integers, many.integers)
    k, expected = int(many.input_shift.argmax()), module(x).detach()
    assert error(expected[:, k], many(x)[:, k]) < error(expected[:, k], one(x)[:, k]) / 4


def test_groups_in_one_convolution_are_those_of_many_products(monkeypatch: pytest.MonkeyPatch):
    module, x = nn.Conv2d(12, 24, 3, groups=6, padding=1).double(), image(2, 12, 8, 8)
    assert grouped._is_exact("cpu", grouped._settings(x))
    y = form(module, x)(x)
    monkeypatch.setattr(grouped, "_is_exact", lambda *_: False)
    assert torch.equal(form(module, x)(x), y)


def test_one_convolution_is_not_used_where_it_would_round():
    windows = Windows((1, 1), (1, 1), (1, 1), (0, 0, 0, 0))
    deep, shallow = (torch.ones(2, 2 * size, 3, 3, dtype=torch.int8) for size in (1041, 1040))
    kernel = torch.ones(4, 1041, 1, 1, dtype=torch.int8)
    assert grouped.grouped_sums(deep, kernel, 2, windows, 127) is None
    sums = grouped.grouped_sums(shallow, kernel[:, 1:], 2, windows, 127)
    assert sums is not None
    assert torch.equal(sums, torch.full((2, 4, 3, 3), 1040.0))


@pytest.mark.parametrize("onednn", [True, False])
def test_one_convolution_is_exact_under_any_settings(onednn: bool):
    """``F.conv2d`` without oneDNN takes NNPACK for batches of 16 and more, which transforms images and rounds."""
    windows, size = Windows((3, 3), (1, 1), (1, 1), (1, 1, 1, 1)), (20, 16, 20, 20)
    image, kernel = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in (size, (16, 8, 3, 3)))
    expected = F.conv2d(image.double(), kernel.double(), None, 1, 1, 1, 2)
    torch._C._set_mkldnn_enabled(onednn)
    try:
        sums = grouped.grouped_sums(image, kernel, 2, windows, 127)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert sums is not None
    assert torch.equal(sums.double(), expected)


def test_one_group_is_per_tensor():
    module, x = nn.Linear(16, 5).double(), image(30, 16)
    layer = form(module, x, groups=1, per_channel=False)
    s, t = x.abs().max() / 127, module.weight.detach().abs().max() / 127
    expected = F.linear((x / s).round() * s, (module.weight / t).round() * t, module.bias)
    assert error(expected.detach(), layer(x)) < 1e-12
    assert len(layer.weight_scale.unique()) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_to_another_dtype(dtype: torch.dtype):
    module, x = nn.Conv2d(4, 5, 3), image(2, 4, 6, 6, dtype=torch.float32)
    layer = form(module, x)
    expected = layer(x)
    y = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert error(expected, y) < 0.05
    assert layer.to(dtype).weight_scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer.integers.dtype == torch.int8


def test_copies_files_and_modes():
    layer, x = form(nn.Conv2d(4, 5, 3), image(2, 4, 6, 6, dtype=torch.float32)), image(2, 4, 6, 6, dtype=torch.float32)
    y = layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = CalibratedConv2d(4, 5, (3, 3))
    fresh(x)  # keeps what it makes of the weights it has now
    fresh.load_state_dict(torch.load(file))
    for other in (fresh, copy.deepcopy(layer), layer.train()):
        assert torch.equal(other(x), y)
    assert layer.training
    assert not layer(x.requires_grad_()).requires_grad
    assert "bits=8" in repr(layer)
    assert not [p for p in layer.parameters() if p.requires_grad]


def test_empty_and_not_a_number():
    layer = form(nn.Linear(4, 3), image(5, 4, dtype=torch.float32))
    assert layer(torch.zeros(0, 4)).shape == (0, 3)
    assert bool(torch.isfinite(layer(torch.full((1, 4), torch.inf))).all())  # saturates
    with pytest.raises(ValueError, match="NaN"):
        layer(torch.full((1, 4), torch.nan))


def test_compiles():
    layer, x = form(nn.Linear(4, 3), image(5, 4, dtype=torch.float32)), image(5, 4, dtype=torch.float32)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


@pytest.mark.parametrize("bits", [2, 9])
def test_bad_bits(bits: int):
    with pytest.raises(ValueError, match="bits must be"):
        CalibratedLinear(3, 3, bits=bits)
