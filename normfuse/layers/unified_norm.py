"""Unified Normalization: a norm for transformers whose inference form is a fixed map of each channel.

*Unified Normalization for Accelerating and Stabilizing Transformers*, arXiv 2208.01313. Statistics are per channel
over the tokens S that are not padding; ``nu_hat`` is the running second moment, ``psi`` the running gradient
statistic, F and Q are windows of M rows (slot ``t mod M``) of second moments and gradient statistics, ``t = 1, 2, ...``
is the step, T the number of warm-up steps, m the momentum.

    forward:   nu_t = E_S[x^2];   F[slot] <- nu_t
               skip = M = 1, or t >= T and (AM - GM of F) > M Var(sqrt(F)) in some channel (outlier filtration; the
               variance is that of F before the write); a filtered step also sets F[slot] <- nu_hat
               nu = GM of F where t > M, t >= T and not skip, else nu_t
               r = clamp(sqrt(nu + eps) / sqrt(nu_hat + eps), 1/5, 5) where t > max(start, T) and not skip, else 1
               z = x / sqrt(nu + eps);   y = gamma z + beta;   nu_hat <- m nu_hat + (1 - m) nu
    backward:  g = G gamma r;   q = E_S[g z];   Q[slot] <- psi if skip else q
               q_bar = mean of Q where t > M, t >= T and not skip, else q;   psi <- m psi + (1 - m) q_bar
               dx = (g - (q_bar if skip else psi) z) / sqrt(nu + eps);   dgamma = sum_S G r z;   dbeta = sum_S G

AM and GM are the arithmetic and the geometric mean over the rows of F. Nothing here waits for the device: the step is
a tensor and every choice that depends on it is a ``torch.where``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normfuse.layers.recomputation import read_in_backward, recorded
from normfuse.layers.second_moment import SecondMomentNorm, along, sum_across, token_gradients

if TYPE_CHECKING:
    from normfuse.layers.second_moment import Group

_RATIO = 5.0
"""Bound of r and of 1/r."""


class _Step(NamedTuple):
    """What the forward pass of one training step settles for its backward pass."""

    inverse: Tensor  # (C,) 1 / sqrt(nu + eps)
    ratio: Tensor  # (C,) r
    tokens: Tensor  # () number of tokens in S
    slot: Tensor  # (M, 1) True in the row of the windows that this step writes
    skip: Tensor  # ()
    average: Tensor  # () whether the window means are used


class _Normalize(torch.autograd.Function):
    """y = gamma z + beta with the backward pass of the module docstring, which updates ``psi`` and Q."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        padding_mask: Tensor | None,
        psi: Tensor,
        window: Tensor,
        settings: tuple[int, float, Group],
        *step: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, padding_mask, *step)
        # Not saved_tensors: another backward pass may update them before this one reads them.
        ctx.psi, ctx.window, ctx.settings = psi, window, settings
        return SecondMomentNorm._affine(x, weight * step[0], bias, settings[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, padding_mask, *values = ctx.saved_tensors
        step = _Step(*values)
        axis, momentum, group = ctx.settings
        dtype, precision = x.dtype, step.inverse.dtype
        grad, x, products, bias_grad = token_gradients(grads[0].to(precision), x.to(precision), padding_mask, axis)
        weight_grad = products * step.ratio * step.inverse
        q = sum_across(weight_grad * weight, group) / step.tokens
        pulled = _update(ctx.psi, ctx.window, q, step, momentum) * step.inverse.square()
        scale = weight * step.ratio * step.inverse
        x_grad = grad * along(scale, axis, x.dim()) - x * along(pulled, axis, x.dim())
        return x_grad.to(dtype), weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), *[None] * (4 + len(step))


def _update(psi: Tensor, window: Tensor, q: Tensor, step: _Step, momentum: float) -> Tensor:
    """Update ``psi``, ``(C,)``, and Q, ``(M, C)``, in place and return what multiplies z in the gradient."""
    old_psi, old_rows = (buffer.to(q.dtype) for buffer in read_in_backward([psi, window], q))
    rows = torch.where(step.slot, torch.where(step.skip, old_psi, q), old_rows)
    mean = torch.where(step.average, rows.mean(0), q)
    new = momentum * old_psi + (1 - momentum) * mean
    window.copy_(rows)
    psi.copy_(new)
    return torch.where(step.skip, mean, new)


class UnifiedNorm(SecondMomentNorm):
    """Unified Normalization over the tokens of a batch, with running statistics at inference.

    *Unified Normalization for Accelerating and Stabilizing Transformers*, arXiv 2208.01313. A replacement of LayerNorm
    that folds: in eval mode it is ``y = a x + c`` per channel (:meth:`affine_map`). It is not LayerNorm, so a
    converted model needs calibration and fine-tuning (:meth:`reset_step` first).

    Each training forward is one step and updates ``running_second_moment``, ``second_moment_window``, ``step`` and
    ``skipped_steps``, also under ``no_grad``, as BatchNorm does. Each backward pass through it updates
    ``running_gradient_statistic`` and ``gradient_statistic_window``: not at all where backward is not called, twice
    where it is called twice. The backward pass cannot itself be differentiated. With gradient checkpointing, pass
    ``context_fn=normfuse.layers.replayed_statistics``; a forward that is recomputed without it is an error.

    Statistics are computed and stored in float32, or in float64 where the input or the parameters are, also after
    ``half()`` and under autocast. Parameters may be moved to half precision.

    Args:
        num_features: C.
        eps: Added to the second moment.
        momentum: Weight of the old value in the running statistics.
        window: M, rows of both windows; 1 uses the statistics of each batch alone and filters nothing.
        warmup_steps: T, steps before averages over the window and the outlier filtration begin.
        outlier_filtration: Leave outlier batches out of the window; the paper has it on for vision, off for language.
        scaling_start: Steps, besides the warm-up, before r may differ from 1; 1000 in the authors' code.
        dim: Channel axis of the input.
        process_group: Average the statistics over these processes, weighted by their tokens: a process group, or
            ``"world"`` for the default one, with which the layer can also be pickled. None: each process has its own.
        device: Of parameters and buffers.
        dtype: Of the parameters.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> norm = UnifiedNorm(8, warmup_steps=100)
        >>> norm(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    second_moment_window: Tensor
    gradient_statistic_window: Tensor
    skipped_steps: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.9,
        window: int = 4,
        warmup_steps: int = 4000,
        outlier_filtration: bool = False,
        scaling_start: int = 1000,
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
        if window < 1 or scaling_start < 0:
            raise ValueError("give window >= 1 and scaling_start >= 0")
        self.window = window
        self.outlier_filtration = outlier_filtration
        self.scaling_start = scaling_start
        self._add_statistic("second_moment_window", window, num_features)
        self._add_statistic("gradient_statistic_window", window, num_features)
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def _train(self, x: Tensor, padding_mask: Tensor | None, axis: int) -> Tensor:
        step = recorded(self, lambda: self._advance(x, padding_mask, axis))
        settings = (axis, self.momentum, self.process_group)
        statistics = (self.running_gradient_statistic, self.gradient_statistic_window)
        return _Normalize.apply(x, self.weight, self.bias, padding_mask, *statistics, settings, *step)  # type: ignore[return-value]

    @torch.no_grad()
    def _advance(self, x: Tensor, padding_mask: Tensor | None, axis: int) -> _Step:
        """Take the statistics of one batch into the buffers."""
        batch, tokens = self._moment(x, padding_mask, axis)
        running = self.running_second_moment.to(batch.dtype)
        t = self.step + 1
        slot = (torch.arange(self.window, device=x.device) == t % self.window).unsqueeze(1)
        rows, skip = self._write(batch, running, slot, t)
        average = (t > self.window) & (t >= self.warmup_steps) & ~skip
        nu = torch.where(average, rows.log().mean(0).exp(), batch)
        ratio = torch.sqrt((nu + self.eps) / (running + self.eps)).clamp(1 / _RATIO, _RATIO)
        ratio = torch.where((t <= max(self.scaling_start, self.warmup_steps)) | skip, 1.0, ratio)
        self.second_moment_window.copy_(rows)
        self.running_second_moment.copy_(self.momentum * running + (1 - self.momentum) * nu)
        self.step.copy_(t)
        return _Step(torch.rsqrt(nu + self.eps), ratio, tokens, slot, skip, average)

    def _write(self, batch: Tensor, running: Tensor, slot: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return F with the batch in its slot, ``(M, C)``, and whether the window is not to be used, ``()``."""
        old = self.second_moment_window.to(batch.dtype)
        rows = torch.where(slot, batch, old)
        if self.window == 1 or not self.outlier_filtration:
            return rows, torch.full_like(t, self.window == 1, dtype=torch.bool)
        spread = rows.mean(0) - rows.log().mean(0).exp()
        outlier = (spread > self.window * old.sqrt().var()).any() & (t >= self.warmup_steps)
        self.skipped_steps.add_(outlier)
        return torch.where(slot & outlier, running, rows), outlier

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{super().extra_repr()}, window={self.window}, outlier_filtration={self.outlier_filtration}"
