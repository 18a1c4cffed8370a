"""L1 norms and folding: an L1BatchNorm leaves like a BatchNorm; an L1 norm of tokens takes maps and gives its gain."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import Reason, api
from normfuse.layers import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d, L1LayerNorm, L1RMSNorm
from tests.parity import assert_parity, randomize_norms

OPTIONS: list[dict[str, Any]] = [{}, {"gaussian": True}, {"affine": False}, {"eps": 0.2, "momentum": None}]
NORMS = {1: L1BatchNorm1d, 2: L1BatchNorm2d, 3: L1BatchNorm3d}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model: nn.Module, *, positive: bool = False) -> nn.Module:
    """Give L1 norms random statistics, gains of both signs and one of zero, and shifts."""
    torch.manual_seed(0)
    randomize_norms(model.double().eval(), positive=positive)
    for i, module in enumerate(model.modules()):
        if type(module).__name__.startswith("L1"):
            with torch.no_grad():
                for k, value in enumerate((*module.parameters(), *module.buffers())):
                    if value.is_floating_point():
                        value.copy_(randn(*value.shape, seed=10 * i + k))
                        value.abs_() if positive or k == 3 else None
                if (weight := getattr(module, "weight", None)) is not None and not positive:
                    weight.view(-1)[1] = 0
                if isinstance(getattr(module, "running_deviation", None), Tensor):
                    module.running_deviation.abs_()  # type: ignore[operator]
    return model


def folded(model: nn.Module, inputs: Tensor, *passes: str) -> nn.Module:
    result = api.apply(model, passes or ("fold-bn",), example_inputs=inputs)
    assert [o.status.name for o in result.report.norms] == ["APPLIED"] * len(result.report.norms)
    assert_parity(model, result.model, inputs)
    assert_parity(model, result.model, randn(*inputs.shape, seed=5))
    return result.model


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("dims", "transpose", "groups"), [*itertools.product([1, 2, 3], ["", "Transpose"], [1, 2])])
def test_into_the_convolution_before(options: dict[str, Any], dims: int, transpose: str, groups: int):
    conv = getattr(nn, f"Conv{transpose}{dims}d")(4, 8, 3, stride=2, padding=1, groups=groups, bias=groups == 1)
    model = randomised(nn.Sequential(conv, NORMS[dims](8, **options)))
    assert isinstance(folded(model, randn(2, 4, *[5] * dims))[1], nn.Identity)  # type: ignore[index]


@pytest.mark.parametrize("options", OPTIONS)
def test_into_what_is_not_adjacent(options: dict[str, Any]):
    """Backwards through a linear layer's dropout, and forwards into two layers through a reshape."""
    model = randomised(nn.Sequential(nn.Linear(5, 6), nn.Dropout(), L1BatchNorm1d(6, **options)))
    folded(model, randn(3, 5))

    class Forwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = L1BatchNorm2d(4, **options)
            self.one, self.two = nn.Conv2d(4, 3, 3), nn.Linear(4 * 25, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return self.one(y), self.two(y.flatten(1))

    folded(randomised(Forwards()), randn(2, 4, 5, 5))


def test_through_an_activation_where_gains_are_positive():
    options = {"positive": True}
    positive = randomised(nn.Sequential(L1BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)), **options)
    with torch.no_grad():
        positive[0].running_mean.zero_()  # type: ignore[index, union-attr, operator]
        positive[0].bias.zero_()  # type: ignore[index, union-attr, operator]
    folded(positive, randn(3, 4))
    mixed = randomised(nn.Sequential(L1BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)))
    with torch.no_grad():
        mixed[0].bias.copy_(mixed[0].affine_map()[0] * mixed[0].running_mean)  # type: ignore[index, union-attr, operator]
    (found,) = normfuse.inspect(mixed, example_inputs=randn(3, 4)).norms
    assert found.refusal
    assert found.refusal.reason in (Reason.SIGN, Reason.OPAQUE_OPERATION)


def test_in_training_mode_it_has_no_fixed_map():
    model = randomised(nn.Sequential(nn.Linear(5, 6), L1BatchNorm1d(6)))
    model[1].train()  # type: ignore[index, union-attr]
    (found,) = normfuse.inspect(model, example_inputs=randn(3, 5)).norms
    assert found.refusal
    assert found.refusal.reason is Reason.BATCH_STATISTICS


TOKEN_NORMS = [
    lambda: L1LayerNorm(4),
    lambda: L1LayerNorm(4, gaussian=True, bias=False),
    lambda: L1RMSNorm(4, eps=0.1),
    lambda: L1RMSNorm(4, bias=True),
]
each = pytest.mark.parametrize("make", TOKEN_NORMS)


@each
def test_gain_leaves_a_norm_of_tokens(make: Any):
    """By the recorded reader and by the tracing one; ``fold`` does it, and the norm is left without parameters."""
    model = randomised(nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 2)))
    inputs = randn(2, 5, 3)
    assert not list(folded(model, inputs, "fold-affine")[1].parameters())  # type: ignore[index]
    assert not list(normfuse.fold(model, example_inputs=inputs)[1].parameters())  # type: ignore[index]
    traced = normfuse.fold(model)
    assert_parity(model, traced, inputs)


@each
def test_gain_of_a_norm_takes_a_map(make: Any):
    """A LayerScale behind the norm goes into its gain."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(randn(4, seed=8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    model = randomised(nn.Sequential(make(), Scale(), nn.GELU()))
    inputs = randn(2, 5, 4)
    result = api.apply(model, ["fold-affine"], example_inputs=inputs)
    assert isinstance(result.model[1], nn.Identity)
    assert_parity(model, result.model, inputs)


def test_norm_read_by_something_else_keeps_its_gain():
    model = randomised(nn.Sequential(L1LayerNorm(4), nn.GELU(), nn.Linear(4, 2)))
    (found,) = normfuse.inspect(model, ["fold-affine"], example_inputs=randn(2, 4)).norms
    assert found.refusal
    assert found.refusal.reason is Reason.OPAQUE_OPERATION


class Louder(L1LayerNorm):
    """Has a forward of its own, so that its gain cannot be told from what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight.sum()  # type: ignore[union-attr]


def test_subclass_with_another_forward_is_left_alone():
    model = randomised(nn.Sequential(Louder(4), nn.Linear(4, 2)))
    result = api.apply(model, ["fold-affine"], example_inputs=randn(2, 4))
    assert not result.report
    assert_parity(model, result.model, randn(2, 4))
