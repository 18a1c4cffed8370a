"""A small network with a residual stream, and what ``center-norm`` makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import api
from normfuse.base import Reason
from tests.parity import assert_parity, randomize_norms

C = 6
X = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
IDS = torch.tensor([[1, 4, 2, 2], [0, 3, 3, 1]])
PICTURE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
Change = Callable[[Tensor], Tensor]


class Residual(nn.Module):
    """``x + branch(norm(x))`` behind a linear layer, and a last norm; ``between`` changes the stream on its way."""

    def __init__(self, between: Change | None = None, after: Change | None = None, **named: nn.Module) -> None:
        super().__init__()
        self.inp, self.norm1, self.branch = nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, C)
        self.norm2, self.head = nn.LayerNorm(C), nn.Linear(C, 4)
        self.between, self.after = between, after
        for name, module in named.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        x = self.inp(x)
        x = x + F.dropout(self.branch(self.norm1(x).tanh()), 0.5, self.training)
        if self.between is not None:
            x = self.between(x)
        out = self.head(self.norm2(x).tanh())
        return out if self.after is None else (out, self.after(x))


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def noisy(model: nn.Module) -> nn.Module:
    """Return a model in eval mode and float64 in which no parameter is zero, one or the same in all channels."""
    generator = torch.Generator().manual_seed(1)
    randomize_norms(model.double().eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def check(model: nn.Module, inputs: Any, *, norms: int, passes: tuple[str, ...] = ("center-norm",)) -> normfuse.Result:
    """Run the passes, compare, and ask for so many RMSNorms and no LayerNorm."""
    result = api.apply(model, passes, example_inputs=inputs)
    assert_parity(model, result.model, inputs)
    assert sum(isinstance(m, nn.RMSNorm) for m in result.model.modules()) == norms
    assert not any(isinstance(m, nn.LayerNorm) for m in result.model.modules())
    return result


def refusals(model: nn.Module, inputs: Any = X, **options: Any) -> dict[str, normfuse.Refusal]:
    """Return why norms are refused; what is applied beside them stays exact."""
    result = api.apply(model, ["center-norm"], example_inputs=inputs, **options)
    if inputs is not None:
        assert_parity(model, result.model, inputs)
    return {o.subject: o.refusal for o in result.report.norms if o.refusal is not None}


def reasons(model: nn.Module, inputs: Any = X, **options: Any) -> dict[str, Reason]:
    return {name: refusal.reason for name, refusal in refusals(model, inputs, **options).items()}


BOTH = ("norm1", "norm2")


def both(reason: Reason) -> dict[str, Reason]:
    return dict.fromkeys(BOTH, reason)
