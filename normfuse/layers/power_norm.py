"""Power Normalization: division by a running second moment, after a scaling of each token.

*PowerNorm: Rethinking Batch Normalization in Transformers*, arXiv 2003.07845, with the warm-up and the backward pass of
the authors' code. Statistics are per channel over the tokens S that are not padding; ``t = 1, 2, ...`` is the step, T
the number of warm-up steps, m the momentum, ``Lambda`` the running gradient statistic.

    group scaling:  x <- x / sqrt(E[x^2 over the token's group of channels] + eps)      (depends on the token: stays)
    forward:        phi_t = E_S[x^2];   z = x / sqrt(phi + eps),  phi = phi_t if t <= T else phi_hat
                    t < T: phi_hat <- phi_hat (t - 1)/t + phi_t/t;    always: phi_hat <- m phi_hat + (1 - m) phi_t
                    y = gamma z + beta
    backward:       g = G gamma;   h = g - (1 - m) Lambda z;   Lambda <- Lambda + E_S[h z]
                    dx = h / sqrt(phi_t + eps);   dgamma = sum_S G z;   dbeta = sum_S G

The backward pass divides by the second moment of the batch, also where the forward pass divides by the running one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfuse.layers.recomputation import read_in_backward, recorded
from normfuse.layers.second_moment import SecondMomentNorm, along, statistics_dtype, sum_across, token_gradients

if TYPE_CHECKING:
    from normfuse.layers.second_moment import Group


class _Step(NamedTuple):
    """What the forward pass of one training step settles for its backward pass."""

    inverse: Tensor  # (C,) 1 / sqrt(phi + eps)
    moment: Tensor  # (C,) phi_t
    tokens: Tensor  # () number of tokens in S


class _Normalize(torch.autograd.Function):
    """y = gamma z + beta with the backward pass of the module docstring, which updates ``Lambda``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        padding_mask: Tensor | None,
        statistic: Tensor,
        settings: tuple[int, float, float, Group],
        *step: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, padding_mask, *step)
        # Not a saved tensor: another backward pass may update it before this one reads it.
        ctx.statistic, ctx.settings = statistic, settings
        return SecondMomentNorm._affine(x, weight * step[0], bias, settings[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, padding_mask, *values = ctx.saved_tensors
        step = _Step(*values)
        axis, momentum, eps, group = ctx.settings
        dtype, precision = x.dtype, step.inverse.dtype
        grad, x, products, bias_grad = token_gradients(grads[0].to(precision), x.to(precision), padding_mask, axis)
        weight_grad = products * step.inverse
        q = sum_across(weight_grad * weight, group) / step.tokens
        statistic = read_in_backward([ctx.statistic], q)[0].to(precision)
        pulled = (1 - momentum) * statistic
        # E_S[h z] = E_S[g z] - pulled E_S[z^2]
        ctx.statistic.copy_(statistic + q - pulled * step.moment * step.inverse.square())
        out = torch.rsqrt(step.moment + eps)
        x_grad = grad * along(weight * out, axis, x.dim()) - x * along(pulled * step.inverse * out, axis, x.dim())
        return x_grad.to(dtype), weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), *[None] * (3 + len(step))


class GroupScaling(nn.Module):
    """Divide each token by the root mean square of each of its groups of channels; no parameters.

    Args:
        groups: P, number of groups; it divides the channels.
        eps: Added to the mean square.
        dim: Channel axis of the input.
    """

    def __init__(self, groups: int, *, eps: float = 1e-5, dim: int = -1) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, scaled; its shape and dtype."""
        axis = self.dim % x.dim()
        grouped = x.to(statistics_dtype(x.dtype)).unflatten(axis, (self.groups, -1))
        mean_square = grouped.square().mean(axis + 1, keepdim=True)
        return (grouped * torch.rsqrt(mean_square + self.eps)).flatten(axis, axis + 1).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"groups={self.groups}, eps={self.eps}, dim={self.dim}"


class PowerNorm(SecondMomentNorm):
    """Power Normalization over the tokens of a batch, with running statistics at inference.

    *PowerNorm: Rethinking Batch Normalization in Transformers*, arXiv 2003.07845. The core is in eval mode a fixed map
    ``y = a x + c`` per channel and folds (:meth:`affine_map`); the child ``group_scaling`` before it, a
    :class:`GroupScaling` or ``nn.Identity``, depends on the token and stays.

    What :class:`normfuse.layers.UnifiedNorm` says of steps, backward passes, checkpointing and precision holds here.

    Args:
        num_features: C.
        eps: Added to each second moment.
        momentum: Weight of the old value in the running statistics, forward and backward.
        warmup_steps: T, steps that divide by the second moment of the batch.
        group_scaling: Number of channel groups of the scaling before the norm; None leaves it out.
        dim: Channel axis of the input.
        process_group: As for :class:`normfuse.layers.UnifiedNorm`.
        device: Of parameters and buffers.
        dtype: Of the parameters.

    Raises:
        ValueError: An argument is out of range, or ``group_scaling`` does not divide ``num_features``.

    Example:
        >>> norm = PowerNorm(8, group_scaling=2)
        >>> norm(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.9,
        warmup_steps: int = 10000,
        group_scaling: int | None = 1,
        dim: int = -1,
        process_group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            warmup_steps=warmup_steps,
            dim=dim,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        if group_scaling is not None and (group_scaling < 1 or num_features % group_scaling):
            raise ValueError(f"group_scaling={group_scaling} does not divide num_features={num_features}")
        self.group_scaling = nn.Identity() if group_scaling is None else GroupScaling(group_scaling, eps=eps, dim=dim)
        self.reset_parameters()

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Scale the groups of ``x`` and normalise; otherwise as the forward of the base class."""
        self._channel_axis(x)
        return super().forward(self.group_scaling(x), padding_mask)

    def _train(self, x: Tensor, padding_mask: Tensor | None, axis: int) -> Tensor:
        step = recorded(self, lambda: self._advance(x, padding_mask, axis))
        settings = (axis, self.momentum, self.eps, self.process_group)
        statistic = self.running_gradient_statistic
        return _Normalize.apply(x, self.weight, self.bias, padding_mask, statistic, settings, *step)  # type: ignore[return-value]

    @torch.no_grad()
    def _advance(self, x: Tensor, padding_mask: Tensor | None, axis: int) -> _Step:
        """Take the statistics of one batch into the buffers."""
        batch, tokens = self._moment(x, padding_mask, axis)
        running = self.running_second_moment.to(batch.dtype)
        t = self.step + 1
        phi = torch.where(t <= self.warmup_steps, batch, running)
        running = torch.where(t < self.warmup_steps, running + (batch - running) / t, running)
        self.running_second_moment.copy_(self.momentum * running + (1 - self.momentum) * batch)
        self.step.copy_(t)
        return _Step(torch.rsqrt(phi + self.eps), batch, tokens)
