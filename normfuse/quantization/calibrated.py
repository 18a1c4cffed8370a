"""Layers of fixed integers: int8 weights, and inputs quantized with scales that were found on data.

With ``q = 2^(bits-1) - 1``, a scale ``s_0`` and a shift ``g_k`` of each input channel,

    x_k ~ s_0 2^-g_k Xq_k,    Xq_k = clip(round(x_k 2^g_k / s_0), -q, q)                      at each call
    W_nk 2^-g_k ~ t_n Wq_nk,  Wq_nk = round(W_nk 2^-g_k / t_n),  t_n = max_k |W_nk| 2^-g_k / q    once

    y_n = s_0 t_n sum_k Xq_k Wq_nk + b_n

since ``sum_k (s_0 2^-g_k Xq_k) W_nk = s_0 sum_k Xq_k (W_nk 2^-g_k)``: the power of two of a channel is part of the
stored weights, and the product is one plain int8 product without shifts. ``t_n`` is a scale for each output (*per
channel*), or one for all of them (*per tensor*). Where a convolution has one input channel to each output (depthwise),
the shift goes into ``t_n`` and costs the weights nothing; elsewhere the weights lose resolution in channels with a
shift, which is why the number of groups is found on data. Part of the reconstruction described in
:mod:`normfuse.quantization.shiftquant`.

Code around a layer asks its ``weight`` for a dtype, a device or a shape, as vision models cast their pixels to it. So
the buffer of that name holds Wq, and the attribute answers with what the integers stand for, in floating point:

    weight_nk = t_n 2^g_k Wq_nk ~ W_nk
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.quantization.columns import Windows, kernel_rows
from normfuse.quantization.grouped import grouped_sums
from normfuse.quantization.matmul import Prepared, integer_product
from normfuse.quantization.quantizing_layer import QuantizingLayer, uncompiled
from normfuse.quantization.shiftquant import Quantized, along, powers_of_half

if TYPE_CHECKING:
    from typing_extensions import Self


class CalibratedLayer(QuantizingLayer):
    """What the calibrated layers share: integers, their scales, and the product.

    Attributes:
        weight_scale: t, ``(out,)``.
        input_scale: s_0, 0-d.
        input_shift: g, int8, ``(in,)``.
        bias: ``(out,)`` in the dtype of the layer, or None.
        bits: Of weights and inputs, 3 to 8.
    """

    bits: int
    weight_scale: Tensor
    input_scale: Tensor
    input_shift: Tensor
    bias: Tensor | None

    def _make(self, weight: tuple[int, ...], inputs: int, bias: bool, bits: int) -> None:
        """Make the tensors; ``weight`` is its shape and ``inputs`` the number of input channels.

        Scales and bias are parameters that take no gradient, so that a model still shows its device and dtype; the
        bias comes first, since models answer with the dtype of their first parameter, and scales can be wider.
        """
        if not 3 <= bits <= 8:
            raise ValueError(f"bits must be 3 to 8, not {bits}")
        self.bits = bits
        self.bias = nn.Parameter(torch.zeros(weight[0]), requires_grad=False) if bias else None
        # not by register_buffer, which takes no name that the class answers to
        self._buffers["weight"] = torch.zeros(weight, dtype=torch.int8)
        self.weight_scale = nn.Parameter(torch.ones(weight[0]), requires_grad=False)
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_shift", torch.zeros(inputs, dtype=torch.int8))

    @property
    def integers(self) -> Tensor:
        """Wq, int8, of the shape that the layer's weight has; the entry ``weight`` of a state dict."""
        return cast("Tensor", self._buffers["weight"])

    @property
    def weight(self) -> Tensor:
        """What the integers stand for, in the dtype of the layer; worked out at each reading, and never trained."""
        scale = self.weight_scale.detach()
        groups, (outputs, inputs) = getattr(self, "groups", 1), self.integers.shape[:2]
        columns = powers_of_half(self.input_shift, scale.dtype).reciprocal().reshape(groups, 1, inputs)
        factors = (scale.reshape(groups, -1, 1) * columns).reshape(outputs, inputs, *[1] * (self.integers.dim() - 2))
        return (self.integers * factors).to(scale.dtype if self.bias is None else self.bias.dtype)

    @property
    def limit(self) -> int:
        """The largest magnitude of an integer, ``q``."""
        return 2 ** (self.bits - 1) - 1

    @property
    def input_groups(self) -> int:
        """How many different scales the input channels have."""
        return len(self.input_shift.unique())

    def train(self, mode: bool = True) -> Self:
        """Set the mode, which changes nothing here."""
        self.training = mode
        return self

    def extra_repr(self) -> str:
        """Show the sizes, the bits, and how many scales the inputs have."""
        return f"{tuple(self.integers.shape)}, bits={self.bits}, input_groups={self.input_groups}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Convert as torch does, but keep scales in float32 at least: float16 has no numbers that small."""
        scales = {name: getattr(self, name).detach() for name in ("weight_scale", "input_scale")}
        super()._apply(fn, recurse)
        for name, value in scales.items():
            now = getattr(self, name)
            if now.is_floating_point() and torch.finfo(now.dtype).bits < 32:
                now.data = value.detach().to(device=now.device, dtype=torch.float32)
        return self

    def quantize_input(self, x: Tensor, dim: int) -> Tensor:
        """Return Xq, int8, for the input ``x`` whose channels lie along ``dim``; what is beyond its range saturates.

        Raises:
            ValueError: ``x`` holds NaN.
        """
        dtype = self.input_scale.dtype
        parts = powers_of_half(self.input_shift, dtype).reshape(along(dim, x.dim()))
        scaled = (x.to(dtype) / parts / self.input_scale).round_().clamp_(-self.limit, self.limit)
        if bool(scaled.isnan().any()):
            raise ValueError("cannot quantize NaN: find where the tensor stopped being a number")
        return scaled.to(torch.int8)

    def weight_rows(self, weight: Tensor) -> list[Tensor]:
        """Return the right operand ``(N, K)`` of each product, one for each group of a convolution."""
        raise NotImplementedError

    def prepared(self) -> list[Prepared]:
        """Return the right operand of each product, kept from the first call on."""
        mode, self.training = self.training, False
        try:
            return super().prepared()
        finally:
            self.training = mode

    def _stored(self) -> Tensor:
        return self.integers

    def _quantize(self, weight: Tensor, *, reused: bool) -> list[Prepared]:
        return [Prepared(_plain(rows, self.bits), reused=reused) for rows in self.weight_rows(weight)]

    def _products(self, rows: list[Tensor]) -> Tensor:
        """Return ``s_0 t_n sum_k Xq_k Wq_nk``, ``(M, out)``, for the rows ``(M, K)`` of each group."""
        pairs = zip(rows, self.prepared(), strict=True)
        sums = torch.cat([integer_product(_plain(part, self.bits), right)[0] for part, right in pairs], dim=1)
        return sums.to(self.weight_scale.dtype) * (self.weight_scale * self.input_scale)


def _plain(values: Tensor, bits: int) -> Quantized:
    """Return integers as an operand of one group and scale 1."""
    shift = torch.zeros(values.shape[1], dtype=torch.int8, device=values.device)
    one = torch.ones((), device=values.device)
    return Quantized(values.contiguous(), one, shift, 1, bits, 1, torch.float32)


class CalibratedLinear(CalibratedLayer):
    """``nn.Linear`` in fixed integers: ``x (*, in_features)`` to ``(*, out_features)``; no gradient passes.

    Args:
        in_features: As for ``nn.Linear``.
        out_features: As above.
        bias: As above.
        bits: Of weights and inputs.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, bits: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._make((out_features, in_features), in_features, bias, bits)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output in the dtype of ``input``; a compiled model breaks its graph here."""
        return self._forward(input)

    @uncompiled
    @torch.no_grad()
    def _forward(self, input: Tensor) -> Tensor:
        values = self.quantize_input(input, input.dim() - 1)
        out = self._products([values.reshape(-1, self.in_features)])
        out = out if self.bias is None else out + self.bias
        return out.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def weight_rows(self, weight: Tensor) -> list[Tensor]:
        """Return the weight as it is."""
        return [weight]


class _CalibratedConv(CalibratedLayer):
    """What the convolutions share; arguments as for torch's, and ``bits``."""

    dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] | str = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        bits: int = 8,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups, self.padding_mode = (
            in_channels,
            out_channels,
            groups,
            padding_mode,
        )
        self.kernel_size, self.stride, self.dilation = (tuple(v[-self.dims :]) for v in (kernel_size, stride, dilation))
        self.pads = self._pads(padding)
        """As ``F.pad`` takes them, the last axis first."""
        self._make((out_channels, in_channels // groups, *self.kernel_size), in_channels, bias, bits)

    def _pads(self, padding: tuple[int, ...] | str) -> tuple[int, ...]:
        if padding == "valid":
            return (0,) * (2 * self.dims)
        if isinstance(padding, str):  # "same": the larger half behind, as torch does
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple(half for total in reversed(totals) for half in (total // 2, total - total // 2))
        return tuple(size for size in reversed(padding[-self.dims :]) for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``(N, C, *)`` or ``(C, *)`` in the dtype of ``input``; compiled, a graph break."""
        return self._forward(input)

    @uncompiled
    @torch.no_grad()
    def _forward(self, input: Tensor) -> Tensor:
        x = input if input.dim() == self.dims + 2 else input.unsqueeze(0)
        pads = self.pads
        if self.padding_mode != "zeros":
            x, pads = F.pad(x, pads, mode=self.padding_mode), (0,) * len(pads)
        out = self._convolve(self.quantize_input(x, 1), (*pads, 0, 0)[:4])
        if self.bias is not None:
            out = out + self.bias.reshape(-1, *[1] * self.dims)
        if not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            out = out.contiguous()
        return (out if input.dim() == self.dims + 2 else out.squeeze(0)).to(input.dtype)

    def _convolve(self, values: Tensor, pads: tuple[int, ...]) -> Tensor:
        flat = self.dims == 1
        image, kernel = (t.unsqueeze(2) if flat else t for t in (values, self.integers))  # (N, C, L) -> (N, C, 1, L)
        sizes = ((1, *size)[-2:] for size in (self.kernel_size, self.stride, self.dilation))
        windows = Windows(*sizes, pads)  # type: ignore[arg-type]
        shape = windows.outputs(*image.shape[2:])
        sums = grouped_sums(image, kernel, self.groups, windows, self.limit) if self.groups > 1 else None
        if sums is not None:
            out = sums.to(self.weight_scale.dtype) * (self.weight_scale * self.input_scale).reshape(-1, 1, 1)
        else:
            out = self._products([windows.gather(part) for part in image.chunk(self.groups, dim=1)])
            out = out.reshape(len(image), *shape, -1).permute(0, 3, 1, 2)
        return out.squeeze(2) if flat else out

    def weight_rows(self, weight: Tensor) -> list[Tensor]:
        """Return one operand ``(out / groups, taps * in / groups)`` for each group."""
        return list(kernel_rows(weight.unsqueeze(2) if self.dims == 1 else weight).chunk(self.groups))


class CalibratedConv1d(_CalibratedConv):
    """``nn.Conv1d`` in fixed integers: ``x (N, C, L)`` to ``(N, out, L')``; no gradient passes."""

    dims = 1


class CalibratedConv2d(_CalibratedConv):
    """``nn.Conv2d`` in fixed integers: ``x (N, C, H, W)`` to ``(N, out, H', W')``; no gradient passes."""

    dims = 2
