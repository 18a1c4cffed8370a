"""The vectors by which a pair in Tune mode that is not trained scales and shifts, kept for as long as they are right.

Kept are ``a`` and ``a (b - mean) + beta``. Whether they are still right is judged at every call by all values of the
vectors that they were made from (:mod:`normfuse.layers.kept`).

``a W`` is not kept: to know that it is right one would have to read the whole weight, and then it is as cheap to make
it again, in memory that is in the caches, as to have the product read a copy that is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.layers.fixed_statistics import Statistics
from normfuse.layers.kept import Kept, Look, can_keep

WORTH = 4
"""How many times as large as a weight its output must be for autograd to keep a copy of the weight until backward."""


def fixed_factors(kept: Kept, bias: Tensor | None, norm: Statistics) -> tuple[Tensor, Tensor]:
    """Return ``a`` and ``a (b - mean) + beta``, ``(out,)``, made again only where that is due; without a gradient."""
    seen, value = kept.entry
    if isinstance(seen, _Seen) and seen.again(bias, norm):
        return value
    with torch.inference_mode(False), torch.no_grad():
        scale = norm.scale()
        made = scale, norm.offset(scale, bias)
    if can_keep(bias, *norm[:4]):
        kept.entry = _Seen(bias, norm), made
    return made


class _Seen:
    """What the bias of a layer and the norm behind it looked like."""

    __slots__ = ("eps", "looks")

    def __init__(self, bias: Tensor | None, norm: Statistics) -> None:
        self.eps = norm.eps
        self.looks = [None if vector is None else Look(vector) for vector in (bias, *norm[:4])]

    def again(self, bias: Tensor | None, norm: Statistics) -> bool:
        """Whether all of them look the same now."""
        if norm.eps != self.eps:
            return False
        for look, vector in zip(self.looks, (bias, *norm[:4]), strict=True):
            if look is None or vector is None:
                if look is not vector:
                    return False
            elif not look.is_that_of(vector):
                return False
        return True
