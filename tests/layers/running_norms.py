"""The two norms with running statistics as the tests need them: past their warm-up soon, with gains of both signs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.layers import PowerNorm, UnifiedNorm
from tests.parity import EXACT, error

Make = Callable[..., Any]


def unified(channels: int = 3, **options: Any) -> UnifiedNorm:
    return randomized(UnifiedNorm(channels, **{"warmup_steps": 4, "window": 2, "scaling_start": 5, **options}))


def power(channels: int = 3, **options: Any) -> PowerNorm:
    return randomized(PowerNorm(channels, **{"warmup_steps": 4, "group_scaling": None, **options}))


def randomized(norm: Any) -> Any:
    """Give a norm gains of both signs, one zero, and shifts, the same for every norm of its size."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
            parameter.copy_(values)
        norm.weight[1:2] = 0
    return norm


both = pytest.mark.parametrize("make", [unified, power], ids=["UnifiedNorm", "PowerNorm"])
DOUBLE = {"dtype": torch.float64}


def train(norm: Any, *shape: int, steps: int = 8, seed: int = 0, **options: Any) -> list[Tensor]:
    """Train for some steps and return the outputs and the gradients of the input."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(steps):
        x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(norm.weight.dtype) for _ in range(2))
        results += step(norm, x, grad, **options)
    return results


def step(norm: Any, x: Tensor, grad: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = norm(x, mask)
    y.backward(grad)
    assert x.grad is not None
    return [y.detach(), x.grad]


def state(norm: nn.Module) -> dict[str, Tensor]:
    grads = {f"{name}.grad": p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return {**{name: value.detach() for name, value in norm.state_dict().items()}, **grads}


def assert_same_state(one: nn.Module, other: nn.Module, tolerance: float = EXACT) -> None:
    assert state(one).keys() == state(other).keys()
    for name, value in state(one).items():
        assert error(value, state(other)[name]) <= tolerance, name
