"""RMSNorm as its authors wrote it: eps outside of the root, and the root mean square of only the first channels.

*Root Mean Square Layer Normalization*, arXiv 1910.07467, with the defaults of the authors' code. For a token of d
channels and k = floor(p d), or k = d without p:

    y = gamma x / (rms + eps) + beta,      rms = sqrt(E[x_i^2], i = 1 .. k)

``torch.nn.RMSNorm`` and ONNX have eps inside of the root.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PartialRMSNorm(nn.Module):
    """RMSNorm and pRMSNorm (arXiv 1910.07467) over the last axis, with eps outside of the root.

    The gain and shift are called ``weight`` and ``bias``; in the authors' code they are ``scale`` and ``offset``.

    Args:
        num_features: d.
        p: Part of the channels that the root mean square is of, the first ones; None for all.
        eps: Added to the root mean square.
        bias: Whether there is a shift.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: ``p`` is not from 0 to 1 or leaves no channel.

    Example:
        >>> PartialRMSNorm(8, p=0.25)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        p: float | None = None,
        *,
        eps: float = 1e-8,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if p is not None and not (0 < p <= 1 and int(num_features * p) > 0):
            raise ValueError(f"p={p} is not from 0 to 1, or leaves no channel of {num_features}")
        self.num_features = num_features
        self.p = p
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        shift = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``x``, ``(*, d)``, of its shape and dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        leading = wide if self.p is None else wide[..., : int(self.num_features * self.p)]
        normed = wide / (leading.square().mean(-1, keepdim=True).sqrt() + self.eps)
        y = normed.to(x.dtype) * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.num_features}, p={self.p}, eps={self.eps}, bias={self.bias is not None}"
