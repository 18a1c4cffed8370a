"""A clamp that keeps its output for backward instead of its input.

The layer after it keeps that output as well, so it costs no memory; torch's keeps the input, in place even a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Clamp(torch.autograd.Function):
    """``min(max(x, low), high)``; its gradient is 1 strictly between the bounds, which the output tells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        """Return the clamped value; keep it."""
        if inplace:
            ctx.mark_dirty(x)
        y = x.clamp_(low, high) if inplace else x.clamp(low, high)
        ctx.bounds = low, high
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Let the gradient through where the output lies inside."""
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, y, *ctx.bounds), None, None, None
