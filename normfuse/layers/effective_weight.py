"""The effective weight of a pair in Tune mode that is not trained, kept for as long as it is right.

Kept are ``a W`` and ``a (b - mean) + beta`` where the weight is smaller than the output (a copy of a larger one would
cost more memory than Tune mode saves: there the output is scaled). Whether they are still right is judged at every
call (:mod:`normfuse.layers.kept`): by the weight's version (raised by every write that autograd sees) and a sample of
its values, and by all values of the vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.layers.kept import Kept, Look, can_keep
from normfuse.layers.products import Product
from normfuse.layers.scaled import Statistics, scaled

_PIECES = 8  # that are looked at of a weight


def effective_weight(
    kept: Kept, weight: Tensor, bias: Tensor | None, norm: Statistics, product: Product, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``a W``, in the layout of the weight, and ``a (b - mean) + beta``, ``(out,)``, both in ``dtype``."""
    keeps = can_keep(weight)
    seen, value = kept.entry
    if keeps and isinstance(seen, _Seen) and value[0].dtype is dtype and seen.again(weight, bias, norm):
        return value
    with torch.inference_mode(False), torch.no_grad():
        scale = norm.scale()
        value = scaled(weight, scale, product).to(dtype), norm.offset(scale, bias).to(dtype)
    if keeps:
        kept.entry = _Seen(weight, bias, norm), value
    return value


class _Seen:
    """What a weight, its bias and the norm behind it looked like."""

    __slots__ = ("eps", "vectors", "version", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, norm: Statistics) -> None:
        self.eps, self.version = norm.eps, weight._version
        self.weight = Look(weight, _PIECES)
        self.vectors = [None if v is None else Look(v) for v in (bias, *norm[:4])]

    def again(self, weight: Tensor, bias: Tensor | None, norm: Statistics) -> bool:
        """Whether all of them look the same now."""
        if norm.eps != self.eps or weight._version != self.version or not self.weight.is_that_of(weight):
            return False
        for seen, vector in zip(self.vectors, (bias, *norm[:4]), strict=True):
            if (seen is None) != (vector is None):
                return False
            if seen is not None and vector is not None and not seen.is_that_of(vector):
                return False
        return True
