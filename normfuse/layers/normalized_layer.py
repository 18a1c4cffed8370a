"""What a product in Tune mode computes: the value behind its norm, by the way that costs least for what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from normfuse.layers import normalized_convolution
from normfuse.layers.fixed_factors import WORTH, fixed_factors
from normfuse.layers.fixed_statistics import Statistics
from normfuse.layers.handshake import Member
from normfuse.layers.kept import Kept, is_distributed
from normfuse.layers.products import Convolution, Matrix, Product
from normfuse.layers.scaled import (
    PLAIN,
    ScaledProduct,
    effective_weight,
    is_written_down,
    needs_plain,
    normalized_after,
    plain,
    scaled,
    scaled_output,
)


@dataclass(slots=True)
class Pairing(Member):
    """Which norm a product applies.

    Attributes:
        channels: The channels of the norm that the product makes, in its order; None for all.
        same: Whether the layer pads its input as TensorFlow's ``SAME`` does.
        fixed: Keeps ``a`` and the offset of a frozen pair.
        rstd: Keeps ``r``.
        compiled: Keeps what runs the pair by the compiled kernels, which keeps the same as the first.
    """

    channels: slice | list[int] | None = None
    same: bool = False
    fixed: Kept = field(default_factory=Kept)
    rstd: Kept = field(default_factory=Kept)
    compiled: Kept = field(default_factory=Kept)

    @property
    def norm(self) -> nn.Module:
        """The norm; no part of the module tree of the product."""
        return cast(nn.Module, self.pair.norm.layer())

    def vectors(self) -> list[Any]:
        """Return ``gamma``, ``beta``, the means and the variances at present, for the channels of the product."""
        vectors = [_tensor(self.norm, name) for name in ("weight", "bias", "running_mean", "running_var")]
        if self.channels is not None:
            vectors = [None if vector is None else vector[self.channels] for vector in vectors]
        return vectors

    def statistics(self, *, keeps: bool) -> Statistics:
        """Return what the norm computes by."""
        gain, shift, mean, var = self.vectors()
        keeps = keeps and not isinstance(self.channels, list)  # which makes new vectors at every call
        return Statistics(gain, shift, mean, var, cast(Any, self.norm).eps, self.rstd if keeps else None)


def _tensor(layer: nn.Module, name: str) -> Any:
    """Return a parameter or buffer, without the detour through Python that ``getattr`` makes for them."""
    if name in layer._parameters:
        return layer._parameters[name]
    return layer._buffers[name] if name in layer._buffers else getattr(layer, name)


def normalized(layer: nn.Module, pairing: Pairing, x: Tensor, output_size: list[int] | None = None) -> Tensor:
    """Return ``z`` of :mod:`normfuse.layers.scaled` for a layer's input, ``(N, out, *)`` or ``(*, out)``."""
    weight, bias = _tensor(layer, "weight"), _tensor(layer, "bias")
    if isinstance(layer, nn.Linear):
        return normalized_product(x, weight, bias, pairing, Matrix())
    batched = x if x.dim() == weight.dim() else x.unsqueeze(0)
    padded, product = _geometry(layer, batched, output_size, pairing.same)
    z = normalized_product(padded, weight, bias, pairing, product)
    return z if batched is x else z.squeeze(0)


def normalized_product(x: Tensor, weight: Tensor, bias: Tensor | None, pairing: Pairing, product: Product) -> Tensor:
    """Return the normalized product, by the way that costs least for what is trained."""
    z = _by_kernels(x, weight, bias, pairing, product)
    if z is not None:
        return z
    traced = needs_plain(x, weight)
    norm = pairing.statistics(keeps=not traced)
    if traced:
        return (plain if is_written_down() else normalized_after)(x, weight, bias, norm, product)
    if torch._C._is_any_autocast_enabled() and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        return product.run(x, weight, bias)  # raises what the plain layer raises
    training = torch.is_grad_enabled()
    if training and weight.requires_grad:
        return cast(Tensor, ScaledProduct.apply(x, weight, bias, *norm[:5], product, norm.kept))
    if training and norm.gain is not None and norm.gain.requires_grad:  # costs less than a weight gradient for it alone
        return normalized_after(x, weight, bias, norm, product)
    scale, offset = fixed_factors(pairing.fixed, bias, norm)
    if training and any(t is not None and t.requires_grad for t in (bias, norm.shift)):
        offset = norm.offset(scale, bias)
    keeps = training and (x.requires_grad or offset.requires_grad)  # then autograd keeps the weight as well
    if product.output_size(x.shape, weight.shape) < (WORTH if keeps else 1) * weight.numel():
        return scaled_output(x, weight, scale, offset, product)
    factor = scaled(weight, scale, product).to(x.dtype) if keeps else effective_weight(weight, scale, product, x.dtype)
    return product.run(x, factor, offset.to(x.dtype))


def _by_kernels(x: Tensor, weight: Tensor, bias: Tensor | None, pairing: Pairing, product: Product) -> Tensor | None:
    """Return the normalized product, or None where no kernels are built or they do not take these tensors."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:  # which take no object of C++
        return None
    if type(x) not in PLAIN or type(weight) not in PLAIN:
        return None
    run = normalized_convolution.compiled(product, pairing.compiled)
    if run is None:
        return None
    return run(x, weight, bias, *pairing.vectors(), pairing.norm.eps, not is_distributed())


def _geometry(layer: Any, x: Tensor, output_size: list[int] | None, same: bool) -> tuple[Tensor, Convolution]:
    """Return the input, padded where zeros on both sides do not say it, and the geometry of what is left to do."""
    if isinstance(layer, _ConvTransposeNd):
        return x, _transposed_geometry(layer, x, output_size)
    padding = layer.padding
    if same:
        x, padding = _pad_same(x, layer), (0,) * len(layer.stride)
    elif layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = (0,) * len(layer.stride)
    elif isinstance(padding, str):
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        totals = totals if padding == "same" else [0] * len(totals)
        if any(total % 2 for total in totals):
            x, totals = F.pad(x, layer._reversed_padding_repeated_twice), [0] * len(totals)
        padding = tuple(total // 2 for total in totals)
    return x, Convolution(tuple(layer.stride), tuple(padding), tuple(layer.dilation), layer.groups)


def _transposed_geometry(layer: Any, x: Tensor, output_size: list[int] | None) -> Convolution:
    where = (layer.stride, layer.padding, layer.kernel_size)
    extra = layer._output_padding(x, output_size, *where, len(layer.kernel_size), layer.dilation)
    stride, padding, dilation = (tuple(value) for value in (layer.stride, layer.padding, layer.dilation))
    return Convolution(stride, padding, dilation, layer.groups, True, tuple(extra))


def _pad_same(x: Tensor, layer: Any) -> Tensor:
    """Pad so that the output has ``ceil(size / stride)`` elements along each axis, one more after than before."""
    widths: list[int] = []
    for size, k, s, d in zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        widths[:0] = [total // 2, total - total // 2]
    return F.pad(x, widths) if any(widths) else x
