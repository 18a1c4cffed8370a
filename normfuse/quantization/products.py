"""Linear and convolution as functions whose three products all run on integers.

    forward            Y  = X W^T     sums over inputs: X and W rounded to nearest, grouped by input
    input gradient     dX = dY W      sums over outputs: dY rounded stochastically, grouped by output
    weight gradient    dW = dY^T X    sums over samples: dY rounded stochastically, grouped by sample

X and W are quantized once. In the two backward products their groups lie along an axis that is kept, where a shift
only scales a column of the result. So what is saved for backward is int8: the quantized X (for a convolution the image,
not its windows) and the quantized W. Gradients are those of the product of the quantized operands; the
rounding itself counts as the identity (straight-through). A *reconstruction*, as is
:mod:`normfuse.quantization.shiftquant`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normfuse.quantization.columns import Windows, kernel_of_rows
from normfuse.quantization.matmul import Prepared, shiftquant_matmul
from normfuse.quantization.shiftquant import Quantized, ShiftQuant


class LinearProduct(torch.autograd.Function):
    """``X W^T`` for ``x (M, K)`` and ``weight (N, K)``, the latter also given prepared."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, prepared: Prepared, activation: ShiftQuant, gradient: ShiftQuant
    ) -> Tensor:
        """Return ``(M, N)``."""
        quantized = activation(x, dim=1)
        ctx.gradient = gradient
        _save(ctx, quantized, prepared.quantized)
        return shiftquant_matmul(quantized, prepared)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Return the gradients of ``x`` and ``weight``, where they are needed."""
        (dy,), (x, weight) = grad_outputs, _saved(ctx)
        dx = None if weight is None else input_gradient(dy, weight, ctx.gradient).to(ctx.dtypes[0])
        dw = None if x is None else weight_gradient(dy, x, ctx.gradient).to(ctx.dtypes[1])
        return dx, dw, None, None, None


class ConvProduct(torch.autograd.Function):
    """The convolution of ``x (N, C, H, W)`` with ``weight (out, C/groups, kh, kw)``, the latter prepared by group.

    ``x`` is quantized by channel, and all taps of a channel share its group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        prepared: list[Prepared],
        windows: Windows,
        activation: ShiftQuant,
        gradient: ShiftQuant,
    ) -> Tensor:
        """Return ``(N, out, H', W')``."""
        image = activation(x, dim=1)
        ctx.windows, ctx.gradient, ctx.image, ctx.kernel = windows, gradient, x.shape, weight.shape
        _save(ctx, image, *(p.quantized for p in prepared))
        parts = [shiftquant_matmul(_rows(image, group, len(prepared), windows), p) for group, p in enumerate(prepared)]
        size = windows.outputs(*x.shape[2:])
        return torch.cat(parts, dim=1).reshape(len(x), *size, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """Return the gradients of ``x`` and ``weight``, where they are needed."""
        (dy,), (image, *weights) = grad_outputs, _saved(ctx)
        images, kernels = [], []
        n, channels, height, width = ctx.image
        for group, (part, weight) in enumerate(zip(dy.chunk(len(weights), dim=1), weights, strict=True)):
            rows = part.permute(0, 2, 3, 1).flatten(0, 2)  # (N, out/g, H', W') -> (N H' W', out/g)
            if weight is not None:
                shape = (n, channels // len(weights), height, width)
                images.append(ctx.windows.scatter(input_gradient(rows, weight, ctx.gradient), shape))
            if image is not None:
                kernels.append(weight_gradient(rows, _rows(image, group, len(weights), ctx.windows), ctx.gradient))
        dx = torch.cat(images, dim=1).to(ctx.dtypes[0]) if images else None
        dw = kernel_of_rows(torch.cat(kernels), ctx.kernel).to(ctx.dtypes[1]) if kernels else None
        return dx, dw, None, None, None, None


def input_gradient(dy: Tensor, weight: Quantized, quantizer: ShiftQuant) -> Tensor:
    """Return ``dY W``, ``(M, K)``, for ``dy (M, N)`` and the weight ``(N, K)``."""
    return shiftquant_matmul(quantizer(dy, dim=1), weight.T)


def weight_gradient(dy: Tensor, x: Quantized, quantizer: ShiftQuant) -> Tensor:
    """Return ``dY^T X``, ``(N, K)``, for ``dy (M, N)`` and the input ``(M, K)``."""
    return shiftquant_matmul(quantizer(dy, dim=0).T, x.T)


def _rows(image: Quantized, group: int, groups: int, windows: Windows) -> Quantized:
    """Return the windows of one group of channels, ``(N outputs, taps C/groups)``, with a shift for each column."""
    values, shift = image.values.chunk(groups, dim=1)[group], image.shift.chunk(groups)[group]
    return dataclasses.replace(image, values=windows.gather(values), shift=shift.repeat(windows.taps), dim=1)


def _save(ctx: Any, x: Quantized, *weights: Quantized) -> None:
    """Save what the needed gradients take: the input for that of the weight, and the other way round."""
    need_x, need_weight = ctx.needs_input_grad[:2]
    kept = [x if need_weight else None, *(weight if need_x else None for weight in weights)]
    ctx.save_for_backward(*(tensor for q in kept if q is not None for tensor in (q.values, q.scale, q.shift)))
    ctx.described = [None if q is None else (q.dim, q.bits, q.groups, q.dtype) for q in kept]
    ctx.dtypes = x.dtype, weights[0].dtype


def _saved(ctx: Any) -> list[Quantized | None]:
    tensors = iter(ctx.saved_tensors)
    return [
        None if rest is None else Quantized(next(tensors), next(tensors), next(tensors), *rest)
        for rest in ctx.described
    ]
