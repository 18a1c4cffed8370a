"""Batch-Channel Normalization: a BatchNorm, then a normalization of groups of channels of each sample.

*Weight Standardization*, arXiv 1903.10520, and *Rethinking Normalization and Elimination Singularity in Neural
Networks*, arXiv 1911.09738, as the authors' code computes it, with P groups:

    u = BN(x);      v = (u - E[u]) / sqrt(Var[u] + eps)   over each sample's group;      y = gamma_p v + beta_p

The gain and the shift are per group. The BatchNorm, or its estimated form for small batches, folds; the rest stays.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.layers.estimated_batch_norm import EstimatedBatchNorm2d


class BatchChannelNorm(nn.Module):
    """Batch-Channel Normalization (arXiv 1903.10520, 1911.09738) over ``(N, C, H, W)``.

    Args:
        num_features: C.
        num_groups: P; it divides C.
        eps: Added to both variances.
        estimate: Normalise by running statistics in training too: an :class:`EstimatedBatchNorm2d` as ``bn``.
        device: Of parameters and buffers.
        dtype: Of the parameters and buffers.

    Raises:
        ValueError: ``num_groups`` does not divide ``num_features``.

    Example:
        >>> BatchChannelNorm(8, num_groups=4)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        *,
        estimate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_features % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide num_features={num_features}")
        self.bn = (EstimatedBatchNorm2d if estimate else nn.BatchNorm2d)(num_features, eps, device=device, dtype=dtype)
        self.channel = ChannelGroupNorm(num_groups, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``x``, of its shape."""
        return self.channel(self.bn(x))


class ChannelGroupNorm(nn.Module):
    """The second stage: a group norm with one gain and one shift per group, ``(1, P, 1)``.

    Args:
        num_groups: P.
        eps: Added to the variance.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        num_groups: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1, num_groups, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, num_groups, 1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``x``, ``(N, C, *)``, of its shape."""
        groups = F.group_norm(x, self.num_groups, eps=self.eps).reshape(x.shape[0], self.num_groups, -1)
        return (groups * self.weight + self.bias).reshape(x.shape)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.num_groups}, eps={self.eps}"
