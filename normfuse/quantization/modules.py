"""Layers whose forward and backward products run on ShiftQuant integers.

They are ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` with the same parameters in floating point, which an optimizer
updates; each call quantizes them (see :mod:`normfuse.quantization.products`). The bias is added in floating point. Part
of the reconstruction described in :mod:`normfuse.quantization.shiftquant`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.quantization.columns import Windows, kernel_rows
from normfuse.quantization.products import ConvProduct, LinearProduct
from normfuse.quantization.quantizing_layer import Precision, QuantizingLayer, require_plain, uncompiled

if TYPE_CHECKING:
    from typing_extensions import Self


class ShiftQuantLinear(QuantizingLayer, nn.Linear):
    """``nn.Linear`` on quantized operands: ``x (*, in_features)`` to ``(*, out_features)``.

    Args:
        in_features: As for ``nn.Linear``, like the arguments that follow.
        out_features: As above.
        bias: As above; added in floating point.
        device: As above.
        dtype: As above.
        precision: Bits and groups of the operands; 8 bits and 4 groups by default.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.precision = precision or Precision()

    @classmethod
    def from_float(cls, module: nn.Linear, precision: Precision | None = None) -> Self:
        """Return a layer that shares the parameters and the mode of ``module``.

        Raises:
            TypeError: ``module`` is not a plain ``nn.Linear``: another forward, a parametrized weight, or hooks.
        """
        require_plain(module, nn.Linear)
        new = cls(module.in_features, module.out_features, module.bias is not None, "meta", precision=precision)
        return _sharing(new, module)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input W^T + bias``, ``(*, out_features)``; a compiled model breaks its graph here."""
        return self._forward(input)

    @uncompiled
    def _forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        (prepared,) = self.prepared()
        out = LinearProduct.apply(rows, self.weight, prepared, self.precision.activation, self.precision.gradient)
        out = out.reshape(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def weight_rows(self, weight: Tensor) -> list[Tensor]:
        """Return the right operand ``(N, K)`` of each product, one for each group of a convolution."""
        return [weight]


class _QuantizingConv(QuantizingLayer, nn.modules.conv._ConvNd):
    """What the convolutions share; a one-dimensional one is two-dimensional of height 1."""

    source: ClassVar[type[nn.modules.conv._ConvNd]]

    def __init__(self, *args: Any, precision: Precision | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.precision = precision or Precision()

    @classmethod
    def from_float(cls, module: nn.Conv1d | nn.Conv2d, precision: Precision | None = None) -> Self:
        """Return a layer that shares the parameters and the mode of ``module``.

        Raises:
            TypeError: ``module`` is not the plain layer of torch: another forward, a parametrized weight, or hooks.
        """
        require_plain(module, cls.source)
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
        sizes, bias = (module.in_channels, module.out_channels), module.bias is not None
        return _sharing(cls(*sizes, *geometry, bias, module.padding_mode, "meta", precision=precision), module)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``(N, C, *)`` or ``(C, *)``; a compiled model breaks its graph here."""
        return self._forward(input)

    @uncompiled
    def _forward(self, input: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        if input.dim() not in (dims + 1, dims + 2):
            raise ValueError(f"expected (N, C, *) or (C, *) with {dims} sizes, not {tuple(input.shape)}")
        x = input if input.dim() == dims + 2 else input.unsqueeze(0)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected {self.in_channels} channels, not {x.shape[1]} in {tuple(input.shape)}")
        padding = self._pads()
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, padding, mode=self.padding_mode), (0,) * len(padding)
        out = self._convolve(x, (*padding, 0, 0)[:4])
        if self.bias is not None:
            out = out + self.bias.reshape(-1, *[1] * dims)
        if not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            out = out.contiguous()
        return out if input.dim() == dims + 2 else out.squeeze(0)

    def _convolve(self, x: Tensor, padding: tuple[int, ...]) -> Tensor:
        flat, weight = x.dim() == 3, self.weight
        if flat:
            x, weight = x.unsqueeze(2), weight.unsqueeze(2)  # (N, C, L) -> (N, C, 1, L)
        windows = Windows(_pair(self.kernel_size), _pair(self.stride), _pair(self.dilation), padding)  # type: ignore[arg-type]
        out = ConvProduct.apply(x, weight, self.prepared(), windows, self.precision.activation, self.precision.gradient)
        return out.squeeze(2) if flat else out

    def _pads(self) -> tuple[int, ...]:
        """Return the padding as ``F.pad`` takes it, the last axis first."""
        if isinstance(self.padding, str):
            return tuple(self._reversed_padding_repeated_twice)
        return tuple(size for size in reversed(self.padding) for _ in range(2))

    def weight_rows(self, weight: Tensor) -> list[Tensor]:
        """Return the right operand ``(N, K)`` of each product, one for each group of a convolution."""
        kernel = weight.unsqueeze(2) if weight.dim() == 3 else weight
        return list(kernel_rows(kernel).chunk(self.groups))


class ShiftQuantConv1d(_QuantizingConv, nn.Conv1d):
    """``nn.Conv1d`` on quantized operands: ``x (N, C, L)`` to ``(N, out, L')``.

    Args:
        *args: As for ``nn.Conv1d``. The bias is added in floating point.
        precision: Bits and groups of the operands; 8 bits and 4 groups by default.
        **kwargs: As for ``nn.Conv1d``.
    """

    source = nn.Conv1d


class ShiftQuantConv2d(_QuantizingConv, nn.Conv2d):
    """``nn.Conv2d`` on quantized operands: ``x (N, C, H, W)`` to ``(N, out, H', W')``.

    Args:
        *args: As for ``nn.Conv2d``. The bias is added in floating point.
        precision: Bits and groups of the operands; 8 bits and 4 groups by default.
        **kwargs: As for ``nn.Conv2d``.
    """

    source = nn.Conv2d


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _sharing(new: Any, module: nn.Linear | nn.Conv1d | nn.Conv2d) -> Any:
    new.weight, new.bias = module.weight, module.bias
    return new.train(module.training)
