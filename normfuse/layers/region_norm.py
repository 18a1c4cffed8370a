"""Region Normalization: batch statistics of the regions of a mask, for inpainting.

*Region Normalization for Image Inpainting*, arXiv 1911.10375, as the authors' code computes it. For a mask M of ones
and zeros, ``(N, 1, H, W)``, and each region R of the two, with f its part of all positions:

    fill x outside of R with the mean of the channel within R;   r_R = f^(1/2) (x - E[x]) / sqrt(Var[x] + eps)
    x_hat = r_1 + r_0                          (mean and variance over the batch and all positions, in eval mode too)

    with a given mask:    y = M (1 + gamma_1) x_hat + beta_1 + (1 - M) (1 + gamma_0) x_hat + beta_0
    with a learnt mask:   s = sigmoid(conv(mean_c x, max_c x)),   M = (s >= t),   y = x_hat (1 + gamma(s)) + beta(s)

What it returns for a sample depends on the other samples of the batch, at inference too. Nothing of it folds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalize_regions(x: Tensor, mask: Tensor, eps: float = 1e-5) -> Tensor:
    """Return ``x_hat``, of the shape of ``x``, ``(N, C, H, W)``, for a mask ``(N, 1, H, W)`` of ones and zeros."""
    return _normalize_region(x, mask, eps) + _normalize_region(x, 1 - mask, eps)


def _normalize_region(x: Tensor, mask: Tensor, eps: float) -> Tensor:
    size = mask.sum()
    size = torch.where(size == 0, torch.ones_like(size), size)
    mean = (x * mask).sum((0, 2, 3), keepdim=True) / size
    filled = x * mask + (1 - mask) * mean
    normed = F.batch_norm(filled, None, None, training=True, eps=eps)
    return normed * (size / mask.numel()).sqrt()


class RegionNorm(nn.Module):
    """Region Normalization (arXiv 1911.10375) by a given mask, with a gain and a shift for each of its two regions.

    The mask is resized to the input by nearest neighbours.

    Args:
        num_features: C.
        eps: Added to the variance.
        device: Of the parameters, ``(C,)`` each.
        dtype: Of the parameters.

    Example:
        >>> mask = (torch.rand(2, 1, 8, 8) > 0.5).float()
        >>> RegionNorm(4)(torch.randn(2, 4, 8, 8), mask).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        zeros = torch.zeros(4, num_features, device=device, dtype=dtype)
        self.foreground_gamma, self.foreground_beta = nn.Parameter(zeros[0].clone()), nn.Parameter(zeros[1].clone())
        self.background_gamma, self.background_beta = nn.Parameter(zeros[2].clone()), nn.Parameter(zeros[3].clone())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the normalized ``x``, ``(N, C, H, W)``, for a mask ``(N, 1, *)`` that is 1 in the foreground."""
        mask = F.interpolate(mask.to(x.dtype), size=x.shape[2:], mode="nearest").detach()
        normed = normalize_regions(x, mask, self.eps)
        gains, shifts = ((self.foreground_gamma, self.background_gamma), (self.foreground_beta, self.background_beta))
        masked = (normed * mask, normed * (1 - mask))
        y = [part * (1 + _along(g)) + _along(b) for part, g, b in zip(masked, gains, shifts, strict=True)]
        return y[0] + y[1]

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.foreground_gamma.numel()}, eps={self.eps}"


def _along(values: Tensor) -> Tensor:
    return values[None, :, None, None]


class LearnedRegionNorm(nn.Module):
    """Region Normalization (arXiv 1911.10375) by a mask, gain and shift that it makes of its input.

    Args:
        kernel_size: 3 or 7, of its convolutions.
        threshold: From which value on the map counts as foreground.
        eps: Added to the variance.

    Raises:
        ValueError: Another kernel size.

    Example:
        >>> LearnedRegionNorm()(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, kernel_size: int = 7, threshold: float = 0.8, eps: float = 1e-5) -> None:
        super().__init__()
        if kernel_size not in (3, 7):
            raise ValueError(f"kernel_size is 3 or 7, not {kernel_size}")
        self.threshold = threshold
        self.eps = eps
        self.map = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.gamma = nn.Conv2d(1, 1, kernel_size, padding=kernel_size // 2)
        self.beta = nn.Conv2d(1, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``x``, ``(N, C, H, W)``, of its shape."""
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        s = torch.sigmoid(self.map(seen))
        mask = (s.detach() >= self.threshold).to(x.dtype)
        return normalize_regions(x, mask, self.eps) * (1 + self.gamma(s)) + self.beta(s)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"threshold={self.threshold}, eps={self.eps}"
