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


def exact(tensor: Tensor) -> Tensor:
    """Return the values in float64 on the CPU, where those of every device meet and every platform has the type."""
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def norm_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``(a, c)``, each ``(C,)`` in float64, of a normalization by fixed statistics ``mean`` and ``var``."""
    a = torch.rsqrt(exact(var) + eps)
    if weight is not None:
        a = a * exact(weight)
    c = -a * exact(mean)
    return a, c if bias is None else c + exact(bias)


def scale_outputs(weight: Tensor, scale: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """Return the float64 weight whose outputs are ``scale`` times those of ``weight``.

    Args:
        weight: Layout as in the module docstring.
        scale: ``(out,)``.
        groups: Groups of the convolution.
        transposed: Whether the layout is that of a transposed convolution.
    """
    weight = exact(weight)
    factor = per_output(scale, weight, groups, transposed)
    return (by_output(weight, groups, transposed) * factor).reshape(weight.shape)


def by_output(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """Return the weight as it is, or of a transposed convolution the view ``(groups, in/groups, out/groups, *k)``."""
    return weight.unflatten(0, (groups, -1)) if transposed else weight


def per_output(vector: Tensor, weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """Return a vector of the output channels, ``(out,)``, that broadcasts over :func:`by_output` of the weight."""
    if transposed:
        return vector.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return vector.reshape(-1, *[1] * (weight.dim() - 1))


def scale_inputs(weight: Tensor, scale: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """Return the float64 weight that does on ``x`` what ``weight`` does on ``scale * x``; ``scale`` is ``(in,)``."""
    weight = exact(weight)
    if transposed:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    by_group = weight.reshape(groups, -1, *weight.shape[1:])  # (out, in/g, *k) -> (g, out/g, in/g, *k)
    factor = scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (by_group * factor).reshape(weight.shape)


def rectified(values: Tensor, slope: Tensor | float) -> Tensor:
    """Return what a rectifier with this slope below zero (0 for a ReLU) makes of values."""
    return torch.where(values < 0, slope * values, values)


def unrectified(values: Tensor, slope: Tensor | float) -> Tensor:
    """Return what the rectifier takes to these values, NaN where it takes nothing there."""
    slope = torch.as_tensor(slope, dtype=values.dtype)
    below = torch.where(slope > 0, values / slope, torch.nan)
    return torch.where(values < 0, below, values)


def preimage(scale: Tensor, shift: Tensor, value: float) -> Tensor | None:
    """Return ``p`` with ``scale p + shift = value``, 0 where any does; None where somewhere none does."""
    scale, shift = torch.broadcast_tensors(scale, shift)
    if bool(((scale == 0) & (shift != value)).any()):
        return None
    return torch.where(scale == 0, 0.0, (value - shift) / scale)


def output_of_shift(weight: Tensor, shift: Tensor, *, groups: int = 1) -> Tensor:
    """Return ``(out,)``: what a constant input ``shift`` (``(in,)``) adds to every output where no padding is seen."""
    taps = exact(weight).flatten(2).sum(-1) if weight.dim() > 2 else exact(weight)  # (out, in/g)
    by_group = taps.reshape(groups, -1, taps.shape[1])
    return torch.einsum("goi,gi->go", by_group, exact(shift).reshape(groups, -1)).reshape(-1)
