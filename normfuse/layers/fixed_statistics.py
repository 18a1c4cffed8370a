"""What a norm in inference computes by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normfuse.layers.kept import Kept, kept_distance, kept_rstd


class Statistics(NamedTuple):
    """What a norm computes by in inference; every vector is ``(C,)``.

    Attributes:
        gain: ``gamma``, or None for 1.
        shift: ``beta``, or None for 0.
        mean: ``mean``.
        var: ``var``.
        eps: ``eps``.
        kept: Where ``r`` is kept from call to call; None to compute it, as tracers need.
    """

    gain: Tensor | None
    shift: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    kept: Kept | None = None

    def rstd(self) -> Tensor:
        """Return ``r = 1 / sqrt(var + eps)``."""
        return torch.rsqrt(self.var + self.eps) if self.kept is None else kept_rstd(self.kept, self.var, self.eps)

    def scale(self) -> Tensor:
        """Return ``a = gamma r``."""
        return self.rstd() if self.gain is None else self.rstd() * self.gain

    def offset(self, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``a (b - mean) + beta``."""
        if self.shift is None:
            return scale * self.centre(bias)
        if bias is None:
            return torch.addcmul(self.shift, scale, self.mean, value=-1)
        return torch.addcmul(self.shift, scale, bias - self.mean)

    def centre(self, bias: Tensor | None) -> Tensor:
        """Return ``b - mean``."""
        return -self.mean if bias is None else bias - self.mean

    def distance(self, bias: Tensor | None) -> float:
        """Return by how many deviations a mean is away from the bias, at most, of a norm that is not on a CPU."""
        return kept_distance(self.kept or Kept(), self.mean, self.var, self.eps, bias)
