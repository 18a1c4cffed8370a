"""A network that folds, and ways to make its fold wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from normfuse import api, surgery
from normfuse.report import Verification
from tests.parity import randomize_norms

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def deep(layers: int = 6, channels: int = 16) -> nn.Module:
    """Return convolutions with norms, of as many channels as hide a fault of one of them well."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.SiLU())

    blocks = [block() for _ in range(layers)]
    model = nn.Sequential(nn.Conv2d(3, channels, 1), *blocks, nn.Conv2d(channels, 8, 3, bias=False))
    return randomize_norms(model.double().eval())


def verification(model: nn.Module, x: Any = X, **options: Any) -> Verification:
    found = normfuse.apply(model, api.EXACT_PASSES, example_inputs=x, **options).report.verification
    assert found is not None
    return found


def spoilt(change: Callable[[Tensor], Tensor], at: int | str = 1) -> Callable[..., None]:
    """Return an ``assign`` that changes the weights of one block of :func:`deep` on their way."""
    assign = surgery.assign

    def wrong(module_of: Any, tensors: Any, *args: Any) -> None:
        names = [name for name in tensors if name.endswith(f"{at}.0.weight")]
        assign(module_of, {**tensors, **{name: change(tensors[name].clone()) for name in names}}, *args)

    return wrong


def flipped(tensor: Tensor) -> Tensor:
    """Turn the sign of the largest output channel."""
    channel = int(tensor.flatten(1).abs().amax(1).argmax())
    tensor[channel] = -tensor[channel]
    return tensor
