"""PowerNorm is the algorithm of its authors' code, step by step, as ``literal_power_norm`` writes it out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.layers import PowerNorm
from normfuse.layers.power_norm import GroupScaling
from tests.layers.literal_power_norm import LiteralPowerNorm
from tests.parity import EXACT, error


def random_norm(channels: int, **options: Any) -> PowerNorm:
    norm = PowerNorm(channels, dtype=torch.float64, **options)
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 4), (2, 2, 3, 2), (9, 1)])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_training_is_the_literal_algorithm(shape: tuple[int, ...], warmup: int, momentum: float) -> None:
    norm = random_norm(shape[-1], warmup_steps=warmup, momentum=momentum, group_scaling=None)
    literal = LiteralPowerNorm(shape[-1], warmup=warmup, momentum=momentum)
    for index in range(16):
        x, grad = torch.randn(2, *shape, dtype=torch.float64)
        x = (x * (1 + index % 4)).requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(grad)
        rows = x.detach().reshape(-1, shape[-1]).tolist()
        y_rows = literal.forward(rows, norm.weight.tolist(), norm.bias.tolist())
        x_grad, weight_grad, bias_grad = literal.backward(grad.reshape(-1, shape[-1]).tolist())
        for name, found, expected in (
            ("y", y, y_rows),
            ("x.grad", x.grad, x_grad),
            ("weight.grad", norm.weight.grad, weight_grad),
            ("bias.grad", norm.bias.grad, bias_grad),
            ("running_second_moment", norm.running_second_moment, literal.phi_hat),
            ("running_gradient_statistic", norm.running_gradient_statistic, literal.Lambda),
        ):
            assert found is not None
            wanted = torch.tensor(expected, dtype=torch.float64).reshape(found.shape)
            assert error(wanted, found.detach()) <= EXACT, f"{name} at step {literal.t}"
    assert norm.step == 16


def literal_scaling(token: list[float], groups: int, eps: float) -> list[float]:
    size = len(token) // groups
    scaled = []
    for start in range(0, len(token), size):
        group = token[start : start + size]
        root = math.sqrt(sum(value**2 for value in group) / size + eps)
        scaled += [value / root for value in group]
    return scaled


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_group_scaling(groups: int, dim: int) -> None:
    tokens = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = torch.tensor(
        [[literal_scaling(token.tolist(), groups, 1e-5) for token in row] for row in tokens], dtype=torch.float64
    )
    found = GroupScaling(groups, dim=dim)(tokens.movedim(-1, dim))
    assert error(expected.movedim(-1, dim), found) <= EXACT
    half = GroupScaling(groups, dim=dim)(tokens.movedim(-1, dim).half())
    assert half.dtype == torch.float16
    assert error(found, half) <= 5e-3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dim", [1, -1])
def test_the_core_follows_the_scaling(training: bool, dim: int) -> None:
    """With group scaling the layer is the layer without it on the scaled input, forward and backward."""
    whole = random_norm(6, group_scaling=2, warmup_steps=3, dim=dim)
    core = PowerNorm(6, group_scaling=None, warmup_steps=3, dim=dim, dtype=torch.float64)
    core.load_state_dict(whole.state_dict())
    scaling = whole.group_scaling
    assert isinstance(scaling, GroupScaling)
    for index in range(7):
        for norm in (whole, core):
            norm.train(training or index < 5)
        x, grad = torch.randn(2, 4, 6, 6, dtype=torch.float64)
        x.requires_grad_()
        expected, found = core(scaling(x)), whole(x)
        assert error(expected.detach(), found.detach()) <= EXACT
        gradients = [torch.autograd.grad(y, x, grad)[0] for y in (expected, found)]
        assert error(*gradients) <= EXACT
    for a, b in zip(whole.buffers(), core.buffers(), strict=True):
        assert torch.equal(a, b)


def test_affine_map_is_that_of_the_core() -> None:
    norm = random_norm(6, group_scaling=3)
    for _ in range(4):
        norm(torch.randn(5, 6, dtype=torch.float64))
    norm.eval()
    x: Tensor = torch.randn(5, 6, dtype=torch.float64)
    a, c = norm.affine_map()
    assert error(a * norm.group_scaling(x) + c, norm(x).detach()) <= EXACT
    assert error(a * x + c, norm(x).detach()) > 0.01


def test_default_arguments() -> None:
    norm = PowerNorm(4)
    assert (norm.eps, norm.momentum, norm.warmup_steps) == (1e-5, 0.9, 10000)
    assert isinstance(norm.group_scaling, GroupScaling)
    assert norm.group_scaling.groups == 1
    assert isinstance(PowerNorm(4, group_scaling=None).group_scaling, nn.Identity)
    assert "groups=1" in repr(norm)


@pytest.mark.parametrize("groups", [0, 3, -1])
def test_groups_that_do_not_divide_the_channels_are_refused(groups: int) -> None:
    with pytest.raises(ValueError, match="does not divide num_features=4"):
        PowerNorm(4, group_scaling=groups)


def test_every_state_is_a_buffer() -> None:
    buffers = {"running_second_moment", "running_gradient_statistic", "step"}
    assert set(PowerNorm(2).state_dict()) == {"weight", "bias", *buffers}
