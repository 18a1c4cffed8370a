"""Layers in Tune mode: a product that applies the norm after it, and a norm that stays out of the way.

A layer of the user's is put into Tune mode by a change of its class, to a subclass made here; the object, its
parameters and its buffers stay. The product reads the statistics and the affine parameters of the norm at every call,
through a reference that is no part of the module tree, and returns the normalized value
(:mod:`normfuse.layers.scaled`). The norm returns its input. A norm that no product applies keeps its own arithmetic.
The statistics of both stay as they are, whatever ``train()`` says.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from normfuse.layers import normalized_convolution
from normfuse.layers.clamp import Clamp
from normfuse.layers.fixed_factors import WORTH, fixed_factors
from normfuse.layers.fixed_statistics import Statistics
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

_STATE = "_normfuse_tuned"


@dataclass(slots=True)
class Pairing:
    """Which norm a product applies.

    Attributes:
        norm: The norm; no part of the module tree of the product.
        channels: The channels of the norm that the product makes, in its order; None for all.
        same: Whether the layer pads its input as TensorFlow's ``SAME`` does.
        fixed: Keeps ``a`` and the offset of a frozen pair.
        rstd: Keeps ``r``.
        compiled: Keeps what runs the pair by the compiled kernels, which keeps the same as the first.
    """

    norm: nn.Module
    channels: slice | list[int] | None = None
    same: bool = False
    fixed: Kept = field(default_factory=Kept)
    rstd: Kept = field(default_factory=Kept)
    compiled: Kept = field(default_factory=Kept)

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


class TunedLayer(nn.Module):
    """What all layers in Tune mode have in common: they know the class they had, and are pickled under it."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Name the class, which no module holds, by what it was made from."""
        kind = cast(Any, type(self))._normfuse_kind
        return _rebuild, (kind, original_class(self)), dict(vars(self))


class TunedProduct(TunedLayer):
    """A convolution or linear layer that returns the value after its norm."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return ``z`` of :mod:`normfuse.layers.scaled`, ``(N, out, *)`` or ``(*, out)``."""
        x, layer = input, self
        pairing: Pairing = vars(layer)[_STATE]
        weight, bias = _tensor(layer, "weight"), _tensor(layer, "bias")
        if isinstance(layer, nn.Linear):
            return normalized_product(x, weight, bias, pairing, Matrix())
        batched = x if x.dim() == weight.dim() else x.unsqueeze(0)
        padded, product = _geometry(layer, batched, output_size, pairing.same)
        z = normalized_product(padded, weight, bias, pairing, product)
        return z if batched is x else z.squeeze(0)


class TunedNorm(TunedLayer):
    """A norm that a product applies: returns its input, through whatever else the layer did after normalizing."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input after the layers that follow the normalization inside this one."""
        x = input
        for path in vars(self)[_STATE]:
            x = self.get_submodule(path)(x)
        return x


class FixedNorm(TunedLayer):
    """A norm by its stored statistics, in whichever mode the model is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the layer does in eval mode; what it contains follows the mode of the model."""
        training, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


class TunedReLU6(TunedLayer):
    """A clamp that keeps its output for backward, which the next layer keeps as well, in place of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input clamped to ``[min_val, max_val]``."""
        x, layer = input, cast(Any, self)
        if not (torch.is_grad_enabled() and x.requires_grad) or needs_plain(x):
            return F.hardtanh(x, layer.min_val, layer.max_val, layer.inplace)
        return cast(Tensor, Clamp.apply(x, layer.min_val, layer.max_val, layer.inplace))


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


# change of class


@functools.cache
def tuned_class(kind: type[TunedLayer], cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``cls`` that runs in Tune mode as ``kind``."""
    name = f"Tuned{cls.__name__}" if kind is not FixedNorm else f"Fixed{cls.__name__}"
    return type(name, (kind, cls), {"__module__": __name__, "_normfuse_kind": kind, "_normfuse_class": cls})


def enter(layer: nn.Module, kind: type[TunedLayer], state: object = None) -> None:
    """Put one layer into Tune mode."""
    vars(layer)[_STATE] = state
    layer.__class__ = tuned_class(kind, type(layer))


def leave(layer: nn.Module) -> None:
    """Give a layer the class back that it had; any other layer stays as it is."""
    if isinstance(layer, TunedLayer):
        del vars(layer)[_STATE]
        layer.__class__ = original_class(layer)  # type: ignore[assignment]


def leave_all(model: nn.Module) -> None:
    """Give every layer of a model the class back that it had."""
    for module in list(model.modules()):
        leave(module)


@contextlib.contextmanager
def left(model: nn.Module) -> Iterator[None]:
    """Run a block with every layer of a model in the class that it had, and put all back into Tune mode afterwards."""
    states = [(layer, type(layer), vars(layer)[_STATE]) for layer in model.modules() if isinstance(layer, TunedLayer)]
    leave_all(model)
    try:
        yield
    finally:
        for layer, cls, state in states:
            vars(layer)[_STATE] = state
            layer.__class__ = cls


def original_class(layer: TunedLayer) -> type[nn.Module]:
    """Return the class that a layer had before Tune mode."""
    return cast(Any, type(layer))._normfuse_class


def _rebuild(kind: type[TunedLayer], cls: type[nn.Module]) -> nn.Module:
    made = tuned_class(kind, cls)
    return made.__new__(made)
