"""Generalized divisive normalization, in the form that image codecs use.

*Density Modeling of Images using a Generalized Normalization Transformation*, arXiv 1511.06281, with its exponents at
2 and 1/2:

    y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)            inverse:   y_i = x_i sqrt(beta_i + sum_j gamma_ij x_j^2)

at each position, with beta > 0 and gamma >= 0. Nothing of it folds. The sum is taken in float32 or wider.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GDN(nn.Module):
    """GDN (arXiv 1511.06281), or its inverse form, over ``(N, C, *)``.

    Args:
        num_features: C.
        inverse: Multiply instead of dividing.
        beta_min: Least beta; smaller values of the parameter count as this.
        gamma_init: Diagonal of gamma at first; the rest is 0.
        device: Of the parameters ``beta``, ``(C,)``, and ``gamma``, ``(C, C)``.
        dtype: Of the parameters.

    Raises:
        ValueError: ``beta_min`` is not positive.

    Example:
        >>> GDN(4)(torch.randn(2, 4, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        *,
        inverse: bool = False,
        beta_min: float = 1e-6,
        gamma_init: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if beta_min <= 0:
            raise ValueError(f"beta_min is positive, not {beta_min}")
        self.num_features = num_features
        self.inverse = inverse
        self.beta_min = beta_min
        self.beta = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.gamma = nn.Parameter(gamma_init * torch.eye(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``x``, of its shape and dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        rows = wide.flatten(2) if x.dim() > 2 else wide.unsqueeze(2)  # (N, C, P)
        beta, gamma = self.beta.clamp(min=self.beta_min), self.gamma.clamp(min=0)
        total = F.conv1d(rows.square(), gamma.to(wide.dtype).unsqueeze(2), beta.to(wide.dtype)).reshape(x.shape)
        return (wide * (total.sqrt() if self.inverse else total.rsqrt())).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.num_features}, inverse={self.inverse}, beta_min={self.beta_min}"
