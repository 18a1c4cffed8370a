"""Layers whose operands have a scale for each channel of the reduction axis: what no grouping can do better than.

    s_k = r_k / q,   x_k ~ s_k round(x_k / s_k)      for X, W and dY alike, each along the axis of its product

Such products need a multiplication for each channel inside their sum, so they are computed in floating point here, on
rounded operands. The rounding of each operand is that of :mod:`normfuse.quantization.products`: to nearest for
inputs and weights, stochastic for gradients, straight-through.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad


def rounded(x: Tensor, dims: tuple[int, ...], bits: int, *, stochastic: bool = False) -> Tensor:
    """Return ``x`` on steps of its own for each index of ``dims``."""
    limit = 2 ** (bits - 1) - 1
    others = [d for d in range(x.dim()) if d not in dims]
    step = x.abs().amax(others, keepdim=True).clamp(min=1e-30) / limit
    scaled = x / step
    whole = (scaled + torch.rand_like(scaled)).floor() if stochastic else scaled.round()
    return whole.clamp(-limit, limit) * step


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bits: int) -> Tensor:
        x, weight = rounded(x, (1,), bits), rounded(weight, (1,), bits)
        ctx.save_for_backward(x, weight)
        ctx.bits = bits
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (dy,), (x, weight), bits = grad_outputs, ctx.saved_tensors, ctx.bits
        dx = rounded(dy, (1,), bits, stochastic=True) @ weight
        return dx, rounded(dy, (0,), bits, stochastic=True).T @ x, None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bits: int, stride: Any, padding: Any) -> Tensor:
        x, weight = rounded(x, (1,), bits), rounded(weight, (1, 2, 3), bits)
        ctx.save_for_backward(x, weight)
        ctx.settings = bits, stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (dy,), (x, weight), (bits, stride, padding) = grad_outputs, ctx.saved_tensors, ctx.settings
        by_output = rounded(dy, (1,), bits, stochastic=True)
        dx = grad.conv2d_input(x.shape, weight, by_output, stride, padding)
        by_sample = rounded(dy, (0, 2, 3), bits, stochastic=True)
        return dx, grad.conv2d_weight(x, weight.shape, by_sample, stride, padding), None, None, None


class PerChannelLinear(nn.Linear):
    """``nn.Linear`` on such operands."""

    bits = 8

    def forward(self, input: Tensor) -> Tensor:
        out = _Linear.apply(input.reshape(-1, self.in_features), self.weight, self.bits)
        return out.reshape(*input.shape[:-1], self.out_features) + (0 if self.bias is None else self.bias)


class PerChannelConv2d(nn.Conv2d):
    """``nn.Conv2d`` on such operands, without dilation and groups."""

    bits = 8

    def forward(self, input: Tensor) -> Tensor:
        out = _Conv.apply(input, self.weight, self.bits, self.stride, self.padding)
        return out if self.bias is None else out + self.bias[:, None, None]


def per_channel(model: nn.Module, bits: int) -> nn.Module:
    """Give every Conv2d and Linear of a model such operands, in place."""
    kinds = {nn.Linear: PerChannelLinear, nn.Conv2d: PerChannelConv2d}
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
            module.bits = bits  # type: ignore[assignment]
    return model
