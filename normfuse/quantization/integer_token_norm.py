"""L1LayerNorm and L1RMSNorm on quantized values: int8 in, int8 out, integers in between.

    L1LayerNorm:  z = (x_q - mean) / (f s + eps / s_x)     s = E|x_q - mean|
    L1RMSNorm:    z = x_q / (f s + eps / s_x)              s = E|x_q|
                  y_q = clip((gamma / s_y) z + beta / s_y)

with statistics over a row, in integers; f, gamma, beta and eps of the layer in floating point. See
:mod:`normfuse.quantization.integer_norm`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from normfuse.layers.l1_layer_norm import L1LayerNorm, L1RMSNorm, L1TokenNorm
from normfuse.layers.mean_deviation import deviation_factor
from normfuse.numerics import exact
from normfuse.quantization import integer_arithmetic, native_norms
from normfuse.quantization.integer_arithmetic import NormForm, make_form
from normfuse.quantization.integer_fractions import LARGEST, fraction_bits, largest_error
from normfuse.quantization.integer_norm import IntegerNorm

if TYPE_CHECKING:
    from typing_extensions import Self


class _IntegerTokenNorm(IntegerNorm):
    """An L1 norm of tokens in integers, over the last axes of an int8 tensor.

    Attributes:
        gain: int16 ``(m,)``: ``gamma / s_y``.
        shift: int16 ``(m,)``: ``beta / s_y`` and half a step.
        form: The constants of the arithmetic.
        peak: Normalized values ``|z|`` up to here are represented; larger ones may be clipped to it. It is chosen so
            that outputs are clipped there anyway, as far as the spread of the gains allows.
    """

    source: ClassVar[type[L1TokenNorm]]
    gain: Tensor
    shift: Tensor

    def __init__(
        self,
        normalized_shape: tuple[int, ...],
        form: NormForm,
        gain: Tensor,
        shift: Tensor,
        *,
        input_scale: float,
        output_scale: float,
        bits: int,
        bound: float,
    ) -> None:
        super().__init__(input_scale, output_scale, bits)
        self.normalized_shape = tuple(normalized_shape)
        self.form = form
        self._bound = bound
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    @property
    def peak(self) -> float:
        """The largest normalized magnitude that is always represented."""
        return 2.0 ** (13 - self.form.fraction) - 1

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: L1TokenNorm, input_scale: float, output_scale: float, bits: int = 8) -> Self:
        """Return the integer form of a layer.

        Args:
            layer: The layer; its parameters are read in float64.
            input_scale: s_x, the step of the inputs.
            output_scale: s_y, the step of the outputs.
            bits: Of the outputs, 4 to 8.

        Raises:
            TypeError: ``layer`` is not of the class that this is the integer form of.
            ValueError: A scale is not positive or too small for the layer, or a row is longer than 2^15.
        """
        if type(layer) is not cls.source:
            raise TypeError(f"{type(layer).__name__} is not an {cls.source.__name__}")
        scales: Any = {"input_scale": input_scale, "output_scale": output_scale, "bits": bits}
        limit = IntegerNorm(**scales).limit
        size = math.prod(layer.normalized_shape)
        gain = torch.ones(size, dtype=torch.float64) if layer.weight is None else exact(layer.weight).flatten()
        shift = torch.zeros_like(gain) if layer.bias is None else exact(layer.bias).flatten()
        gain, shift = gain / output_scale, shift / output_scale
        fraction, output = fraction_bits(gain, shift, size / 2 if layer.centred else size, limit)
        form = make_form(size, deviation_factor(layer.gaussian), layer.eps / input_scale, fraction, output, limit)
        gains = (gain * 2.0 ** (15 + output - fraction)).round().clamp(-LARGEST, LARGEST)
        shifts = ((shift + 0.5) * 2.0**output).round().clamp(-LARGEST, LARGEST)
        bound = largest_error(gain, shift, form)
        new = cls(layer.normalized_shape, form, gains.to(torch.int16), shifts.to(torch.int16), bound=bound, **scales)
        device = None if layer.weight is None else layer.weight.device
        return new.to(device)

    def error_bound(self) -> float:
        """Return how far an output can be from the exact one, clipped to the limit, in steps of the output.

        The exact output is that of the layer in floating point on the same integers, before rounding, so 0.5 is the
        least possible. It holds where ``|z|`` is within :attr:`peak`.
        """
        return self._bound

    def forward(self, x: Tensor) -> Tensor:
        """Normalise int8 ``(*, *normalized_shape)``.

        Returns:
            int8 of the same shape.

        Raises:
            TypeError: ``x`` is not int8.
            ValueError: The trailing axes have other sizes.
        """
        self._check(x)
        if tuple(x.shape[-len(self.normalized_shape) :]) != self.normalized_shape:
            raise ValueError(f"input {tuple(x.shape)} does not end in {self.normalized_shape}")
        return self._rows(x.reshape(-1, self.form.size)).reshape(x.shape)

    def _rows(self, rows: Tensor) -> Tensor:
        apply: Any = integer_arithmetic.l1_rows
        if rows.is_cuda and _has_triton():
            from normfuse.quantization import triton_norms

            apply = triton_norms.l1_rows
        elif rows.device.type == "cpu" and (kernels := native_norms.kernels.get()) is not None:
            apply = kernels.l1_rows
        return apply(rows, self.gain, self.shift, self.form, centred=self.source.centred)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the constants, which are stored with the buffers."""
        return {**super().get_extra_state(), "form": list(self.form), "bound": self._bound}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the constants of another layer of the same shape."""
        super().set_extra_state(state)
        self.form, self._bound = NormForm(*state["form"]), state["bound"]


class IntegerL1LayerNorm(_IntegerTokenNorm):
    """:class:`.L1LayerNorm` in integers, int8 to int8; make it by :meth:`from_float`."""

    source = L1LayerNorm


class IntegerL1RMSNorm(_IntegerTokenNorm):
    """:class:`.L1RMSNorm` in integers, int8 to int8; make it by :meth:`from_float`."""

    source = L1RMSNorm


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
