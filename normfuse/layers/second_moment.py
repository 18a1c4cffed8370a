"""What the norms that divide by a running second moment share: layout, statistics, inference form.

    nu_hat, (C): running second moment;    S: the tokens of a batch that are not padding;    n = |S|

    inference:  y = gamma x / sqrt(nu_hat + eps) + beta  =  a x + c,    a = gamma / sqrt(nu_hat + eps),   c = beta

A channel is not centred. ``x`` is of any shape with the channels on one axis; a token is one index into the others.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normfuse import numerics
from normfuse.layers.affine_inference import AffineInference
from normfuse.layers.padding import noted_padding
from normfuse.layers.recomputation import recorded
from normfuse.layers.wide_statistics import WideStatistics, narrowed

if TYPE_CHECKING:
    Group = dist.ProcessGroup | Literal["world"] | None


def statistics_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return float64 where one of ``dtypes`` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """Return ``(C,)`` values in the shape that multiplies an ``x`` of ``rank`` axes along ``axis``."""
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def token_sum(values: Tensor, axis: int) -> Tensor:
    """Return the sum over every axis but the channels': ``(C,)``."""
    others = [i for i in range(values.dim()) if i != axis]
    return values.sum(others) if others else values


def without_padding(values: Tensor, padding_mask: Tensor | None, axis: int) -> Tensor:
    """Return ``values`` with zeros at the padding, whatever stood there (also NaN)."""
    return values if padding_mask is None else values.masked_fill(padding_mask.unsqueeze(axis), 0)


def sum_across(values: Tensor, group: Group) -> Tensor:
    """Return the sum over the processes of ``group``; ``values`` itself where there is none."""
    if group is not None:
        values = values.clone()
        dist.all_reduce(values, group=None if group == "world" else group)
    return values


def token_gradients(grad: Tensor, x: Tensor, padding_mask: Tensor | None, axis: int) -> tuple[Tensor, ...]:
    """Return what the backward passes start from: ``(grad, x, products, sums)``.

    The first two are without padding and of their own shape; ``products`` and ``sums``, ``(C,)``, are the sums over S
    of ``grad * x`` and of ``grad``.
    """
    grad, x = (without_padding(values, padding_mask, axis) for values in (grad, x))
    return grad, x, token_sum(grad * x, axis), token_sum(grad, axis)


class SecondMomentNorm(WideStatistics, AffineInference, nn.Module, ABC):
    """Base of UnifiedNorm and PowerNorm; see there for the arguments."""

    weight: nn.Parameter
    bias: nn.Parameter
    running_second_moment: Tensor
    running_gradient_statistic: Tensor
    step: Tensor
    process_group: Group

    def __init__(
        self,
        num_features: int,
        *,
        eps: float,
        momentum: float,
        warmup_steps: int,
        dim: int,
        process_group: Group,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if num_features < 1 or eps <= 0 or not 0 <= momentum < 1 or warmup_steps < 0:
            raise ValueError("give num_features >= 1, eps > 0, 0 <= momentum < 1 and warmup_steps >= 0")
        if isinstance(process_group, str) and process_group != "world":
            raise ValueError(f"process_group is a process group, 'world' or None, not {process_group!r}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.warmup_steps = warmup_steps
        self.dim = dim
        self.process_group = process_group
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self._add_statistic("running_second_moment", num_features)
        self._add_statistic("running_gradient_statistic", num_features)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))

    def _add_statistic(self, name: str, *shape: int) -> None:
        dtype = statistics_dtype(self.weight.dtype)
        self.register_buffer(name, torch.empty(shape, device=self.weight.device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set gain 1, shift 0, and the statistics of a new layer."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Set every buffer to its start: second moment 1, all else 0."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
        self.running_second_moment.fill_(1)

    def reset_step(self) -> None:
        """Set the step count back to 0 and keep the statistics: call it before fine-tuning.

        The count is stored with the model. Without the reset, training that starts from a stored model, or from
        statistics that were calibrated, finds the warm-up over and applies averages of another run to its first
        batches.
        """
        self.step.zero_()

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return ``(a, c)`` of the inference form ``a x + c``, each ``(C,)``, in float64 on the CPU."""
        nu = self.running_second_moment
        return numerics.norm_affine(torch.zeros_like(nu), nu, self.weight, self.bias, self.eps)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Normalise ``x``; in training mode, update the statistics by it.

        Args:
            x: Channels on axis ``dim``; any other axes.
            padding_mask: Bool, of the shape of ``x`` without the channel axis, True at padding. Padding tokens are in
                no statistic, pass no gradient on and add none to the gain and shift. Unused in eval mode. If None, the
                mask that the model itself was called with, where norms were swapped (:mod:`normfuse.layers.padding`).

        Returns:
            Shape and dtype of ``x``.

        Raises:
            ValueError: Another number of channels, or a mask of another shape.
            TypeError: ``x`` is not floating-point, or the mask not bool.
            NormfuseError: A training forward inside a backward pass, not replayed (see
                :func:`normfuse.layers.recomputation.replayed_statistics`).
        """
        axis = self._channel_axis(x)
        if padding_mask is not None:
            _check_mask(padding_mask, x, axis)
        if self.training:
            if padding_mask is None and not torch.compiler.is_compiling():
                padding_mask = self._noted_padding(x, axis)
            return self._train(x, padding_mask, axis)
        scale = self.weight * torch.rsqrt(self.running_second_moment.to(self._precision(x)) + self.eps)
        return self._affine(x, scale, self.bias, axis)

    def _noted_padding(self, x: Tensor, axis: int) -> Tensor | None:
        """Return the padding that a module around notes, or that was noted where this forward is recomputed."""

        def noted() -> tuple[Tensor, ...]:
            padding = noted_padding(x, axis)
            return () if padding is None else (padding,)

        return next(iter(recorded(self, noted)), None)

    @abstractmethod
    def _train(self, x: Tensor, padding_mask: Tensor | None, axis: int) -> Tensor: ...

    def _channel_axis(self, x: Tensor) -> int:
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes floating-point input, not {x.dtype}")
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.num_features:
            raise ValueError(f"input {tuple(x.shape)} has not {self.num_features} channels on axis {self.dim}")
        return self.dim % x.dim()

    def _precision(self, x: Tensor) -> torch.dtype:
        return statistics_dtype(x.dtype, self.running_second_moment.dtype)

    @staticmethod
    def _affine(x: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
        y = x.to(scale.dtype) * along(scale, axis, x.dim()) + along(shift, axis, x.dim())
        return narrowed(y, x.dtype)

    def _moment(self, x: Tensor, padding_mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
        """Return ``E_S[x^2]``, ``(C,)``, and ``n``, ``()``; the running second moment where no token is left."""
        x = without_padding(x.to(self._precision(x)), padding_mask, axis)
        sums = token_sum(x.square(), axis)
        if padding_mask is None:
            count = sums.new_full((1,), x.numel() // self.num_features)
        else:
            count = (~padding_mask).sum(dtype=sums.dtype).reshape(1)
        sums = sum_across(torch.cat([sums, count]), self.process_group)
        count = sums[-1]
        moment = sums[:-1] / count.clamp(min=1)
        return torch.where(count > 0, moment, self.running_second_moment.to(moment.dtype)), count.clamp(min=1)

    def __deepcopy__(self, memo: dict[int, Any]) -> SecondMomentNorm:
        """Copy the module; a process group cannot be copied and is shared."""
        new = type(self).__new__(type(self))
        memo.update({id(self): new, id(self.process_group): self.process_group})
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def extra_repr(self) -> str:
        """Show the arguments."""
        group = "" if self.process_group is None else ", synchronized"
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, warmup_steps={self.warmup_steps}, "
            f"dim={self.dim}{group}"
        )


def _check_mask(padding_mask: Tensor, x: Tensor, axis: int) -> None:
    tokens = x.shape[:axis] + x.shape[axis + 1 :]
    if padding_mask.dtype != torch.bool:
        raise TypeError(f"padding_mask is bool, True at padding, not {padding_mask.dtype}")
    if padding_mask.shape != tokens:
        raise ValueError(f"padding_mask {tuple(padding_mask.shape)} is not of shape {tuple(tokens)}, one per token")
