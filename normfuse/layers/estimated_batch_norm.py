"""Estimated BatchNorm: normalises by running statistics in training too, for batches that are too small for their own.

*Rethinking Normalization and Elimination Singularity in Neural Networks*, arXiv 1911.09738, with the updates of the
authors' code. With speed s, statistics over N and the positions, and the old mean in the second line:

    training:   mu_hat <- (1 - s) mu_hat + s E[x];   v_hat <- (1 - s) v_hat + s E[(x - mu_hat_old)^2]
    always:     y = gamma (x - mu_hat) / sqrt(v_hat + eps) + beta  =  a x + c

No gradient flows through the statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normfuse import numerics
from normfuse.layers.affine_inference import AffineInference


class _EstimatedBatchNorm(AffineInference, _BatchNorm):
    """Base of the three classes, which differ in the ranks that they take."""

    dim = 1
    estbn_moving_speed: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, *, speed: float = 0.0, **options: Any) -> None:
        if not 0 <= speed <= 1:
            raise ValueError(f"speed is from 0 to 1, not {speed}")
        super().__init__(num_features, eps, **options)
        if self.running_mean is None:
            raise ValueError(f"{type(self).__name__} keeps running statistics: leave out track_running_stats=False")
        self.register_buffer("estbn_moving_speed", torch.full((1,), speed, device=self.running_mean.device))

    @property
    def speed(self) -> float:
        """The weight s of the new value in the running statistics; a schedule sets it."""
        return float(self.estbn_moving_speed)

    @speed.setter
    def speed(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"speed is from 0 to 1, not {value}")
        self.estbn_moving_speed.fill_(value)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, ``(N, C, *)``, by the running statistics; in training mode, after it entered them.

        Raises:
            ValueError: Another rank.
        """
        self._check_input_dim(input)
        if self.training:
            self._update(input)
        along = (1, -1, *[1] * (input.dim() - 2))
        mean, var = self._statistics()
        wide = torch.float64 if torch.float64 in (input.dtype, var.dtype) else torch.float32
        scale = torch.rsqrt(var.to(wide) + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean.to(wide) * scale
        shift = shift if self.bias is None else shift + self.bias
        return (input.to(wide) * scale.reshape(along) + shift.reshape(along)).to(input.dtype)

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        mean, var = self._statistics()
        speed = self.estbn_moving_speed.to(mean.dtype)
        rows = x.to(mean.dtype).transpose(0, 1).flatten(1)
        square = (rows - mean[:, None]).square().mean(1)
        mean.add_(speed * (rows.mean(1) - mean))
        var.add_(speed * (square - var))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return ``(a, c)`` of the inference form ``a x + c``, each ``(C,)``, in float64 on the CPU."""
        return numerics.norm_affine(*self._statistics(), self.weight, self.bias, self.eps)


class EstimatedBatchNorm1d(_EstimatedBatchNorm, nn.BatchNorm1d):
    """Estimated BatchNorm (arXiv 1911.09738) over ``(N, C)`` or ``(N, C, L)``; folds as BatchNorm does.

    The names of its tensors are those of the authors' ``EstBN``; the speed is the buffer ``estbn_moving_speed``.

    Args:
        num_features: C.
        eps: Added to the variance.
        speed: Weight s of the new value; 0, at which nothing moves, until a schedule sets :attr:`speed`.
        options: ``affine``, ``device`` and ``dtype``, as for ``torch.nn.BatchNorm1d``.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> EstimatedBatchNorm1d(8, speed=0.1)(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """


class EstimatedBatchNorm2d(_EstimatedBatchNorm, nn.BatchNorm2d):
    """Estimated BatchNorm over ``(N, C, H, W)``; arguments as for :class:`EstimatedBatchNorm1d`."""


class EstimatedBatchNorm3d(_EstimatedBatchNorm, nn.BatchNorm3d):
    """Estimated BatchNorm over ``(N, C, D, H, W)``; arguments as for :class:`EstimatedBatchNorm1d`."""
