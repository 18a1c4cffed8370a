"""QKNorm: attention by cosines.

*Query-Key Normalization for Transformers*, arXiv 2010.04245:

    A = softmax(g q k^T / (|q| |k|)),      g = log2(L^2 - L) at first

with lengths along the axis of a head, one learnt g per attention layer instead of 1/sqrt(d), and L the 97.5th
percentile of the lengths of the training sequences. A scale of q or k cancels; g is the scale of the attention.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QKNorm(nn.Module):
    """The normalized queries, scaled, and the normalized keys (arXiv 2010.04245); their products are the logits.

    Args:
        length: L, at least 2.
        eps: Least length that a vector is divided by.
        device: Of the parameter ``weight``, g, of no axes.
        dtype: Of the parameter.

    Raises:
        ValueError: ``length`` is less than 2.

    Example:
        >>> norm = QKNorm(length=32)
        >>> q, k = norm(torch.randn(2, 4, 10, 8), torch.randn(2, 4, 10, 8))
        >>> y = F.scaled_dot_product_attention(q, k, torch.randn(2, 4, 10, 8), scale=1.0)
    """

    def __init__(
        self,
        length: float,
        *,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if length < 2:
            raise ValueError(f"length is at least 2, not {length}")
        self.eps = eps
        self.weight = nn.Parameter(torch.tensor(math.log2(length * length - length), device=device, dtype=dtype))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(g q / |q|, k / |k|)``, each of its own shape ``(*, d)``."""
        return F.normalize(q, dim=-1, eps=self.eps) * self.weight, F.normalize(k, dim=-1, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the argument."""
        return f"eps={self.eps}"
