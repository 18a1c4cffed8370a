"""Rows of int8 that are hard for an integer norm, and layers whose gains hide nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfuse.layers import L1LayerNorm

SIZES = [1, 2, 7, 32, 63, 65, 768, 1000]


def hard_rows(size: int, seed: int = 0) -> Tensor:
    """Return int8 ``(34, size)``: extremes of the type, constant rows, outliers, steps, and noise of every size."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(16, size, generator=generator) * 2.0 ** (torch.arange(16).unsqueeze(1) / 2 - 1)
    rows = [*(noise + torch.randint(-40, 41, (16, 1), generator=generator)).round().clamp(-128, 127)]
    rows += [*torch.randint(-128, 128, (6, size), generator=generator)]
    for base, other in [(0, 1), (0, 127), (127, -128), (-128, -127), (-128, 127), (5, 4)]:
        one_off = torch.full((size,), base)
        one_off[size // 3] = other
        rows.append(one_off)
    rows += [torch.full((size,), value) for value in (127, -128, 0, -1)]
    halves = torch.full((size,), 127)
    halves[size // 2 :] = -128
    rows += [halves, 127 - 255 * (torch.arange(size) % 2)]
    return torch.stack(rows).to(torch.int8)


def layer(
    size: int | tuple[int, ...], *, kind: Any = L1LayerNorm, seed: int = 0, spread: float = 0.5, **options: bool
) -> Any:
    """Return a layer in float64 with gains of both signs, one of them 0, and shifts."""
    norm = kind(size, bias=True, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, centre in ((norm.weight, 1.0), (norm.bias, 0.0)):
            if parameter is not None:
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
                parameter.copy_(centre + spread * noise)
        if norm.weight is not None:
            norm.weight.view(-1)[::3] *= -1
            norm.weight.view(-1)[4:5] = 0
    return norm
