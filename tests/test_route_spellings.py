"""One operation, many spellings: what a map passes under one name it passes under torch's and NumPy's others too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse import api
from normfuse.base import Reason
from normfuse.report import Outcome
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image


class Around(nn.Module):
    """A convolution, a function and a norm; or a norm, the function and a linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, forwards: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = function(torch.zeros(2, 4, 4, 4)).shape
        rank = 4 if forwards else len(shape)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 2](4)
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.function, self.forwards = function, forwards

    def forward(self, x: Tensor) -> Tensor:
        if self.forwards:
            return self.last(self.function(self.norm(x)).movedim(1, -1))
        return self.norm(self.function(self.conv(x))).sigmoid()


def outcome(function: Callable[[Tensor], Tensor], *, forwards: bool, positive: bool = True) -> Outcome:
    model = randomize_norms(Around(function, forwards=forwards).double().eval(), positive=positive)
    inputs = image(2, 4 if forwards else 3, 4, 4)
    result = api.apply(model, api.EXACT_PASSES, example_inputs=inputs)
    assert_parity(model, result.model, inputs)
    assert "cannot be followed" not in str(result.report), str(result.report)
    return result.report.norms[0]


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean, axis": lambda x: x.mean(axis=-1),
    "mean, keepdims": lambda x: x.mean(axis=(2, 3), keepdims=True),
    "torch.mean": lambda x: torch.mean(x, axis=[-1], keepdims=True),
    "torch.mean, input": lambda x: torch.mean(input=x, dim=-1),
    "amax": lambda x: torch.amax(x, axis=-1, keepdims=True),
    "amax of several": lambda x: x.amax(dim=(2, 3)),
    "max along an axis": lambda x: torch.max(x, axis=-1, keepdims=True)[0],
    "values of max": lambda x: x.max(dim=2).values,
    "cat": lambda x: torch.cat(tensors=(x[:, :2], x[:, 2:]), axis=1),
    "concat": lambda x: torch.concat([x[:, :2], x[:, 2:]], axis=-3),
    "concatenate": lambda x: torch.concatenate((x[:, :2], x[:, 2:]), dim=1),
    "hstack": lambda x: torch.hstack((x[:, :2], x[:, 2:])),
    "vstack": lambda x: torch.vstack((x[:1], x[1:])),
    "dstack": lambda x: torch.dstack((x[:, :, :1], x[:, :, 1:])),
    "column_stack": lambda x: torch.column_stack((x[:, :2], x[:, 2:])),
    "permute": lambda x: torch.permute(input=torch.permute(x, dims=(0, 2, 3, 1)), dims=(0, 3, 1, 2)),
    "transpose": lambda x: x.transpose(dim0=2, dim1=3),
    "swapaxes": lambda x: torch.swapaxes(x, axis0=2, axis1=3),
    "moveaxis": lambda x: torch.moveaxis(x, source=2, destination=3),
    "movedim of several": lambda x: x.movedim((2, 3), (3, 2)),
    "mT": lambda x: x.mT,
    "T": lambda x: x.mean((2, 3)).T.T,
    "flip": lambda x: torch.flip(x, dims=(2,)),
    "fliplr": lambda x: torch.fliplr(torch.fliplr(x)),
    "rot90": lambda x: torch.rot90(x, 1, [2, 3]),
    "roll": lambda x: torch.roll(x, shifts=1, dims=2),
    "squeeze": lambda x: torch.squeeze(x[:, :, :1], axis=2),
    "unsqueeze": lambda x: torch.unsqueeze(x, axis=2),
    "split": lambda x: torch.split(x, split_size_or_sections=2, dim=2)[0],
    "chunk": lambda x: torch.chunk(input=x, chunks=2, dim=2)[1],
    "narrow": lambda x: torch.narrow(x, dim=2, start=0, length=2),
    "tile": lambda x: torch.tile(x, dims=(1, 1, 2, 1)),
    "ravel": lambda x: torch.ravel(x).reshape(x.shape),
    "view": lambda x: x.view(size=(2, 4, 2, -1)),
    "flatten": lambda x: torch.flatten(x, start_dim=2),
    "positive": lambda x: +x,
    "multiply": lambda x: torch.multiply(input=x, other=2.0),
    "subtract": lambda x: torch.subtract(input=x, other=2.0),
    "pad by copies": lambda x: F.pad(input=x, pad=(1, 1, 0, 0), mode="replicate"),
    "pad that cuts off": lambda x: F.pad(x, pad=(-1, -1)),
    "average pool": lambda x: F.avg_pool2d(input=x, kernel_size=2),
}


@pytest.mark.parametrize("forwards", [False, True])
@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling_passes(case: str, forwards: bool):
    found = outcome(SPELLINGS[case], forwards=forwards)
    assert found.partners == ("last" if forwards else "conv",), str(found.refusal)


@pytest.mark.parametrize("forwards", [False, True])
@pytest.mark.parametrize("case", ["amax", "max along an axis", "values of max"])
def test_a_negative_scale_passes_no_spelling_of_a_maximum(case: str, forwards: bool):
    refusal = outcome(SPELLINGS[case], forwards=forwards, positive=False).refusal
    assert refusal is not None
    assert "which max" in refusal.detail or "which amax" in refusal.detail
    assert forwards or refusal.reason is Reason.SIGN


def test_the_positions_of_a_maximum_keep_the_norm():
    def both(x: Tensor) -> Tensor:
        values, positions = x.max(dim=3)
        return values + positions

    refusal = outcome(both, forwards=True).refusal
    assert refusal is not None
    assert "the positions of max" in refusal.detail
