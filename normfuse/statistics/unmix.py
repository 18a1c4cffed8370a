"""UnMix-TNS: each sample normalized by a mixture of components, which unmix a stream that is not shuffled.

*Un-Mixing Test-Time Normalization Statistics*, arXiv 2401.08328, with the choices of the authors' code. K components
``mu_k, var_k`` per norm; ``mu~_b, var~_b`` are those of sample b over space; a0 = 1/2, or 0 where K = 1:

    start:   mu_k = mu_hat + sqrt(a0 K / (K - 1) var_hat) xi_k, xi_k ~ N(0, I);    var_k = (1 - a0) var_hat
    p_bk   = softmax_k( cos(mu~_b, mu_k) / 0.07 )                                                  (no gradient)
    m_bk   = (1 - p_bk) mu_k + p_bk mu~_b;    s_bk = (1 - p_bk) var_k + p_bk var~_b
    mu_b   = mean_k m_bk;    var_b = mean_k s_bk + mean_k m_bk^2 - mu_b^2;    y = layer(x by mu_b, var_b)
    update:  mu_k += r mean_b[ p_bk (mu~_b - mu_k) ];    var_k += r mean_b[ p_bk (var~_b - var_k) ]
    r      = 1 - (1 - momentum)^(B / B_max)

A norm whose input has no axes of space keeps its stored statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.layers.second_moment import statistics_dtype
from normfuse.order import ADAPTING
from normfuse.statistics.adapting import AdaptingNorm, enter

M = TypeVar("M", bound=nn.Module)
TEMPERATURE = 0.07
_NOISE = 0.5


@dataclass
class Components:
    """The components of one norm.

    Attributes:
        mean: ``mu_k``, ``(K, C)``.
        variance: ``var_k``, ``(K, C)``.
        momentum: Of the norm, for a batch of ``batch_max``.
        batch_max: B_max.
    """

    mean: Tensor
    variance: Tensor
    momentum: float
    batch_max: int


class UnMixNorm(AdaptingNorm):
    """A BatchNorm on statistics of each sample."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input``, ``(N, C, *)``, each sample normalized by its own mixture."""
        state = cast(Components, self.adaptation)
        if input.dim() < 3:
            return self.by_stored(input)
        space = list(range(2, input.dim()))
        variance, mean = torch.var_mean(input.to(statistics_dtype(input.dtype)), space, correction=0)  # (N, C)
        mean_k, variance_k = state.mean.to(mean.dtype), state.variance.to(mean.dtype)
        with torch.no_grad():
            cosines = F.normalize(mean, dim=1) @ F.normalize(mean_k, dim=1).T
            share = torch.softmax(cosines / TEMPERATURE, 1)[..., None]  # (N, K, 1)
            away = mean[:, None] - mean_k, variance[:, None] - variance_k  # (N, K, C)
        means = mean_k + share * (mean[:, None] - mean_k)
        variances = variance_k + share * (variance[:, None] - variance_k)
        center = means.mean(1)
        spread = variances.mean(1) + means.square().mean(1) - center.square()
        with torch.no_grad():
            rate = 1 - (1 - state.momentum) ** (input.shape[0] / state.batch_max)
            state.mean = (mean_k + rate * (share * away[0]).mean(0)).to(state.mean.dtype)
            state.variance = (variance_k + rate * (share * away[1]).mean(0)).to(state.variance.dtype)
        return self.normalized(input, center, spread)

    def require_fixable(self) -> None:
        """Refuse: each sample has statistics of its own."""
        raise ValueError(
            "UnMix-TNS normalizes each sample by its own statistics, which no fixed map does, so there is nothing to "
            "freeze or fold: normfuse.statistics.leave(model) gives the stored statistics back"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        state = cast(Components, self.adaptation)
        moved = fn(state.mean), fn(state.variance)
        narrow = moved[0].dtype not in (torch.float32, torch.float64)
        state.mean, state.variance = (m.float() if narrow else m for m in moved)
        vars(self)[ADAPTING] = state
        return super()._apply(fn, recurse)


def unmix_tns(
    model: M,
    *,
    components: int = 16,
    batch_max: int = 64,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> M:
    """Normalize each sample by UnMix-TNS from now on, in place, and return the model; works for batches of one.

    The components follow the data in eval and in training mode; the stored statistics, and the keys of the
    ``state_dict``, stay. It cannot be frozen or folded; :func:`normfuse.statistics.leave` goes back.

    Args:
        model: Any module.
        components: K. The authors take 16, and 128 where the stream mixes domains.
        batch_max: B_max, at which a batch has the full momentum of the norm; the authors take 64, and 16 on ImageNet-C.
        seed: Of the noise that sets the components apart.
        include: Globs of qualified names; only these norms. All, if empty.
        exclude: Globs of qualified names of norms to leave alone.

    Raises:
        OrderError: The model is folded, or has computed weights.
        ValueError: ``components`` or ``batch_max`` is less than 1, a norm has no momentum, or none stores statistics.
    """
    if components < 1 or batch_max < 1:
        raise ValueError("give components >= 1 and batch_max >= 1")
    generator = torch.Generator().manual_seed(seed)
    return enter(model, UnMixNorm, lambda norm: start(norm, components, batch_max, generator), include, exclude)


def start(norm: Any, components: int, batch_max: int, generator: torch.Generator) -> Components:
    """Return the components that a norm starts with: together they have its stored statistics, in expectation."""
    momentum = getattr(norm, "momentum", 0.1)  # a frozen norm has none
    if momentum is None:
        raise ValueError("a BatchNorm with momentum=None averages all batches; UnMix-TNS needs a momentum: set one")
    mean, variance = (t.detach().to(statistics_dtype(t.dtype)) for t in (norm.running_mean, norm.running_var))
    share = _NOISE if components > 1 else 0.0
    noise = torch.randn(components, len(mean), generator=generator, dtype=torch.float64).to(mean)
    deviation = (share * components / max(components - 1, 1) * variance).sqrt()
    return Components(mean + deviation * noise, (1 - share) * variance.expand(components, -1), momentum, batch_max)
