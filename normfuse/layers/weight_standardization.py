"""Weight Standardization: the weight of each output with mean 0 and variance 1, as a parametrization.

    *Weight Standardization*, arXiv 1903.10520, mean and variance over the fan-in of each output o:

        reference   w = (W - mean_o) / (std_o + 1e-5)                    unbiased deviation
        bcn         w = (W - mean_o) / sqrt(var_o + 1e-5)                unbiased variance
        timm        w = (W - mean_o) / sqrt(var_o + 1e-6)                biased variance

    scaled, of normalizer-free networks (arXiv 2101.08692, 2102.06171), with F values of fan-in and a gain g_o:

        deepmind    w = (W - mean_o) g_o / sqrt(max(var_o F, 1e-4))                  biased variance
        timm        w = (W - mean_o) g_o gamma_act F^(-1/2) / sqrt(var_o + 1e-6)     biased variance

Register one with ``torch.nn.utils.parametrize``; the materialize pass evaluates it once. timm's ``StdConv2d`` and
``ScaledStdConv2d``, which do this in their ``forward``, need no parametrization: the pass reads them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Standardize = Literal["reference", "bcn", "timm"]
Scaled = Literal["deepmind", "timm"]
_EPS: dict[str, float] = {"reference": 1e-5, "bcn": 1e-5, "timm": 1e-6, "deepmind": 1e-4}


class WeightStandardization(nn.Module):
    """Weight Standardization (arXiv 1903.10520) as a parametrization of a weight ``(out, *)``.

    Args:
        variant: Whose formula, of the module docstring: the paper's code, that of Batch-Channel Normalization, or timm.
        eps: What is added; the variant's, if None.

    Raises:
        ValueError: The variant is not known.

    Example:
        >>> conv = nn.Conv2d(3, 8, 3)
        >>> conv = nn.utils.parametrize.register_parametrization(conv, "weight", WeightStandardization())
        >>> conv.weight.std((1, 2, 3)).allclose(torch.ones(8), atol=1e-3)
        True
    """

    def __init__(self, variant: Standardize = "reference", eps: float | None = None) -> None:
        super().__init__()
        if variant not in ("reference", "bcn", "timm"):
            raise ValueError(f"variant is 'reference', 'bcn' or 'timm', not {variant!r}")
        self.variant = variant
        self.eps = _EPS[variant] if eps is None else eps

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardized weight, of its shape."""
        centred = _centred(weight)
        var = _variance(centred, unbiased=self.variant != "timm")
        return centred / (var.sqrt() + self.eps if self.variant == "reference" else (var + self.eps).sqrt())

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.variant!r}, eps={self.eps}"


class ScaledWeightStandardization(nn.Module):
    """Scaled Weight Standardization (arXiv 2101.08692, 2102.06171) as a parametrization of a weight ``(out, *)``.

    Args:
        out_features: Number of outputs.
        gamma: gamma_act, the gain of the activation before the layer (:func:`activation_gain` of
            :mod:`normfuse.layers.normalizer_free`); 1 where the activation has it.
        variant: Whose formula, of the module docstring.
        eps: What the variance is bounded by or what is added to it; the variant's, if None.
        device: Of the parameter ``gain``, ``(out,)``, one at first.
        dtype: Of the parameter.

    Raises:
        ValueError: The variant is not known.

    Example:
        >>> conv = nn.Conv2d(3, 8, 3)
        >>> scaled = ScaledWeightStandardization(8)
        >>> conv = nn.utils.parametrize.register_parametrization(conv, "weight", scaled)
        >>> conv.weight.square().sum((1, 2, 3)).allclose(torch.ones(8), atol=1e-3)
        True
    """

    def __init__(
        self,
        out_features: int,
        gamma: float = 1.0,
        variant: Scaled = "deepmind",
        eps: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if variant not in ("deepmind", "timm"):
            raise ValueError(f"variant is 'deepmind' or 'timm', not {variant!r}")
        self.gamma = gamma
        self.variant = variant
        self.eps = _EPS[variant] if eps is None else eps
        self.gain = nn.Parameter(torch.ones(out_features, device=device, dtype=dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardized and scaled weight, of its shape."""
        centred, fan_in = _centred(weight), weight[0].numel()
        var = _variance(centred, unbiased=False)
        square = (var * fan_in).clamp(min=self.eps) if self.variant == "deepmind" else (var + self.eps) * fan_in
        gain = self.gain.reshape(-1, *[1] * (weight.dim() - 1))
        return centred * (self.gamma * gain * torch.rsqrt(square))

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.gain.numel()}, gamma={self.gamma}, {self.variant!r}, eps={self.eps}"


def _centred(weight: Tensor) -> Tensor:
    return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


def _variance(centred: Tensor, *, unbiased: bool) -> Tensor:
    """Return the variance of each output, from values of mean 0, in the shape that broadcasts."""
    axes = tuple(range(1, centred.dim()))
    return centred.square().sum(axes, keepdim=True) / (centred[0].numel() - int(unbiased))
