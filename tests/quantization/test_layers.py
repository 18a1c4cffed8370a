"""Layers on quantized operands: the forward product and both gradients are those of the dequantized operands."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.quantization import (
    Precision,
    ShiftQuant,
    ShiftQuantConv2d,
    ShiftQuantLinear,
)
from tests.parity import EXACT, error
from tests.quantization.operands import image, quantized

PRECISIONS = [Precision(), Precision(4, 5, 1, grad_bits=6, grad_groups=3), Precision(3, 1), Precision(range=95.0)]
CONVS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": 2, "dilation": 2, "groups": 2},
    {"padding": "same", "bias": False},
    {"padding": "valid", "groups": 4},
    {"stride": 3, "padding": 1, "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "reflect", "groups": 2},
]


def conv(dims: int, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    kernel = (3, 2)[:dims] if options.get("padding") != "same" else 3
    return {1: nn.Conv1d, 2: nn.Conv2d}[dims](4, 8, kernel, **options).double()


def restored(x: Tensor, quantizer: ShiftQuant, dim: int) -> Tensor:
    return quantizer(x, dim=dim).dequantize()


def dequantized_weight(module: Any, precision: Precision) -> Tensor:
    """Return the weight as quantized by group, with its groups along the flattened inputs of each output."""
    parts = module.weight.detach().chunk(getattr(module, "groups", 1))
    return torch.cat([restored(p.flatten(1), precision.weight, 1).reshape(p.shape) for p in parts])


def padded(x: Tensor, module: Any) -> tuple[Tensor, Any]:
    """Return what the convolution sees, and the padding left to do."""
    if module.padding_mode == "zeros":
        return x, module.padding
    return F.pad(x, tuple(p for p in reversed(module.padding) for _ in range(2)), mode=module.padding_mode), 0


def convolve(module: Any, x: Tensor, weight: Tensor, padding: Any) -> Tensor:
    function = F.conv1d if x.dim() == 3 else F.conv2d
    return function(x, weight, module.bias, module.stride, padding, module.dilation, module.groups)


# forward


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(20,), (1, 20), (7, 20), (2, 3, 20), (0, 20)])
def test_linear_is_that_of_dequantized_operands(
    precision: Precision, bias: bool, training: bool, shape: tuple[int, ...]
):
    torch.manual_seed(0)
    module = nn.Linear(20, 9, bias=bias).double().train(training)
    x = image(math.prod(shape[:-1]), 20).reshape(shape)
    x_restored = restored(x.reshape(-1, 20), precision.activation, 1).reshape(shape)
    expected = F.linear(x_restored, dequantized_weight(module, precision), module.bias)
    y = quantized(module, precision)(x)
    assert y.shape == expected.shape
    assert error(expected.detach(), y.detach()) < EXACT


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(("dims", "options"), list(itertools.product([1, 2], CONVS)), ids=str)
def test_conv_is_that_of_dequantized_operands(precision: Precision, dims: int, options: dict[str, Any]):
    module = conv(dims, options)
    x = image(3, 4, *(9, 8)[:dims])
    seen, padding = padded(x, module)
    expected = convolve(module, restored(seen, precision.activation, 1), dequantized_weight(module, precision), padding)
    y = quantized(module, precision)(x)
    assert y.shape == expected.shape
    assert y.is_contiguous()
    assert error(expected.detach(), y.detach()) < EXACT
    assert torch.equal(quantized(module, precision)(x[0]), quantized(module, precision)(x[:1])[0])


def test_scales_that_are_powers_of_two_give_the_same_bits():
    """Then the dequantized operands and their products are exact in float64, and so is the whole convolution."""
    module = nn.Conv2d(4, 6, 3, padding=1, stride=2).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.weight.copy_(torch.randint(-127, 128, module.weight.shape, generator=g) / 1024)
        module.weight.view(-1)[0] = 127 / 1024
    x = torch.randint(-127, 128, (2, 4, 7, 7), generator=g).double() / 64
    x[0, 0, 0, 0] = 127 / 64
    assert torch.equal(quantized(module, Precision(8, 1))(x) - module(x), torch.zeros(2, 6, 4, 4).double())


def test_channels_last_stays():
    layer = ShiftQuantConv2d(4, 8, 3)
    x = image(2, 4, 6, 6, dtype=torch.float32)
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_to_another_dtype(dtype: torch.dtype):
    layer = nn.Sequential(ShiftQuantConv2d(4, 6, 3), nn.Flatten(), ShiftQuantLinear(24, 3)).eval()
    x = image(2, 4, 4, 4, dtype=torch.float32)
    expected = layer(x)
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert error(expected.detach(), y.detach()) < 0.05
    layer.train()(x.to(dtype).requires_grad_()).sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}


def test_more_groups_bring_the_output_closer():
    """With inputs of unequal range and weights that undo it, as after a folded norm."""
    module, x = nn.Linear(64, 32, bias=False).double(), image(200, 64)
    with torch.no_grad():
        module.weight.div_(x.abs().amax(0))
    errors = [error(module(x).detach(), quantized(module, Precision(6, groups))(x).detach()) for groups in (1, 3, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 3


# gradients


def gradients_of(layer: nn.Module, x: Tensor, dy: Tensor, seed: int) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    torch.manual_seed(seed)
    return list(torch.autograd.grad(y, [x, *layer.parameters()], dy))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_linear_gradients_are_those_of_dequantized_operands(precision: Precision):
    torch.manual_seed(0)
    module = nn.Linear(20, 9).double()
    x, dy = image(30, 20), image(30, 9, seed=1)
    dx, dw, db = gradients_of(quantized(module, precision), x, dy, seed=5)
    torch.manual_seed(5)
    by_output = restored(dy, precision.gradient, 1)  # the same random numbers, in the same order
    by_sample = restored(dy, precision.gradient, 0)
    assert error(by_output @ dequantized_weight(module, precision), dx) < EXACT
    assert error(by_sample.T @ restored(x, precision.activation, 1), dw) < EXACT
    assert error(dy.sum(0), db) < EXACT


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(("dims", "options"), list(itertools.product([1, 2], CONVS)), ids=str)
def test_conv_gradients_are_those_of_dequantized_operands(precision: Precision, dims: int, options: dict[str, Any]):
    module: Any = conv(dims, options)
    x = image(3, 4, *(9, 8)[:dims])
    y = module(x)
    dy = image(*y.shape, seed=1)
    found = gradients_of(quantized(module, precision), x, dy, seed=5)
    torch.manual_seed(5)
    by_output, by_sample = [], []
    for part in dy.chunk(module.groups, dim=1):
        rows = part.movedim(1, -1).flatten(0, -2)
        for kept, dim in ((by_output, 1), (by_sample, 0)):
            kept.append(restored(rows, precision.gradient, dim).reshape(part.movedim(1, -1).shape).movedim(-1, 1))
    x = x.requires_grad_()
    seen, padding = padded(x, module)
    x_restored = seen + (restored(seen, precision.activation, 1) - seen).detach()  # straight through
    weight = dequantized_weight(module, precision).requires_grad_()
    out = convolve(module, x_restored, weight, padding)
    (dx,) = torch.autograd.grad(out, x, torch.cat(by_output, 1), retain_graph=True)
    (dw,) = torch.autograd.grad(out, weight, torch.cat(by_sample, 1))
    for expected, gradient in zip((dx, dw), found, strict=False):
        assert error(expected, gradient) < EXACT
    if module.bias is not None:
        assert error(dy.movedim(1, -1).flatten(0, -2).sum(0), found[2]) < EXACT


def test_gradients_are_unbiased():
    """The mean over many stochastic roundings is the gradient of the dequantized forward operands."""
    module, precision = nn.Linear(6, 5, bias=False).double(), Precision(8, 3, grad_bits=3)
    x, dy, repeats = image(8, 6), image(8, 5, seed=1), 800
    layer = quantized(module, precision)
    torch.manual_seed(0)
    samples = []
    for _ in range(repeats):
        leaf = x.clone().requires_grad_()
        samples.append(torch.cat([g.flatten() for g in torch.autograd.grad(layer(leaf), [leaf, layer.weight], dy)]))
    expected = torch.cat(
        [
            (dy @ dequantized_weight(module, precision)).flatten(),
            (dy.T @ restored(x, precision.activation, 1)).flatten(),
        ]
    )
    z = (torch.stack(samples).mean(0) - expected) / (torch.stack(samples).std(0) / repeats**0.5)
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed_is_computed(need: tuple[bool, bool]):
    layer = ShiftQuantConv2d(4, 4, 3, bias=False, groups=2)
    layer.weight.requires_grad_(need[1])
    x = image(2, 4, 5, 5, dtype=torch.float32).requires_grad_(need[0])
    y = layer(x)
    assert y.requires_grad is any(need)
    if any(need):
        y.sum().backward()
    assert (x.grad is not None, layer.weight.grad is not None) == need


def test_integers_are_saved_for_backward():
    """The image and the weight, an eighth of their size in float64, and nothing of the size of the windows."""
    saved: list[Tensor] = []
    layer = ShiftQuantConv2d(8, 8, 3, padding=1, bias=False).double()
    x = image(2, 8, 10, 10).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {t.dtype for t in saved if t.numel() > 100} == {torch.int8}
    size = sum(t.numel() * t.element_size() for t in saved)
    assert size < 1.2 * (x.numel() + layer.weight.numel())
    saved.clear()
    layer.weight.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.numel() for t in saved) < 1.2 * layer.weight.numel()


def test_a_small_network_learns():
    """Two layers of six bits fit a linear map of the sign of their inputs to a tenth of its variance."""
    torch.manual_seed(0)
    precision = Precision(6, 4, grad_bits=8)
    net = nn.Sequential(
        ShiftQuantLinear(8, 32, precision=precision), nn.ReLU(), ShiftQuantLinear(32, 1, precision=precision)
    )
    x = torch.randn(256, 8)
    target = x.sign() @ torch.linspace(-1, 1, 8).unsqueeze(1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        optimizer.step()
    assert float((net(x) - target).detach().square().mean()) < 0.1 * float(target.var())
