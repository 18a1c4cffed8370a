"""BatchNorm by the mean absolute deviation: a batch norm without square and root, and as foldable.

*L1-Norm Batch Normalization for Efficient Training of Deep Neural Networks*, arXiv 1802.09769. Per channel, over the
n values of the batch, with f = sqrt(pi/2) or 1 and momentum rho:

    training:   mu = E[x];   s = E[|x - mu|];   y = gamma (x - mu) / (f s + eps) + beta
                mu_hat <- (1 - rho) mu_hat + rho mu;   s_hat <- (1 - rho) s_hat + rho s
    inference:  y = a x + c,   a = gamma / (f s_hat + eps),   c = beta - a mu_hat

Equal in eval mode to a BatchNorm with gain ``gamma_2``, variance ``v`` and its own ``eps_2``, for any s_hat, where

    gamma = gamma_2 (f s_hat + eps) / sqrt(v + eps_2)

and with the same mean and shift. With s_hat measured, training goes on at nearly the same scale; without, a Gaussian is
assumed, ``f s_hat + eps = f sqrt(2/pi) sqrt(v + eps_2)``, so that ``gamma = f sqrt(2/pi) gamma_2``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfuse.layers.affine_inference import AffineInference
from normfuse.layers.mean_deviation import GAUSSIAN_RATIO, Sets, deviation_factor, mean_and_deviation, normalize
from normfuse.layers.wide_statistics import WideStatistics
from normfuse.numerics import exact

if TYPE_CHECKING:
    from typing_extensions import Self


class L1BatchNormBase(AffineInference, WideStatistics, nn.Module):
    """Base of the three classes, which differ in the ranks that they take."""

    ranks: tuple[int, ...]
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_deviation: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        gaussian: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1 or eps <= 0 or not (momentum is None or 0 <= momentum <= 1):
            raise ValueError("give num_features >= 1, eps > 0 and 0 <= momentum <= 1, or None for a cumulative average")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.gaussian = gaussian
        self.dim = 1
        options: Any = {"device": device, "dtype": dtype}
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(num_features, **options)) if affine else None)
        wide = torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32
        for name in ("running_mean", "running_deviation"):
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=wide))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gain 1, shift 0, and the statistics of a new layer."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Set mean 0, deviation 1, and no batch seen."""
        self.running_mean.zero_()
        self.running_deviation.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``; in training mode by its own statistics, which also enter the running ones.

        Args:
            x: ``(N, C, *)``. An empty batch gives an empty output and changes no statistic.

        Returns:
            Shape, dtype and memory format of ``x``.

        Raises:
            ValueError: Another rank or number of channels, or a single value per channel in training mode.
            TypeError: ``x`` is not floating-point.
        """
        self._check(x)
        values = x.numel() // self.num_features
        if self.training and values:
            if values == 1:
                raise ValueError(f"input {tuple(x.shape)} has one value per channel: no deviation to train by")
            return self._train(x)
        a = 1 / (deviation_factor(self.gaussian) * self.running_deviation + self.eps)
        a = a if self.weight is None else a * self.weight
        c = -a * self.running_mean
        c = c if self.bias is None else c + self.bias
        along = self._affine_shape(x)
        return (x.to(a.dtype) * a.reshape(along) + c.reshape(along)).to(x.dtype)

    def _train(self, x: Tensor) -> Tensor:
        axes = tuple(i for i in range(x.dim()) if i != 1)
        sets = Sets(axes, self._affine_shape(x), self.eps, deviation_factor(self.gaussian))
        with torch.no_grad():
            mean, deviation = mean_and_deviation(x, sets)
            self.num_batches_tracked.add_(1)
            rho = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
            for running, batch in ((self.running_mean, mean), (self.running_deviation, deviation)):
                running.add_(rho * (batch.reshape(-1).to(running.dtype) - running))
        return normalize(x, self.weight, self.bias, sets, (mean, deviation))

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes floating-point input, not {x.dtype}")
        if x.dim() not in self.ranks or x.shape[1] != self.num_features:
            ranks = " or ".join(map(str, self.ranks))
            raise ValueError(f"input {tuple(x.shape)} has not rank {ranks} with {self.num_features} channels on axis 1")

    def _affine_shape(self, x: Tensor) -> tuple[int, ...]:
        return (1, self.num_features, *[1] * (x.dim() - 2))

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return ``(a, c)`` of the inference form ``a x + c``, each ``(C,)``, in float64 on the CPU."""
        a = 1 / (deviation_factor(self.gaussian) * exact(self.running_deviation) + self.eps)
        if self.weight is not None:
            a = a * exact(self.weight)
        c = -a * exact(self.running_mean)
        return a, c if self.bias is None else c + exact(self.bias)

    @classmethod
    @torch.no_grad()
    def from_batch_norm(
        cls, bn: nn.Module, deviation: Tensor | None = None, *, gaussian: bool = False, eps: float = 1e-5
    ) -> Self:
        """Return a layer that equals a BatchNorm in eval mode, exactly.

        Args:
            bn: A BatchNorm of the same rank, with running statistics.
            deviation: The mean absolute deviation of each channel, ``(C,)``, measured on data (see
                :func:`normfuse.layers.mean_deviation.channel_deviation`); None assumes Gaussian channels.
            gaussian: As for the class; with it, the gain stays close to that of ``bn``.
            eps: Added to the deviation.

        Raises:
            TypeError: ``bn`` is not a BatchNorm with running statistics.
            ValueError: ``deviation`` is negative or of another shape.
        """
        if not isinstance(bn, nn.modules.batchnorm._BatchNorm) or bn.running_mean is None or bn.running_var is None:
            raise TypeError(f"{type(bn).__name__} is not a BatchNorm with running statistics")
        factor = deviation_factor(gaussian)
        std = (exact(bn.running_var) + bn.eps).sqrt()
        s = (GAUSSIAN_RATIO * std - eps / factor).clamp(min=0) if deviation is None else exact(deviation)
        if s.shape != std.shape or bool((s < 0).any()):
            raise ValueError(f"deviation is of shape {tuple(std.shape)} and not negative")
        options: Any = {"device": bn.running_mean.device, "dtype": bn.running_mean.dtype, "gaussian": gaussian}
        new = cls(bn.num_features, eps, bn.momentum, affine=True, **options)
        gain = (factor * s + eps) / std
        new.weight.copy_(gain if bn.weight is None else gain * exact(bn.weight))  # type: ignore[union-attr]
        if bn.bias is not None:
            new.bias.copy_(bn.bias)  # type: ignore[union-attr]
        new.running_mean.copy_(bn.running_mean)
        new.running_deviation.copy_(s)
        if bn.num_batches_tracked is not None:
            new.num_batches_tracked.copy_(bn.num_batches_tracked)
        return new.train(bn.training)

    def extra_repr(self) -> str:
        """Show the arguments."""
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"
        return f"{text}, gaussian=True" if self.gaussian else text


class L1BatchNorm1d(L1BatchNormBase):
    """L1 BatchNorm (arXiv 1802.09769) over ``(N, C)`` or ``(N, C, L)``.

    Args:
        num_features: C.
        eps: Added to the deviation.
        momentum: Weight of the new value in the running statistics; None averages over all batches.
        affine: Whether there are a gain ``weight`` and a shift ``bias``, ``(C,)``.
        gaussian: Multiply the deviation by sqrt(pi/2), with which it estimates the standard deviation of Gaussian
            values: a network that had BatchNorm then starts close to where it was. By default it is not multiplied.
        device: Of parameters and buffers.
        dtype: Of the parameters; statistics are in float32 or float64.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> L1BatchNorm1d(8)(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    ranks = (2, 3)


class L1BatchNorm2d(L1BatchNormBase):
    """L1 BatchNorm over ``(N, C, H, W)``; arguments as for :class:`L1BatchNorm1d`."""

    ranks = (4,)


class L1BatchNorm3d(L1BatchNormBase):
    """L1 BatchNorm over ``(N, C, D, H, W)``; arguments as for :class:`L1BatchNorm1d`."""

    ranks = (5,)
