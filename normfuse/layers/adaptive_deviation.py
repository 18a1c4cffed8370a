"""Adaptive deviation modulation: a block between a BatchNorm and the deviation that the BatchNorm took away.

For quantized super-resolution, *QuantNAS*, arXiv 2208.14839, as its code (``AdaptiveNormalization``) computes it:

    y = phi(std(skip)) f(BN(x)) + skip,      phi(s) = w s + b,      w = 1.5, b = 0 at first

with the deviation of each sample over its channels and positions (unbiased). The BatchNorm folds into the first layer
of ``f`` or into what makes x; the scale of each sample stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdaptiveDeviation(nn.Module):
    """A residual block with a BatchNorm and a learnt scale per sample (arXiv 2208.14839), over ``(N, C, H, W)``.

    Args:
        num_features: C of the input of ``block``.
        block: f; any module that keeps the shape of the skip.

    Example:
        >>> AdaptiveDeviation(4, nn.Conv2d(4, 4, 1))(torch.randn(2, 4, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
    """

    def __init__(self, num_features: int, block: nn.Module) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features)
        self.block = block
        self.phi = nn.Conv2d(1, 1, 1)
        nn.init.constant_(self.phi.weight, 1.5)
        nn.init.zeros_(self.phi.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return ``phi(std(skip)) f(BN(x)) + skip``; ``skip`` is ``x`` where it is not given."""
        skip = x if skip is None else skip
        scale = self.phi(torch.std(skip, dim=(1, 2, 3), keepdim=True))
        return self.block(self.bn(x)) * scale + skip
