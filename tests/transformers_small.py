"""Small transformers of the kinds whose norms are swapped and folded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm block on ``(B, T, width)``; a decoder's sees no later token."""

    def __init__(self, width: int, heads: int = 2, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A pre-norm vision transformer on ``(B, 1, 8, 8)``, 4 classes."""

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Decoder(nn.Module):
    """A GPT-style decoder on tokens ``(B, T)`` of 20 words, with an output layer of its own."""

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(20, width)
        self.places = nn.Embedding(12, width)
        self.blocks = nn.Sequential(*[Block(width, causal=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 20, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        return self.head(self.norm(self.blocks(x)))


def images(count: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def words(count: int = 8, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(0, 20, (count, length), generator=torch.Generator().manual_seed(seed))


def built(kind: type[nn.Module], seed: int = 0, **arguments: int) -> nn.Module:
    """Return a network with random weights that depend on the seed alone, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**arguments).eval()
