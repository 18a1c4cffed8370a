"""The arithmetic of folding, as pure functions of tensors.

    y = gamma (x - mean) / sqrt(var + eps) + beta  =  a x + c,   a = gamma / sqrt(var + eps),   c = beta - a mean

    into the output of  W x + b:     W' = a W (per output channel),   b' = a b + c
    into the input of   W x + b:     W' = W a (per input channel),    b' = b + sum over input channels and taps of W c

Everything is computed in float64; the caller casts once. Weights keep their own layout: ``(out, in/groups, *k)`` for
convolutions, ``(in, out/groups, *k)`` for transposed ones, ``(out, in)`` for linear layers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``(a, c)``, each ``(C,)`` in float64, of a normalization by fixed statistics ``mean`` and ``var``."""
    a = torch.rsqrt(var.double() + eps)
    if weight is not None:
        a = a * weight.double()
    c = -a * mean.double()
    return a, c if bias is None else c + bias.double()


def scale_outputs(weight: Tensor, scale: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """Return the float64 weight whose outputs are ``scale`` times those of ``weight``.

    Args:
        weight: Layout as in the module docstring.
        scale: ``(out,)``.
        groups: Groups of the convolution.
        transposed: Whether the layout is that of a transposed convolution.
    """
    weight = weight.double()
    if not transposed:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    by_group = weight.reshape(groups, -1, *weight.shape[1:])  # (in, out/g, *k) -> (g, in/g, out/g, *k)
    factor = scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (by_group * factor).reshape(weight.shape)


def scale_inputs(weight: Tensor, scale: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """Return the float64 weight whose outputs on ``x`` are those of ``weight`` on ``scale * x``; ``scale`` is ``(in,)``."""
    weight = weight.double()
    if transposed:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    by_group = weight.reshape(groups, -1, *weight.shape[1:])  # (out, in/g, *k) -> (g, out/g, in/g, *k)
    factor = scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (by_group * factor).reshape(weight.shape)


def output_of_shift(weight: Tensor, shift: Tensor, *, groups: int = 1) -> Tensor:
    """Return ``(out,)``: what a constant input ``shift`` (``(in,)``) adds to every output where no padding is seen."""
    taps = weight.double().flatten(2).sum(-1) if weight.dim() > 2 else weight.double()  # (out, in/g)
    by_group = taps.reshape(groups, -1, taps.shape[1])
    return torch.einsum("goi,gi->go", by_group, shift.double().reshape(groups, -1)).reshape(-1)
