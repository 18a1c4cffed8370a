"""What the weights of a model would lose in a narrower floating-point type, layer by layer.

A fold multiplies weights by ``gamma / sqrt(var + eps)``, which can move them out of the range of float16
(6e-8 to 65504) or spread the channels of a layer over many orders of magnitude, which costs accuracy in int8.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


@dataclass(frozen=True, slots=True)
class LayerRange:
    """The range of one layer's weight and bias, and what becomes of it in the target type.

    Attributes:
        name: Qualified name of the layer.
        layer: Its class name.
        dtype: The target type: ``"float16"``.
        max_weight: Largest magnitude of the weight.
        max_bias: Largest magnitude of the bias, 0 without one.
        channel_ratio: Largest over smallest of the output channels' largest magnitudes; all-zero channels left out.
        subnormal: Fraction of the elements that are subnormal in the target type and so keep fewer digits.
        flushed: Fraction of the elements that become zero, without being zero.
        overflowed: Fraction of the elements that become infinite.
    """

    name: str
    layer: str
    dtype: str
    max_weight: float
    max_bias: float
    channel_ratio: float
    subnormal: float
    flushed: float
    overflowed: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        loss = f"{self.subnormal:.1%} subnormal, {self.flushed:.1%} flushed, {self.overflowed:.1%} overflow"
        maxima = f"max |w| {self.max_weight:.3g}  max |b| {self.max_bias:.3g}"
        return f"{self.name}  {maxima}  channel ratio {self.channel_ratio:.1e}  {self.dtype}: {loss}"


def ranges(model: nn.Module, dtype: torch.dtype = torch.float16) -> tuple[LayerRange, ...]:
    """Return the range of every Conv, ConvTranspose and Linear (subclasses too), in the order of ``named_modules``.

    Args:
        model: The model; layers without a floating-point weight (lazy, quantized) are left out.
        dtype: The floating-point type that the weights are to be cast to.
    """
    return tuple(
        _range(name, module, dtype)
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and _floating(module.weight)
    )


def overflowing(model: nn.Module, dtype: torch.dtype = torch.float16) -> tuple[LayerRange, ...]:
    """Return the layers with elements that are finite now and infinite in the target type."""
    return tuple(layer for layer in ranges(model, dtype) if layer.overflowed)


def _floating(weight: Any) -> bool:
    if not isinstance(weight, Tensor) or is_lazy(weight):
        return False
    return weight.is_floating_point() and weight.numel() > 0


def _range(name: str, module: Any, dtype: torch.dtype) -> LayerRange:
    weight = module.weight.detach().double()
    bias = weight.new_zeros(0) if module.bias is None else module.bias.detach().double()
    values = torch.cat([weight.flatten(), bias.flatten()])
    narrow = values.to(dtype).double()
    nonzero, count = values != 0, values.numel()
    tiny = torch.finfo(dtype).tiny
    return LayerRange(
        name=name,
        layer=type(module).__name__,
        dtype=str(dtype).removeprefix("torch."),
        max_weight=float(weight.abs().max()),
        max_bias=float(bias.abs().max()) if bias.numel() else 0.0,
        channel_ratio=_channel_ratio(_by_channel(weight, module)),
        subnormal=int((nonzero & (narrow != 0) & (narrow.abs() < tiny)).sum()) / count,
        flushed=int((nonzero & (narrow == 0)).sum()) / count,
        overflowed=int((values.isfinite() & narrow.isinf()).sum()) / count,
    )


def _by_channel(weight: Tensor, module: nn.Module) -> Tensor:
    """Return the weight as (output channel, rest)."""
    if isinstance(module, TRANSPOSED):  # (in, out/groups, *kernel) -> (groups, in/groups, out/groups, rest)
        grouped = weight.reshape(module.groups, -1, weight.shape[1], weight[0, 0].numel())
        return grouped.transpose(1, 2).reshape(module.groups * weight.shape[1], -1)
    return weight.flatten(1)


def _channel_ratio(rows: Tensor) -> float:
    largest = rows.abs().amax(1)
    largest = largest[largest > 0]
    return float(largest.max() / largest.min()) if largest.numel() else 1.0
