"""alpha-BN: normalization by a mixture of stored statistics and those of the present batch.

*Test-time Batch Statistics Calibration for Covariate Shift*, arXiv 2110.04065; with the stored ``mu_hat, var_hat`` and
the batch's ``mu_B, var_B`` over N and the axes of space:

    mu = (1 - w) mu_hat + w mu_B;    var = (1 - w) var_hat + w var_B

w = 0 is eval mode, w = 1 normalization by the batch alone, as in training mode. ``var_B`` is not corrected for the size
of the batch; the public code (``AlphaBatchNorm``), which differs in that, has 0.1 for w. The paper's Core loss is not
part of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from normfuse.statistics import stored
from normfuse.statistics.adapting import AdaptingNorm, enter, moments_of
from normfuse.statistics.moments import ChannelMoments

M = TypeVar("M", bound=nn.Module)


@dataclass
class Mixture:
    """How one norm mixes, and the moments of everything it has seen."""

    weight: float
    seen: ChannelMoments = field(repr=False)


class AlphaNorm(AdaptingNorm):
    """A BatchNorm on mixed statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input``, ``(N, C, *)``, normalized by the mixture."""
        layer, state = cast(Any, self), cast(Mixture, self.adaptation)
        mean, variance = moments_of(input)
        with torch.no_grad():
            tokens = input.numel() // input.shape[1]
            found = (values.detach().double().cpu() for values in (mean, variance * tokens))
            state.seen.merge(tokens, *found)
        w = state.weight
        mean = (1 - w) * layer.running_mean.to(mean.dtype) + w * mean
        variance = (1 - w) * layer.running_var.to(variance.dtype) + w * variance
        return self.normalized(input, mean, variance)

    def fix(self) -> None:
        """Store the mixture with the moments of all batches seen."""
        state = cast(Mixture, self.adaptation)
        if state.seen.count:
            stored.assign(self, stored.mixed(self, state.seen, state.weight))


def alpha_bn(model: M, weight: float = 0.1, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> M:
    """Normalize by a mixture of stored statistics and those of each batch from now on, in place; return the model.

    :func:`normfuse.statistics.freeze` stores the mixture with the pooled statistics of every batch seen since, as each
    norm read them behind norms on mixtures of each batch; then the model can be folded. For a fixed mixture that does
    not depend on how the data was split into batches, use ``reestimate(model, batches, weight=0.1)``.
    :func:`normfuse.statistics.leave` goes back.

    Args:
        model: Any module; the statistics follow the data in eval and in training mode.
        weight: w, of the batch.
        include: Globs of qualified names; only these norms. All, if empty.
        exclude: Globs of qualified names of norms to leave alone.

    Raises:
        OrderError: The model is folded, or has computed weights.
        ValueError: The weight is not from 0 to 1, or no BatchNorm stores statistics.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is from 0 to 1, not {weight}")
    return enter(model, AlphaNorm, lambda norm: Mixture(weight, ChannelMoments(stored.size(norm))), include, exclude)


def batch_statistics(model: M, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> M:
    """Normalize by the statistics of each batch alone from now on: :func:`alpha_bn` with a weight of 1."""
    return alpha_bn(model, 1.0, include=include, exclude=exclude)
