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


Factors = tuple[Tensor, Tensor]


def fixed_weight(
    kept: Kept, weight: Tensor, bias: Tensor | None, norm: Statistics, product: Product, dtype: torch.dtype
) -> Factors:
    """Return ``a W``, in the layout of the weight, and ``a (b - mean) + beta``, ``(out,)``, both in ``dtype``."""
    known = _recalled(kept, weight, bias, norm)
    if known is not None and known[0].dtype is dtype:
        return known
    with torch.inference_mode(False), torch.no_grad():
        scale = norm.scale()
        made = scaled(weight, scale, product).to(dtype), norm.offset(scale, bias).to(dtype)
    return _keep(kept, weight, bias, norm, made)


def fixed_scale(kept: Kept, bias: Tensor | None, norm: Statistics) -> Factors:
    """Return ``a`` and ``a (b - mean) + beta``, each ``(out,)``."""
    known = _recalled(kept, None, bias, norm)
    if known is not None:
        return known
    with torch.inference_mode(False), torch.no_grad():
        scale = norm.scale()
        made = scale, norm.offset(scale, bias)
    return _keep(kept, None, bias, norm, made)


def _recalled(kept: Kept, weight: Tensor | None, bias: Tensor | None, norm: Statistics) -> Factors | None:
    """Return what is kept, if it is right."""
    if not can_keep(norm.var if weight is None else weight):
        return None
    seen, value = kept.entry
    return value if isinstance(seen, _Seen) and seen.again(weight, bias, norm) else None


def _keep(kept: Kept, weight: Tensor | None, bias: Tensor | None, norm: Statistics, made: Factors) -> Factors:
    if can_keep(norm.var if weight is None else weight):
        kept.entry = _Seen(weight, bias, norm), made
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
