"""Normalization by the mean absolute deviation, differentiable, and what is measured for a conversion to it.

For each normalization set S of m values (channels of a token, or tokens of a channel), with f = sqrt(pi/2) or 1:

    mu = E_S[x];   d = x - mu;   s = E_S[|d|];   r = 1 / (f s + eps);   z = r d;   y = gamma z + beta

    g = gamma G:   dx = r [ g - E_S[g] - f E_S[g z] (sgn(d) - E_S[sgn(d)]) ];   dgamma = sum G z;   dbeta = sum G

G is the gradient of y. The gradient is exact for any eps; at d = 0, where |d| has none, sgn(0) = 0 as in torch. Without
centring, d = x, and the terms E_S[g] and E_S[sgn(d)] fall away. For Gaussian x, s = sqrt(2/pi) sigma, so that with
f = sqrt(pi/2) the layer divides by an estimate of the standard deviation. The form is that of *L1-Norm Batch
Normalization for Efficient Training of Deep Neural Networks*, arXiv 1802.09769; the gradient is derived here.

Saved for the backward pass: x itself, gamma, and mu and r, one value each per set; z and sgn(d) are recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfuse.layers.second_moment import statistics_dtype, token_sum
from normfuse.layers.wide_statistics import narrowed

GAUSSIAN_RATIO = math.sqrt(2 / math.pi)
"""Mean absolute deviation over standard deviation of a Gaussian."""


class Sets(NamedTuple):
    """Which values of an input are normalized together, and how.

    Attributes:
        axes: The axes of each set.
        affine: The shape of gamma and beta, broadcast against the input.
        eps: Added to the deviation.
        factor: f, ``sqrt(pi/2)`` or 1.
        centred: Whether the mean is subtracted.
    """

    axes: tuple[int, ...]
    affine: tuple[int, ...]
    eps: float
    factor: float
    centred: bool = True


def deviation_factor(gaussian: bool) -> float:
    """Return f: what the mean absolute deviation is multiplied by before the division."""
    return 1 / GAUSSIAN_RATIO if gaussian else 1.0


def mean_and_deviation(x: Tensor, sets: Sets) -> tuple[Tensor, Tensor]:
    """Return ``mu`` (0 where not centred) and ``s`` of each set, with axes of size 1 in place of ``sets.axes``.

    Both are in float32, or float64 where ``x`` is. ``x`` must not be empty along the sets.
    """
    x = x.to(statistics_dtype(x.dtype))
    if not sets.centred:
        s = x.abs().mean(sets.axes, keepdim=True)
        return torch.zeros_like(s), s
    mean = x.mean(sets.axes, keepdim=True)
    return mean, (x - mean).abs().mean(sets.axes, keepdim=True)


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, sets: Sets, statistics: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return ``gamma z + beta``, of the shape, dtype and memory format of ``x``.

    Args:
        x: The input.
        weight: gamma, or None for 1.
        bias: beta, or None for 0.
        sets: What is normalized together.
        statistics: ``mu`` and ``s`` of :func:`mean_and_deviation`, where they are already there.
    """
    with torch.no_grad():
        mean, s = statistics or mean_and_deviation(x, sets)
        inverse = 1 / (sets.factor * s + sets.eps)
    return _Normalize.apply(x, weight, bias, mean, inverse, sets)  # type: ignore[return-value]


class _Normalize(torch.autograd.Function):
    """y of the module docstring, with its gradient; the backward pass can itself be differentiated."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, sets: Sets
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.sets = sets
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        wide = x.to(mean.dtype)
        y = (wide - mean if sets.centred else wide) * inverse
        if weight is not None:
            y = y * weight.to(y.dtype).reshape(sets.affine)
        if bias is not None:
            y = y + bias.to(y.dtype).reshape(sets.affine)
        return narrowed(y, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, inverse = ctx.saved_tensors
        sets: Sets = ctx.sets
        if torch.is_grad_enabled():  # this pass will be differentiated: mu and r must depend on x
            mean, s = mean_and_deviation(x, sets)
            inverse = 1 / (sets.factor * s + sets.eps)
        grad, d = grads[0].to(mean.dtype), x.to(mean.dtype)
        d = d - mean if sets.centred else d
        weight_grad, bias_grad = None, None
        if weight is not None:
            weight_grad = _sum_to(grad * d * inverse, weight.shape, sets).to(weight.dtype)
        if ctx.bias is not None:
            bias_grad = _sum_to(grad, ctx.bias[0], sets).to(ctx.bias[1])
        g = grad if weight is None else grad * weight.to(grad.dtype).reshape(sets.affine)
        pull = sets.factor * inverse * (g * d).mean(sets.axes, keepdim=True)
        inner = g - pull * d.sign()
        if sets.centred:
            inner = inner - inner.mean(sets.axes, keepdim=True)
        return (inverse * inner).to(x.dtype), weight_grad, bias_grad, None, None, None


def _sum_to(values: Tensor, shape: torch.Size, sets: Sets) -> Tensor:
    """Return the sum of ``values`` over what gamma and beta are broadcast along, in their own shape."""
    return values.sum_to_size(sets.affine).reshape(shape)


def channel_deviation(inputs: Iterable[Tensor], *, dim: int = 1) -> Tensor:
    """Return the mean absolute deviation of each channel, ``(C,)`` in float64: the running deviation of a conversion.

    Args:
        inputs: What the layer would see, batch by batch; each is centred on its own mean, as in training.
        dim: The axis of the channels.

    Raises:
        ValueError: There is no value in ``inputs``.
    """
    found = ChannelDeviation()
    for x in inputs:
        found.add(x, dim)
    if found.count == 0:
        raise ValueError("no inputs to measure the deviation on")
    return found.value()


class ChannelDeviation:
    """The mean absolute and the standard deviation of each channel, batch by batch, each centred on its own mean.

    Attributes:
        count: How many values each channel had.
    """

    def __init__(self) -> None:
        self.count = 0
        self._total = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, dim: int = 1) -> None:
        """Take in a batch with its channels on axis ``dim``."""
        x = x.detach().to(torch.float64)
        axis = dim % x.dim()
        if x.numel():
            d = x - x.mean(tuple(i for i in range(x.dim()) if i != axis), keepdim=True)
            self._total = self._total + token_sum(d.abs(), axis).cpu()
            self._squares = self._squares + token_sum(d.square(), axis).cpu()
            self.count += x.numel() // x.shape[axis]

    def value(self) -> Tensor:
        """Return the mean absolute deviation, ``(C,)`` in float64 on the CPU; there must have been a value."""
        return self._total / self.count

    def ratio(self) -> Tensor:
        """Return it over the standard deviation, ``(C,)``; as for a Gaussian where a channel does not deviate."""
        sigma = (self._squares / self.count).sqrt()
        return torch.where(sigma > 0, self.value() / torch.where(sigma > 0, sigma, 1.0), GAUSSIAN_RATIO)


def deviation_ratio(inputs: Tensor | Iterable[Tensor], axes: int = 1, *, centred: bool = True) -> float:
    """Return kappa, the mean over all tokens of ``s / sigma``: the calibration constant of a conversion.

    About ``sqrt(2/pi)`` for Gaussian tokens, smaller where a token has outliers. A converted layer's error is the
    spread of ``s / sigma`` around it.

    Args:
        inputs: What the layer would see: one tensor, or several.
        axes: How many trailing axes are normalized together.
        centred: False for RMSNorm: ``sigma`` is then the root mean square and ``s`` the mean magnitude.

    Raises:
        ValueError: There is no token with a deviation in ``inputs``.
    """
    total, count = 0.0, 0
    for x in [inputs] if isinstance(inputs, Tensor) else inputs:
        tokens = x.detach().to(torch.float64).flatten(-axes).flatten(0, -2)
        if centred:
            tokens = tokens - tokens.mean(-1, keepdim=True)
        sigma = tokens.square().mean(-1).sqrt()
        ratio = (tokens.abs().mean(-1) / sigma)[sigma > 0]
        total, count = total + float(ratio.sum()), count + ratio.numel()
    if count == 0:
        raise ValueError("no token with a deviation to calibrate on")
    return total / count
