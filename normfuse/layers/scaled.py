"""A product whose outputs are normalized by fixed statistics, at the memory of the product alone.

    r = 1 / sqrt(var + eps)     a = gamma r
    z = a (W x + b - mean) + beta  =  (a W) x + a (b - mean) + beta

With ``G = dJ/dz``, ``S = sum of G`` over all but the channels, and ``V`` the weight gradient of ``(a W) x``:

    dJ/dW = a V      dJ/db = a S      dJ/dbeta = S      dJ/dgamma = r (<V, W> + (b - mean) S)      dJ/dx = (a W)^T G

(arXiv 2305.11624; ``<V, W>`` is the sum of products per output channel.) Only ``x`` is kept for backward beside the
parameters and the statistics: ``a`` and ``a W`` are made again. Where the output is smaller than the weight, the output
is scaled instead, and ``<V, W> = <dJ/dW, W> / a``. Between two convolutions, which sweep the caches, operations on even
the smallest vectors are slow, so there are few: ``r``, which never changes, is kept.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from normfuse.layers.kept import Kept, kept_rstd
from normfuse.layers.products import Gradients, Needed, Product

PLAIN = (Tensor, nn.Parameter)  # types whose memory holds the numbers
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_tracing_state, _dispatch_mode = torch._C._get_tracing_state, torch._C._get_dispatch_mode
_are_transforms_active = torch._C._are_functorch_transforms_active


class Statistics(NamedTuple):
    """What a norm computes by in inference; every vector is ``(C,)``.

    Attributes:
        gain: ``gamma``, or None for 1.
        shift: ``beta``, or None for 0.
        mean: ``mean``.
        var: ``var``.
        eps: ``eps``.
        kept: Where ``r`` is kept from call to call; None to compute it, as tracers need.
    """

    gain: Tensor | None
    shift: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    kept: Kept | None = None

    def rstd(self) -> Tensor:
        """Return ``r``."""
        return torch.rsqrt(self.var + self.eps) if self.kept is None else kept_rstd(self.kept, self.var, self.eps)

    def scale(self) -> Tensor:
        """Return ``a``."""
        return self.rstd() if self.gain is None else self.rstd() * self.gain

    def offset(self, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``a (b - mean) + beta``."""
        if self.shift is None:
            return scale * (-self.mean if bias is None else bias - self.mean)
        return self.add_centred(self.shift, scale, bias)

    def add_centred(self, vector: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``vector + factor (b - mean)``."""
        if bias is None:
            return torch.addcmul(vector, factor, self.mean, value=-1)
        return torch.addcmul(vector, factor, bias - self.mean)


def needs_plain(*tensors: Tensor) -> bool:
    """Whether only :func:`plain` will do: for tracers, function transforms, and tensors that are not plain numbers."""
    if torch.compiler.is_compiling() or _tracing_state() is not None:
        return True
    if _are_transforms_active() or forward_ad._current_level >= 0 or _dispatch_mode(_PROXY) is not None:
        return True
    return any(type(tensor) not in PLAIN or tensor.is_meta for tensor in tensors)


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
        new = _scaled_in_scratch(weight, product.per_output(scale, weight), product)
        return product.run(x, _like(x, new), _like(x, offset))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Return the gradients of the tensors; differentiable where a graph is asked for."""
        x, weight, bias, gain, shift, mean, var = ctx.saved_tensors
        norm, product = Statistics(gain, shift, mean, var, ctx.eps, ctx.kept), ctx.product
        if torch.is_grad_enabled():
            return *_through_plain(ctx, grad, x, weight, bias, norm), *[None] * 5
        for_x, for_weight, for_bias, for_gain, for_shift, *_ = ctx.needs_input_grad
        rstd = norm.rstd()
        scale = rstd if gain is None else rstd * gain
        column = product.per_output(scale, weight)
        needed = for_x, for_weight or for_gain, for_bias or for_gain or for_shift
        if ctx.on_output:
            dx, v, total = _on_output(product, grad, x, weight, scale, needed)
        else:
            dx, v, total = _on_weight(product, grad, x, weight, column, needed)
        dgain = None
        if for_gain and v is not None and total is not None:
            dots = _dots(v, weight, product)
            dots = dots.div_(scale) if ctx.on_output else dots
            dgain = norm.add_centred(dots, total, bias).mul_(rstd)
        if for_weight and not ctx.on_output:
            product.by_output(v).mul_(column)
        dbias = scale * total if for_bias and total is not None else None
        return dx, v if for_weight else None, dbias, dgain, total if for_shift else None, *[None] * 5


def _prefers_output(x: Tensor, weight: Tensor, scale: Tensor, product: Product) -> bool:
    """Whether to scale the output: on a CPU, where it is the smaller one and no scale is too near zero to divide by."""
    if not x.is_cpu or x.dtype != weight.dtype or product.output_size(x.shape, weight.shape) >= weight.numel():
        return False
    return bool(scale.abs().min() > torch.finfo(scale.dtype).tiny ** 0.5)


def _on_weight(product: Product, grad: Tensor, x: Tensor, weight: Tensor, column: Tensor, needed: Needed) -> Gradients:
    """Return ``dJ/dx``, ``V`` and ``S``."""
    new = _scaled_in_scratch(weight, column, product) if needed[0] else weight
    dx, v, total = product.gradients(grad, x, _like(x, new), needed, column.dtype)
    return dx, None if v is None else _like(weight, v), total


def _like(other: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is other.dtype else tensor.to(other.dtype)


def _on_output(product: Product, grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needed: Needed) -> Gradients:
    """Return ``dJ/dx``, ``dJ/dW`` and ``S``."""
    scaled_grad = _times(grad, product.per_channel(scale, grad))
    dx, dw, total = product.gradients(scaled_grad, x, weight, needed, scale.dtype)
    return dx, dw, None if total is None else total / scale


def _dots(gradient: Tensor, weight: Tensor, product: Product) -> Tensor:
    """Return ``<V, W>``, the sums of products per output channel."""
    v, w = product.by_output(gradient), product.by_output(weight)
    products = _times(v, w)
    if v.dim() == weight.dim():
        return products.sum(tuple(range(1, v.dim())))
    return products.sum((1, *range(3, v.dim()))).flatten()


def _through_plain(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Statistics
) -> list[Tensor | None]:
    """Return the gradients of ``x, weight, bias, gain, shift`` with a graph of their own."""
    with torch.enable_grad():  # views: x may depend on the weight, and that way belongs to who made x
        given = [None if t is None else t.view_as(t) for t in (x, weight, bias, norm.gain, norm.shift)]
        wanted = [t for t, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
        z = plain(*given[:3], norm._replace(gain=given[3], shift=given[4]), ctx.product)  # type: ignore[arg-type]
        found = iter(torch.autograd.grad(z, wanted, grad, create_graph=True, allow_unused=True))  # type: ignore[arg-type]
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:5]]


_room = threading.local()
_LARGE = 1 << 15  # elements; above, an allocation comes as fresh pages, which the system must clear


def _is_large(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.numel() >= _LARGE


def _scratch(like: Tensor) -> Tensor:
    """Return a tensor of the same shape and strides whose memory every call in this thread shares.

    A fresh tensor of some megabytes costs more, in pages that the system must clear, than the arithmetic on it.
    """
    held: dict[torch.dtype, Tensor] = vars(_room).setdefault("held", {})
    size = like.numel()
    if like.dtype not in held or held[like.dtype].numel() < size:
        with torch.inference_mode(False):
            held[like.dtype] = torch.empty(size, dtype=like.dtype)
    room = held[like.dtype]
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return room.as_strided(like.shape, like.stride())
    return room[:size].view(like.shape)


def _times(one: Tensor, other: Tensor) -> Tensor:
    """Return a product in the dtype of its first factor, where it is large in memory that the next call overwrites."""
    return torch.mul(one, other, out=_scratch(one)) if _is_large(one) else _like(one, one * other)


def _scaled_in_scratch(weight: Tensor, column: Tensor, product: Product) -> Tensor:
    """Return ``a W``, where it is large in memory that the next call overwrites; ``a`` as a column of the weight."""
    if not _is_large(weight) or weight.dtype is not column.dtype:
        return (product.by_output(weight) * column).view(weight.shape)
    new = _scratch(weight)
    torch.mul(product.by_output(weight), column, out=product.by_output(new))
    return new
