"""Online Normalization: running statistics that move with every sample, forward and backward.

*Online Normalization for Training Neural Networks*, arXiv 1905.05894, as the authors' code computes it. Samples n of a
batch come one after the other; m, v are mean and variance of sample n over its positions, and E is over those:

    forward:   y = (x - mu) / sqrt(s2 + eps),      then
               s2 <- f s2 + (1 - f) v + f (1 - f) (m - mu)^2,     mu <- mu + (1 - f) (m - mu)
    backward:  g = G - (1 - b) V y;     V <- V + E[g y];     h = g / sqrt(s2 + eps)
               dx = h - (1 - b) U;      U <- U + E[dx]
    eval:      y = (x - mu) / sqrt(s2 + eps)                      with gain and shift a fixed map a x + c

A gain and a shift follow, then the error control: a clamp, or the layer scaling ``x / sqrt(E[x^2] + eps)`` of each
sample. The core folds; the clamp and the layer scaling stay behind it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfuse import numerics
from normfuse.layers.affine_inference import AffineInference
from normfuse.layers.wide_statistics import WideStatistics

Control = Literal["clamp", "layer_scaling"] | None


class _Core(torch.autograd.Function):
    """The control process; ``x`` is (N, C, P), statistics and controls (C,), written in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, u: Tensor, v: Tensor, rates: tuple[float, ...]
    ) -> Tensor:
        f, _, eps = rates
        sample_mean, sample_var = x.mean(2), x.var(2, unbiased=False)
        means, inverses = torch.empty_like(sample_mean), torch.empty_like(sample_mean)
        for n in range(x.shape[0]):
            means[n], inverses[n] = mean, torch.rsqrt(var + eps)
            step = sample_mean[n] - mean
            var.mul_(f).add_((1 - f) * sample_var[n] + f * (1 - f) * step.square())
            mean.add_((1 - f) * step)
        y = (x - means.unsqueeze(2)) * inverses.unsqueeze(2)
        ctx.save_for_backward(y, inverses)
        ctx.controls, ctx.rates = (u, v), rates  # not saved tensors: other backward passes may write them before
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, inverses = ctx.saved_tensors
        (u, v), (_, b, _) = ctx.controls, ctx.rates
        x_grad = torch.empty_like(y)
        for n in range(y.shape[0]):
            g = grads[0][n] - (1 - b) * v[:, None] * y[n]
            v.add_((g * y[n]).mean(1))
            x_grad[n] = g * inverses[n][:, None] - (1 - b) * u[:, None]
            u.add_(x_grad[n].mean(1))
        return x_grad, None, None, None, None, None


class OnlineNormCore(AffineInference, WideStatistics, nn.Module):
    """The normalization, gain and shift of :class:`OnlineNorm`, which has its arguments: a fixed map in eval mode."""

    running_mean: Tensor
    running_var: Tensor
    gradient_mean: Tensor
    gradient_product: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        alpha_forward: float,
        alpha_backward: float,
        eps: float,
        affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.alpha_forward = alpha_forward
        self.alpha_backward = alpha_backward
        self.eps = eps
        self.dim = 1
        for name in ("weight", "bias"):
            made = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, made)
        wide = torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32
        for name in ("running_mean", "running_var", "gradient_mean", "gradient_product"):
            self.register_buffer(name, torch.zeros(num_features, device=device, dtype=wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gain 1, shift 0, mean 0, variance 1 and the controls of the gradient 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        for buffer in self.buffers():
            buffer.zero_()
        self.running_var.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, ``(N, C, *)``; in training mode sample by sample, each by the statistics before it."""
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"input {tuple(x.shape)} has not {self.num_features} channels on axis 1")
        wide = torch.float64 if torch.float64 in (x.dtype, self.running_var.dtype) else torch.float32
        rows = x.to(wide).reshape(*x.shape[:2], -1)
        if self.training:
            state = (self.running_mean, self.running_var, self.gradient_mean, self.gradient_product)
            y: Any = _Core.apply(rows, *state, (self.alpha_forward, self.alpha_backward, self.eps))
        else:
            y = (rows - self.running_mean[:, None]) * torch.rsqrt(self.running_var + self.eps)[:, None]
        y = y if self.weight is None else y * self.weight[:, None]
        y = y if self.bias is None else y + self.bias[:, None]
        return y.to(x.dtype).reshape(x.shape)

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return ``(a, c)`` of the inference form ``a x + c``, each ``(C,)``, in float64 on the CPU."""
        return numerics.norm_affine(self.running_mean, self.running_var, self.weight, self.bias, self.eps)


class LayerScaling(nn.Module):
    """Divide each sample by the root mean square of all its values; no parameters, and it never folds.

    Args:
        eps: Added to the mean square.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, ``(N, *)``, scaled."""
        return x * torch.rsqrt(x.square().mean(tuple(range(1, x.dim())), keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        """Show the argument."""
        return f"eps={self.eps}"


class OnlineNorm(nn.Module):
    """Online Normalization (arXiv 1905.05894) over ``(N, C, *)``: a core that folds, and an error control that stays.

    The backward pass is that of the paper, not the derivative of the forward pass, and updates the controls of the
    gradient: take each backward pass once, in the order of the forward passes. ``core`` has the statistics, gain and
    shift; ``control`` is an ``nn.Hardtanh``, a :class:`LayerScaling` or ``nn.Identity``.

    Args:
        num_features: C.
        alpha_forward: f, decay of the statistics.
        alpha_backward: b, decay of the controls of the gradient.
        eps: Added to the variance.
        affine: Whether there are a gain ``weight`` and a shift ``bias``, ``(C,)``.
        control: ``"clamp"``, ``"layer_scaling"``, or None for none.
        clamp: The bound of the clamp.
        device: Of parameters and buffers.
        dtype: Of the parameters; statistics are in float32 or float64.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> OnlineNorm(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        *,
        alpha_forward: float = 0.999,
        alpha_backward: float = 0.99,
        eps: float = 1e-5,
        affine: bool = True,
        control: Control = "clamp",
        clamp: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1 or eps <= 0 or not (0 <= alpha_forward <= 1 and 0 <= alpha_backward <= 1) or clamp <= 0:
            raise ValueError("give num_features >= 1, eps > 0, clamp > 0 and decays from 0 to 1")
        if control not in ("clamp", "layer_scaling", None):
            raise ValueError(f"control is 'clamp', 'layer_scaling' or None, not {control!r}")
        options: Any = {"eps": eps, "affine": affine, "device": device, "dtype": dtype}
        self.core = OnlineNormCore(num_features, alpha_forward=alpha_forward, alpha_backward=alpha_backward, **options)
        self.control = {None: nn.Identity, "layer_scaling": LayerScaling}.get(control, nn.Identity)()
        if control == "clamp":
            self.control = nn.Hardtanh(-clamp, clamp)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``x``, ``(N, C, *)``, of its shape and dtype."""
        return self.control(self.core(x))
