"""Norms that a model writes out in torch operations are found in every spelling, and their gains move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import Reason, api
from normfuse.report import Status
from tests.parity import assert_parity


class Written(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm, self.gain, self.shift = norm, nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x) * self.gain + self.shift)


def variance_and_mean(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt()


SPELLINGS = {
    "LayerNorm": [
        lambda x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(((x - x.mean(-1, True)) ** 2).mean(-1, True) + 1e-5),
        lambda x: (x - x.mean(-1, True)) * (x.var(-1, keepdim=True, unbiased=False) + 1e-5) ** -0.5,
        lambda x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-6),
        lambda x: (x - x.mean(-1, True)) * (1 / torch.sqrt(torch.var(x, -1, keepdim=True) + 1e-5)),
        variance_and_mean,
    ],
    "RMSNorm": [
        lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        lambda x: x / (x * x).mean(-1, keepdim=True).sqrt(),
        lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype),
    ],
    "BatchNorm": [lambda x: (x - x.mean((0, 1))) / (x.var((0, 1), unbiased=False) + 1e-5).sqrt()],
}


@pytest.mark.parametrize(("kind", "index"), [(kind, i) for kind, found in SPELLINGS.items() for i in range(len(found))])
def test_written_norm_is_found_and_its_gain_moves(kind: str, index: int):
    model, x = Written(SPELLINGS[kind][index]).double().eval(), torch.randn(4, 5, 6).double()
    result = normfuse.apply(model, api.EXACT_PASSES, example_inputs=x)
    (outcome,) = result.report.norms
    assert (outcome.subject, outcome.layer) == (f":{kind}", f"{kind}, written out")
    assert (outcome.status, outcome.remains) == (Status.APPLIED, True)
    assert bool((result.model.gain == 1).all() and (result.model.shift == 0).all())
    assert_parity(model, result.model, x)


def test_written_statistics_of_the_batch_are_called_so():
    model = nn.Sequential(nn.Linear(6, 6), ByBatch()).eval()
    (outcome,) = normfuse.inspect(model, example_inputs=torch.randn(4, 6)).norms
    assert outcome.refusal
    assert outcome.refusal.reason is Reason.BATCH_STATISTICS


class ByBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()


NOT_NORMS = [
    lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    lambda x: x / x.square().sum(-1, keepdim=True).sqrt(),
    lambda x: x / (x.mean(-1, keepdim=True) + 1e-5),
    lambda x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-5),
    lambda x: x.relu() / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5),
    lambda x: x.sigmoid() * x,
]


@pytest.mark.parametrize("index", range(len(NOT_NORMS)))
def test_other_formulas_are_no_norms(index: int):
    model, x = Written(NOT_NORMS[index]).double().eval(), torch.rand(4, 5, 6).double()
    assert normfuse.inspect(model, api.EXACT_PASSES, example_inputs=x).norms == ()
