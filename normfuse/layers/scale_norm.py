"""ScaleNorm: every token to one learnt length.

*Transformers without Tears*, arXiv 1910.05895:      y = g x / max(|x|, eps),      g = sqrt(d) at first

It is an RMSNorm with one gain, g / sqrt(d), for all channels; its eps is a least length. The gain can move.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaleNorm(nn.Module):
    """ScaleNorm (arXiv 1910.05895) over the last axis.

    Args:
        num_features: d, of which only the first value of the gain depends.
        eps: Least length that a token is divided by.
        device: Of the parameter ``weight``, g, of no axes.
        dtype: Of the parameter.

    Example:
        >>> ScaleNorm(16)(torch.randn(2, 5, 16)).norm(dim=-1).allclose(torch.tensor(4.0))
        True
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.tensor(num_features**0.5, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled ``x``, ``(*, d)``, of its shape and dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=self.eps)
        return (wide / length).to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.num_features}, eps={self.eps}"
