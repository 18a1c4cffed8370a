"""Small pre-norm transformers whose norm is a parameter: a ViT for 28x28 pictures, and a GPT-style decoder.

``norm`` makes the norm of a width: ``nn.LayerNorm``, ``UnifiedNorm``, ``OverTokens``, ``nn.Identity``. A block is
``x + proj(attention(norm1(x)))``, then ``x + fc2(gelu(fc1(norm2(x))))``; one norm more stands before the head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MakeNorm = Callable[[int], nn.Module]


class OverTokens(nn.Module):
    """BatchNorm of ``(B, T, C)`` over batch and tokens, in the place of a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view_as(x)


def no_norm(width: int) -> nn.Module:
    """Return nothing in the place of a norm: what folding could reach at best."""
    return nn.Identity()


class Block(nn.Module):
    """Attention and two layers on ``(B, T, width)``; a causal one sees no later token."""

    def __init__(self, width: int, heads: int, norm: MakeNorm, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = norm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the block's output; with ``past``, keys and values ``(B, heads, S, width / heads)`` before ``x``."""
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and past is None)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer on ``(B, 1, 28, 28)``: 10 logits from the class token."""

    def __init__(self, norm: MakeNorm = nn.LayerNorm, width: int = 64, depth: int = 4, patch: int = 7) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList([Block(width, 4, norm, causal=False) for _ in range(depth)])
        self.norm = norm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Decoder(nn.Module):
    """A causal language model on tokens ``(B, T)``: logits ``(B, T, words)`` from an output layer of its own."""

    def __init__(
        self,
        norm: MakeNorm = nn.LayerNorm,
        words: int = 256,
        context: int = 64,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(context, width)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.blocks = nn.ModuleList([Block(width, heads, norm, causal=True) for _ in range(depth)])
        self.norm = norm(width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
