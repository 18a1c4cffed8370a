"""A product whose outputs are normalized by fixed statistics, at the memory of the product alone.

    r = 1 / sqrt(var + eps)     a = gamma r
    z = a (W x + b - mean) + beta  =  (a W) x + a (b - mean) + beta

With ``G = dJ/dz``, ``S = sum of G`` over all but the channels, and ``V`` the weight gradient of ``(a W) x``:

    dJ/dW = a V      dJ/db = a S      dJ/dbeta = S      dJ/dgamma = r (<V, W> + (b - mean) S)      dJ/dx = (a W)^T G

(arXiv 2305.11624; ``<V, W>`` is the sum of products per output channel; :mod:`normfuse.layers.gain_gradient` says what
is done where the terms of ``dJ/dgamma`` cancel.) Only ``x`` is kept for backward beside the parameters and the
statistics: ``a`` and ``a W`` are made again. Where the output is smaller than the weight, the output is scaled instead,
and ``<V, W> = <dJ/dW, W> / a``. Between two convolutions, which sweep the caches, operations on even the smallest
vectors are slow, so there are few: ``r``, which never changes, is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from normfuse.layers.fixed_statistics import Statistics
from normfuse.layers.gain_gradient import gain_gradient, gain_gradient_from_output
from normfuse.layers.kept import Kept
from normfuse.layers.products import Gradients, Matrix, Needed, Product
from normfuse.layers.scratch import is_large, scratch, times

PLAIN = (Tensor, nn.Parameter)  # types whose memory holds the numbers
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_tracing_state, _dispatch_mode = torch._C._get_tracing_state, torch._C._get_dispatch_mode
_are_transforms_active = torch._C._are_functorch_transforms_active


def needs_plain(*tensors: Tensor) -> bool:
    """Whether only plain operations will do: for tracers, function transforms, tensors that are not plain numbers."""
    if torch.compiler.is_compiling() or _tracing_state() is not None:
        return True
    if _are_transforms_active() or forward_ad._current_level >= 0 or _dispatch_mode(_PROXY) is not None:
        return True
    return any(type(tensor) not in PLAIN or tensor.is_meta for tensor in tensors)


def is_written_down() -> bool:
    """Whether what is computed now is being written down, as one program for later, rather than differentiated."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _tracing_state() is not None or _dispatch_mode(_PROXY) is not None


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Statistics, product: Product) -> Tensor:
    """Return ``z`` by the operations of the formula, each of which autograd, tracers and transforms know."""
    scale = norm.scale()
    return product.run(x, scaled(weight, scale, product).to(x.dtype), norm.offset(scale, bias).to(x.dtype))


def scaled(weight: Tensor, scale: Tensor, product: Product) -> Tensor:
    """Return ``a W`` in the layout of the weight."""
    new = product.by_output(weight) * product.per_output(scale, weight)
    return new if new.dim() == weight.dim() else new.view(weight.shape)


def scaled_output(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, product: Product) -> Tensor:
    """Return ``a (W x)`` plus an offset per channel: the output is scaled, in place, not the weight."""
    y = product.run(x, weight.to(x.dtype), None)
    scale, offset = product.per_channel(scale, y), product.per_channel(offset, y)
    if y.is_cpu and y.dtype is scale.dtype:
        return y.mul_(scale).add_(offset)  # fast loops on a CPU; addcmul has none for operands that are broadcast
    return torch.addcmul(offset, y, scale).to(x.dtype)


def effective_weight(weight: Tensor, scale: Tensor, product: Product, dtype: torch.dtype) -> Tensor:
    """Return ``a W`` in a dtype, where it is large in memory that the next call overwrites."""
    new = _scaled_in_scratch(weight, product.per_output(scale, weight), product)
    return new if new.dtype is dtype else new.to(dtype)


def normalized_after(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Statistics, product: Product) -> Tensor:
    """Return ``z`` by the operations of eval mode, which keep the output of the product for backward.

    A compiler fuses them into what follows, and recomputes what it can; function transforms get eval mode's gradients.
    """
    y = product.run(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    rows = y.reshape(-1, y.shape[-1]) if isinstance(product, Matrix) and y.dim() != 2 else y
    return F.batch_norm(rows, norm.mean, norm.var, norm.gain, norm.shift, False, 0.0, norm.eps).view(y.shape)


class ScaledProduct(torch.autograd.Function):
    """``z`` of the module docstring, with the weight trainable."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        shift: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        product: Product,
        kept: Kept | None = None,
    ) -> Tensor:
        """Return ``z``; keep ``x`` and what the layer and its norm hold."""
        norm = Statistics(gain, shift, mean, var, eps, kept)
        scale = norm.scale()
        offset = norm.offset(scale, bias)
        ctx.eps, ctx.kept, ctx.product, ctx.on_output = eps, kept, product, _prefers_output(x, weight, scale, product)
        ctx.save_for_backward(x, weight, bias, gain, shift, mean, var)
        if ctx.on_output:
            return scaled_output(x, weight, scale, offset, product)
        return product.run(x, effective_weight(weight, scale, product, x.dtype), _like(x, offset))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Return the gradients of the tensors; differentiable where a graph is asked for."""
        x, weight, bias, gain, shift, mean, var = ctx.saved_tensors
        norm, product = Statistics(gain, shift, mean, var, ctx.eps, ctx.kept), ctx.product
        if torch.is_grad_enabled():
            return *_through_eval(ctx, grad, x, weight, bias, norm), *[None] * 5
        for_x, for_weight, for_bias, for_gain, for_shift, *_ = ctx.needs_input_grad
        scale = norm.scale()
        column = product.per_output(scale, weight)
        needed = for_x, for_weight or for_gain, for_bias or for_gain or for_shift
        way = _on_output if ctx.on_output else _on_weight
        dx, v, total = way(product, grad, x, weight, scale, needed)
        dgain = None
        if for_gain and v is not None and total is not None:
            by = scale if ctx.on_output else None
            dgain, cancels = gain_gradient(v, total, weight, bias, norm, product, by)
            if cancels:
                dgain = gain_gradient_from_output(grad, x, weight, bias, norm, product)
        if for_weight and not ctx.on_output:
            product.by_output(v).mul_(column)
        dbias = scale * total if for_bias and total is not None else None
        return dx, v if for_weight else None, dbias, dgain, total if for_shift else None, *[None] * 5


def _prefers_output(x: Tensor, weight: Tensor, scale: Tensor, product: Product) -> bool:
    """Whether to scale the output: on a CPU, where it is the smaller one and no scale is too near zero to divide by."""
    if not x.is_cpu or x.dtype != weight.dtype or product.output_size(x.shape, weight.shape) >= weight.numel():
        return False
    return bool(scale.abs().min() > torch.finfo(scale.dtype).tiny ** 0.5)


def _on_weight(product: Product, grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needed: Needed) -> Gradients:
    """Return ``dJ/dx``, ``V`` and ``S``."""
    new = effective_weight(weight, scale, product, x.dtype) if needed[0] else _like(x, weight)
    dx, v, total = product.gradients(grad, x, new, needed, scale.dtype)
    return dx, None if v is None else _like(weight, v), total


def _like(other: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is other.dtype else tensor.to(other.dtype)


def _on_output(product: Product, grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needed: Needed) -> Gradients:
    """Return ``dJ/dx``, ``dJ/dW`` and ``S``."""
    total = product.total(grad, scale.dtype) if needed[2] else None
    scaled_grad = times(grad, product.per_channel(scale, grad))
    dx, dw, _ = product.gradients(scaled_grad, x, weight, (*needed[:2], False), scale.dtype)
    return dx, dw, total


def _through_eval(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Statistics
) -> list[Tensor | None]:
    """Return the gradients of ``x, weight, bias, gain, shift`` with a graph of their own, by eval mode's operations."""
    with torch.enable_grad():  # views: x may depend on the weight, and that way belongs to who made x
        given = [None if t is None else t.view_as(t) for t in (x, weight, bias, norm.gain, norm.shift)]
        wanted = [t for t, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
        fixed = norm._replace(gain=given[3], shift=given[4])
        z = normalized_after(*given[:3], fixed, ctx.product)  # type: ignore[arg-type]
        found = iter(torch.autograd.grad(z, wanted, grad, create_graph=True, allow_unused=True))  # type: ignore[arg-type]
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:5]]


def _scaled_in_scratch(weight: Tensor, column: Tensor, product: Product) -> Tensor:
    """Return ``a W``, where it is large in memory that the next call overwrites; ``a`` as a column of the weight."""
    if not is_large(weight) or weight.dtype is not column.dtype:
        return (product.by_output(weight) * column).view(weight.shape)
    new = scratch(weight)
    torch.mul(product.by_output(weight), column, out=product.by_output(new))
    return new
