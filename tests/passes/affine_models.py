"""Small models whose gains are negative, zero and positive, and what ``fold-affine`` makes of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from normfuse.report import Outcome, Status

IMAGE = torch.linspace(-2, 3, 2 * 4 * 8 * 8, dtype=torch.float64).reshape(2, 4, 8, 8).sin()
TOKENS = torch.linspace(-2, 3, 2 * 5 * 4, dtype=torch.float64).reshape(2, 5, 4).sin()


def randomised(model: nn.Module) -> nn.Module:
    """Double precision, eval mode; the gains are negative, zero and positive."""
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            parameter.copy_(torch.randn_like(parameter))
            if name.endswith("weight") and parameter.dim() == 1:
                parameter[0] = 0
    return model.eval()


def folded(model: nn.Module, x: Tensor | None) -> normfuse.Result:
    return normfuse.apply(model, ["fold-affine"], example_inputs=x)


def assert_same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(b(x), a(x), rtol=1e-10, atol=1e-10)


def outcome(result: normfuse.Result, subject: str) -> Outcome:
    (found,) = [o for o in result.report.outcomes if o.subject == subject]
    return found


def check(model: nn.Module, x: Tensor, *subjects: str) -> nn.Module:
    """Fold a model and compare; exactly ``subjects`` must have been folded."""
    model = randomised(model)
    given = copy.deepcopy(model.state_dict())
    result = folded(model, x)
    assert_same(model, result.model, x)
    assert {o.subject for o in result.report.applied} == set(subjects)
    assert all(torch.equal(value, given[key]) for key, value in model.state_dict().items())
    return result.model


def refusal(model: nn.Module, x: Tensor | None, subject: str = "0") -> normfuse.Refusal:
    model = randomised(model)
    result = folded(model, x)
    if x is not None:
        assert_same(model, result.model, x)
    found = outcome(result, subject)
    assert found.status is Status.REFUSED
    assert found.refusal is not None
    return found.refusal


class Calls(nn.Module):
    """A model whose ``forward`` is a function of its children, which are the keyword arguments."""

    def __init__(self, function: Any, **children: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Scale(nn.Module):
    def __init__(self, size: int, inplace: bool = False, shape: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(size))
        self.inplace, self.shape = inplace, shape

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.reshape(self.shape)
        return x.mul_(gamma) if self.inplace else x * gamma
