"""The gradients of the L1 norms: finite differences, plain autograd of the formula, and where |d| has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.layers import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d, L1LayerNorm, L1RMSNorm
from tests.parity import EXACT, error

DOUBLE = {"dtype": torch.float64}


def literal(norm: Any, x: Tensor) -> Tensor:
    """Return the formula, for autograd to differentiate."""
    if hasattr(norm, "normalized_shape"):
        axes: tuple[int, ...] = tuple(range(-len(norm.normalized_shape), 0))
        affine: tuple[int, ...] = norm.normalized_shape
    else:
        axes = tuple(i for i in range(x.dim()) if i != 1)
        affine = (1, -1, *[1] * (x.dim() - 2))
    d = x if isinstance(norm, L1RMSNorm) else x - x.mean(axes, keepdim=True)
    factor = math.sqrt(math.pi / 2) if norm.gaussian else 1.0
    y = d / (factor * d.abs().mean(axes, keepdim=True) + norm.eps)
    y = y if norm.weight is None else y * norm.weight.reshape(affine)
    return y if norm.bias is None else y + norm.bias.reshape(affine)


CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "batch 1d": (lambda **o: L1BatchNorm1d(3, **DOUBLE, **o), (5, 3)),
    "batch 1d, length": (lambda **o: L1BatchNorm1d(3, **DOUBLE, **o), (4, 3, 6)),
    "batch 2d": (lambda **o: L1BatchNorm2d(3, **DOUBLE, **o), (2, 3, 4, 5)),
    "batch 3d": (lambda **o: L1BatchNorm3d(2, **DOUBLE, **o), (2, 2, 2, 3, 2)),
    "layer": (lambda **o: L1LayerNorm(7, **DOUBLE, **o), (2, 3, 7)),
    "layer, two axes": (lambda **o: L1LayerNorm((3, 4), **DOUBLE, **o), (2, 3, 4)),
    "layer, no shift": (lambda **o: L1LayerNorm(7, bias=False, **DOUBLE, **o), (5, 7)),
    "layer, one token": (lambda **o: L1LayerNorm(6, **DOUBLE, **o), (6,)),
    "layer, size 1": (lambda **o: L1LayerNorm((1, 5), **DOUBLE, **o), (4, 1, 5)),
    "rms": (lambda **o: L1RMSNorm(7, **DOUBLE, **o), (2, 3, 7)),
}
each = pytest.mark.parametrize("name", CASES)


def case(name: str, **options: Any) -> tuple[Any, Tensor]:
    make, shape = CASES[name]
    norm = make(**options)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, **DOUBLE) * 4 - 2)
        if norm.weight is not None:
            norm.weight.view(-1)[-1:] = 0
    return norm, torch.randn(shape, generator=generator, **DOUBLE)


def gradients(norm: Any, forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    norm.zero_grad()
    y = forward(x)
    y.backward(grad)
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in norm.parameters())]


def assert_gradients_of_formula(norm: Any, x: Tensor) -> None:
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    expected = gradients(norm, lambda t: literal(norm, t), x, grad)
    for one, other in zip(expected, gradients(norm, norm, x, grad), strict=True):
        assert one.shape == other.shape
        assert error(one, other) <= EXACT


@each
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.7])
def test_gradients_are_those_of_the_formula(name: str, gaussian: bool, eps: float):
    assert_gradients_of_formula(*case(name, gaussian=gaussian, eps=eps))


@each
def test_finite_differences_twice(name: str):
    norm, x = case(name, eps=1e-2)
    parameters = tuple(p.detach().clone().requires_grad_() for p in norm.parameters())
    names = [key for key, _ in norm.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(norm, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_zero_deviations(eps: float):
    """Values equal to the mean: sgn(0) = 0, as autograd has it; and a row in which all are."""
    x = torch.tensor([[1.0, 0.0, -1.0, 0.0, 2.0, -2.0], [3.0] * 6, [0.0] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, 6.0]], **DOUBLE)
    for norm in (L1LayerNorm(6, eps=eps, **DOUBLE), L1RMSNorm(6, eps=eps, **DOUBLE)):
        assert_gradients_of_formula(norm, x)
    assert_gradients_of_formula(L1BatchNorm1d(4, eps=eps, **DOUBLE), x.T)


@pytest.mark.parametrize("norm", [L1LayerNorm(5, elementwise_affine=False), L1BatchNorm1d(5, affine=False)])
def test_without_gain(norm: nn.Module):
    assert not list(norm.parameters())
    assert_gradients_of_formula(norm, torch.randn(4, 5, generator=torch.Generator().manual_seed(0), **DOUBLE))


def saved_bytes(norm: nn.Module, x: Tensor) -> int:
    sizes: dict[int, int] = {}
    own = {x.data_ptr(), *(p.data_ptr() for p in norm.parameters())}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        norm(x)
    return sum(sizes.values())


def test_saves_only_the_input_and_two_values_per_set():
    x = torch.randn(64, 32, requires_grad=True)
    assert saved_bytes(L1LayerNorm(32), x) == 2 * 64 * 4
    assert saved_bytes(L1BatchNorm1d(32), x) == 2 * 32 * 4
