"""Ghost Batch Normalization: a batch norm that trains by the statistics of parts of the batch.

*Train longer, generalize better*, arXiv 1705.08741. The batch is split along N into ghosts, each is normalised by its
own statistics, and the running ones take the ghosts one after the other:

    training:   for each ghost l:   mu_l = E[x],  v_l = E[(x - mu_l)^2],   y = gamma (x - mu_l) / sqrt(v_l + eps) + beta
                mu_hat <- (1 - rho) mu_hat + rho mu_l;   v_hat <- (1 - rho) v_hat + rho v_l n / (n - 1)
    inference:  y = a x + c,   as BatchNorm

In what order the paper's code lets the ghosts into the running statistics is not known: theirs here is the order of the
batch, a reconstruction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normfuse import numerics
from normfuse.layers.affine_inference import AffineInference


class _GhostBatchNorm(AffineInference, _BatchNorm):
    """Base of the three classes, which differ in the ranks that they take."""

    dim = 1

    def __init__(self, num_features: int, ghost_size: int, **options: Any) -> None:
        if ghost_size < 1:
            raise ValueError(f"ghost_size is at least 1, not {ghost_size}")
        super().__init__(num_features, **options)
        if self.running_mean is None:
            raise ValueError(f"{type(self).__name__} keeps running statistics: leave out track_running_stats=False")
        self.ghost_size = ghost_size

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, ``(N, C, *)``; in training mode ghost by ghost.

        There are ``ceil(N / ghost_size)`` ghosts, of equal size or one sample apart.

        Raises:
            ValueError: Another rank, or one value per channel in a ghost in training mode.
        """
        self._check_input_dim(input)
        if not self.training:
            return self._normalize(input)
        parts = max(-(-input.shape[0] // self.ghost_size), 1)
        return torch.cat([self._normalize(ghost) for ghost in input.tensor_split(parts)])

    def _normalize(self, ghost: Tensor) -> Tensor:
        rho = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            rho = 1 / float(self.num_batches_tracked) if rho is None else rho
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(ghost, *statistics, self.weight, self.bias, self.training, rho or 0.0, self.eps)

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return ``(a, c)`` of the inference form ``a x + c``, each ``(C,)``, in float64 on the CPU."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return numerics.norm_affine(self.running_mean, self.running_var, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """Ghost BatchNorm (arXiv 1705.08741) over ``(N, C)`` or ``(N, C, L)``; in eval mode a BatchNorm, and folds.

    Args:
        num_features: C.
        ghost_size: Samples of one ghost.
        options: As for ``torch.nn.BatchNorm1d``; a momentum of None averages over all ghosts.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> GhostBatchNorm1d(8, ghost_size=4)(torch.randn(16, 8)).shape
        torch.Size([16, 8])
    """


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """Ghost BatchNorm over ``(N, C, H, W)``; arguments as for :class:`GhostBatchNorm1d`."""


class GhostBatchNorm3d(_GhostBatchNorm, nn.BatchNorm3d):
    """Ghost BatchNorm over ``(N, C, D, H, W)``; arguments as for :class:`GhostBatchNorm1d`."""
