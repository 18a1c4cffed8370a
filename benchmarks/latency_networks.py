"""The networks whose latency ``unified_latency.py`` measures, each with several norms, random but the same otherwise.

A decoding step reads one token and the keys and values of those before it, which are kept in one tensor per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pre_norm import Decoder, MakeNorm, no_norm
from torch import Tensor, nn

import normfuse
from normfuse.layers import UnifiedNorm

LIMIT = "norm removed"
PAST, WORDS, WIDTH, DEPTH, HEADS = 128, 1000, 256, 8, 8


class WrittenRMSNorm(nn.Module):
    """RMSNorm as the models of transformers write it: float32 inside, its operations one by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


ORIGINALS: dict[str, MakeNorm] = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": lambda width: nn.RMSNorm(width, eps=1e-6),
    "RMSNorm, written out": WrittenRMSNorm,
}


class OneToken(nn.Module):
    """A step of decoding: the logits of one token behind ``PAST`` others."""

    def __init__(self, norm: MakeNorm) -> None:
        super().__init__()
        self.decoder = Decoder(norm, WORDS, PAST + 1, WIDTH, DEPTH, HEADS)

    def forward(self, token: Tensor, past: Tensor) -> Tensor:
        """Return logits ``(B, 1, WORDS)`` for a token ``(B, 1)`` and the past ``(DEPTH, 2, B, heads, PAST, size)``."""
        decoder = self.decoder
        x = decoder.words(token) + decoder.places.weight[PAST]
        for block, kept in zip(decoder.blocks, past.unbind(0), strict=True):
            x = block(x, kept.unbind(0))
        return decoder.head(decoder.norm(x))


@dataclass(frozen=True)
class Case:
    """A network and a batch; ``calls`` of it take milliseconds."""

    name: str
    build: Callable[[MakeNorm], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    originals: tuple[str, ...]
    calls: int = 1


def variants(case: Case) -> dict[str, nn.Module]:
    """Return the network with every norm, folded, and without norms."""
    made = {name: _built(case, ORIGINALS[name]) for name in case.originals}
    unified = _randomized(_built(case, UnifiedNorm))
    folded = normfuse.fold(unified, example_inputs=case.inputs())
    return {**made, "UnifiedNorm": unified, "folded": folded, LIMIT: _built(case, no_norm)}


def _built(case: Case, norm: MakeNorm) -> nn.Module:
    torch.manual_seed(0)
    return case.build(norm).eval().requires_grad_(False)


@torch.no_grad()
def _randomized(model: nn.Module) -> nn.Module:
    """Give every UnifiedNorm statistics, gain and shift that do something."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, UnifiedNorm):
            for tensor in (module.running_second_moment, module.weight):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
    return model


def _vit(norm: MakeNorm) -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", norm_layer=_of_width(norm))


def _of_width(norm: MakeNorm) -> Callable[..., nn.Module]:
    """Return a maker of norms that takes the other arguments of timm, and drops them."""
    return lambda width, **_: norm(width)


def _picture_batch(count: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(2)),)


def _token_batch(count: int) -> Callable[[], tuple[Tensor, ...]]:
    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(2)
        token = torch.randint(0, WORDS, (count, 1), generator=generator)
        return token, torch.randn(DEPTH, 2, count, HEADS, PAST, WIDTH // HEADS, generator=generator)

    return inputs


CASES = {
    case.name: case
    for case in (
        Case("decode-1", OneToken, _token_batch(1), tuple(ORIGINALS), calls=4),
        Case("decode-16", OneToken, _token_batch(16), tuple(ORIGINALS)),
        Case("vit-1", _vit, _picture_batch(1), ("LayerNorm",)),
        Case("vit-8", _vit, _picture_batch(8), ("LayerNorm",)),
        Case("vit-64", _vit, _picture_batch(64), ("LayerNorm",)),
    )
}
