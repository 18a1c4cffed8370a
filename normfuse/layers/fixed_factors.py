"""What a pair in Tune mode that is not trained multiplies by and adds, kept for as long as it is right.

Kept are ``a W``, or ``a`` where the output is scaled, and ``a (b - mean) + beta``. Whether they are still right is
judged at every call (:mod:`normfuse.layers.kept`): by the weight's version (raised by every write that autograd sees)
and a sample of its values, and by all values of the vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.layers.kept import Kept, Look, can_keep
from normfuse.layers.products import Product
from normfuse.layers.scaled import Statistics, scaled

WORTH = 4
"""How many times as large as a weight its output must be for a copy of the weight to be worth its memory."""

_PIECES = 8  # that are looked at of a weight


def fixed_factors(
    kept: Kept,
    weight: Tensor,
    bias: Tensor | None,
    norm: Statistics,
    product: Product,
    dtype: torch.dtype,
    *,
    on_output: bool,
) -> tuple[Tensor, Tensor]:
    """Return what to multiply by and the offset ``a (b - mean) + beta``, ``(out,)``, made again only where that is due.

    The factor is ``a W``, in the layout of the weight, and then both are in ``dtype``; where the output is scaled it is
    ``a``, ``(out,)``, and then both are in the dtype of the norm.
    """
    keeps, counted = can_keep(weight), None if on_output else weight
    seen, value = kept.entry
    known = keeps and isinstance(seen, _Seen) and seen.again(counted, bias, norm)
    if known and (on_output or value[0].dtype is dtype):
        return value
    with torch.inference_mode(False), torch.no_grad():
        scale = norm.scale()
        made = scale, norm.offset(scale, bias)
        if not on_output:
            made = scaled(weight, scale, product).to(dtype), made[1].to(dtype)
    if keeps:
        kept.entry = _Seen(counted, bias, norm), made
    return made


class _Seen:
    """What a weight, where it counts, its bias and the norm behind it looked like."""

    __slots__ = ("eps", "looks", "version")

    def __init__(self, weight: Tensor | None, bias: Tensor | None, norm: Statistics) -> None:
        self.eps, self.version = norm.eps, None if weight is None else weight._version
        vectors = [None if v is None else Look(v) for v in (bias, *norm[:4])]
        self.looks = [None if weight is None else Look(weight, _PIECES), *vectors]

    def again(self, weight: Tensor | None, bias: Tensor | None, norm: Statistics) -> bool:
        """Whether all of them look the same now."""
        if norm.eps != self.eps or (weight is not None and weight._version != self.version):
            return False
        for look, tensor in zip(self.looks, (weight, bias, *norm[:4]), strict=True):
            if look is None or tensor is None:
                if look is not tensor:
                    return False
            elif not look.is_that_of(tensor):
                return False
        return True
