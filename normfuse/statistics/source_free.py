"""Statistics that move to a new domain with a momentum that decays, and gains and shifts held near where they were.

A *reconstruction* of *Adapting Off-the-Shelf Source Segmenter for Target Medical Image Segmentation*, arXiv 2106.12497:
the idea is the paper's, the equations are not confirmed. With k = 0, 1, ... the batches of the target domain:

    eta_k  = eta_0 exp(-d k)
    mu_hat <- (1 - eta_k) mu_B + eta_k mu_hat;    var_hat <- (1 - eta_k) var_B + eta_k var_hat
    y      = gamma (x - mu_hat) / sqrt(var_hat + eps) + beta               (by the updated statistics)

    d_c     = | mu_0 / sigma_0 - mu_B / sigma_B |,   sigma = sqrt(var + eps),   mu_0, var_0 from before
    w_c     = C (1 + d_c)^-1 / sum over c of the same                      (how well a channel transfers)
    penalty = sum over norms of  mean_c w_c ( |gamma_c - gamma_0c| + |beta_c - beta_0c| )
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from normfuse.statistics.adapting import AdaptingNorm, adapting, enter, freeze, moments_of


@dataclass
class Decay:
    """The state of one norm: the schedule, and what it started from."""

    initial: float
    decay: float
    mean: Tensor
    variance: Tensor
    affine: dict[str, Tensor]
    step: int = 0
    transfer: Tensor | None = None


class DecayingNorm(AdaptingNorm):
    """A BatchNorm whose stored statistics move to those of the batches, faster and faster."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input``, ``(N, C, *)``, normalized by the statistics that this batch updates."""
        layer, state = cast(Any, self), cast(Decay, self.adaptation)
        mean, variance = moments_of(input)
        eta = state.initial * math.exp(-state.decay * state.step)
        state.step += 1
        state.transfer = transferability(state.mean, state.variance, mean.detach(), variance.detach(), layer.eps)
        mean = (1 - eta) * mean + eta * layer.running_mean.to(mean.dtype)
        variance = (1 - eta) * variance + eta * layer.running_var.to(variance.dtype)
        output = self.normalized(input, mean, variance)
        with torch.no_grad():
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
        return output


class SourceFree:
    """Moves the statistics of a model to a new domain while it is called on batches of it; in place.

    Args:
        model: Any module with BatchNorms.
        initial: eta_0, the weight of the old statistics in the first batch.
        decay: d.
        include: Globs of qualified names; only these norms. All, if empty.
        exclude: Globs of qualified names of norms to leave alone.

    Raises:
        OrderError: The model is folded, or has computed weights.
        ValueError: An argument is out of range, or no BatchNorm stores statistics.

    Example:
        >>> moving = SourceFree(model)  # doctest: +SKIP
        >>> for images in batches:  # doctest: +SKIP
        ...     loss = entropy(model(images)).mean() + moving.penalty()
        >>> model = moving.finish()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        initial: float = 0.9,
        decay: float = 1.0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        if not 0 <= initial <= 1 or decay < 0:
            raise ValueError("give initial from 0 to 1 and decay >= 0")
        self.model = model
        enter(model, DecayingNorm, lambda norm: _state(norm, initial, decay), include, exclude)

    def penalty(self) -> Tensor:
        """Return how far gains and shifts are from where they were, weighted by channel; a scalar.

        Raises:
            ValueError: No batch has run.
        """
        terms = []
        for norm in adapting(self.model).values():
            state = norm.adaptation
            if isinstance(state, Decay) and state.transfer is not None:
                for key, old in state.affine.items():
                    terms.append((state.transfer.to(old.dtype) * (getattr(norm, key) - old).abs()).mean())
        if not terms:
            raise ValueError("no batch has run yet")
        return torch.stack(terms).sum()

    def finish(self) -> nn.Module:
        """Return the model with plain BatchNorms, on the statistics as they are now."""
        return freeze(self.model)


def transferability(mean: Tensor, variance: Tensor, new_mean: Tensor, new_variance: Tensor, eps: float) -> Tensor:
    """Return ``w_c`` of each channel, ``(C,)``, with a mean of 1; all arguments but ``eps`` are ``(C,)``."""
    dtype = new_mean.dtype
    old = mean.to(dtype) * torch.rsqrt(variance.to(dtype) + eps)
    inverse = 1 / (1 + (old - new_mean * torch.rsqrt(new_variance + eps)).abs())
    return inverse * len(inverse) / inverse.sum()


def _state(norm: Any, initial: float, decay: float) -> Decay:
    affine = {key: p.detach().clone() for key in ("weight", "bias") if (p := getattr(norm, key, None)) is not None}
    return Decay(initial, decay, norm.running_mean.clone(), norm.running_var.clone(), affine)
