"""L1 norms on quantized values: int8 in, int8 out, integers in between.

An input is ``x = s_x x_q`` and an output ``y = s_y y_q``, with ``|y_q| <= 2^(b-1) - 1`` for b of 4 to 8 bits, held in
int8; there is no zero point. With ``f``, ``gamma``, ``beta`` and ``eps`` of the layer in floating point:

    L1LayerNorm:  z = (x_q - mean) / (f s + eps / s_x)     s and mean of x_q over a row, in integers
                  y_q = clip((gamma / s_y) z + beta / s_y)
    L1BatchNorm:  y_q = clip((a s_x / s_y) x_q + c / s_y)  (a, c): the inference form; per channel x M + B, shifted

:mod:`normfuse.quantization.integer_arithmetic` defines every result bit for bit, on any device. On CPUs the kernels of
:func:`normfuse.quantization.build_kernels` give the same results many times faster, once built; on CUDA a Triton kernel
does, where Triton is installed. How far an output can be from the layer in floating point is ``error_bound()``; half a
step of it is the rounding of the output itself. A reconstruction: the fully quantized layers of arXiv 2411.10948 are
known by its abstract only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfuse.layers.affine_inference import AffineInference
from normfuse.layers.l1_layer_norm import L1LayerNorm
from normfuse.layers.mean_deviation import deviation_factor
from normfuse.numerics import exact
from normfuse.quantization import integer_arithmetic, native_norms
from normfuse.quantization.integer_arithmetic import NormForm, make_form

if TYPE_CHECKING:
    from typing_extensions import Self

_LARGEST = 2**15 - 1


class _IntegerNorm(nn.Module):
    """What the integer norms share: scales, bits, and buffers that no conversion of dtype touches."""

    def __init__(self, input_scale: float, output_scale: float, bits: int) -> None:
        super().__init__()
        if not (input_scale > 0 and output_scale > 0 and math.isfinite(input_scale) and math.isfinite(output_scale)):
            raise ValueError("input_scale and output_scale are the steps of the integers: give positive numbers")
        if not 4 <= bits <= 8:
            raise ValueError(f"bits is 4 to 8, not {bits}")
        self.input_scale = float(input_scale)
        self.output_scale = float(output_scale)
        self.bits = bits

    @property
    def limit(self) -> int:
        """Largest magnitude of an output."""
        return 2 ** (self.bits - 1) - 1

    def get_extra_state(self) -> dict[str, Any]:
        """Return the scales and the bits, which are stored with the buffers."""
        return {"input_scale": self.input_scale, "output_scale": self.output_scale, "bits": self.bits}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the scales and the bits of another layer."""
        self.input_scale, self.output_scale, self.bits = (state[k] for k in ("input_scale", "output_scale", "bits"))

    def _check(self, x: Tensor) -> None:
        if x.dtype != torch.int8:
            raise TypeError(f"{type(self).__name__} takes int8, not {x.dtype}")

    def extra_repr(self) -> str:
        """Show the scales and the bits."""
        return f"input_scale={self.input_scale:.4g}, output_scale={self.output_scale:.4g}, bits={self.bits}"


class IntegerL1LayerNorm(_IntegerNorm):
    """L1LayerNorm in integers, over the last axes of an int8 tensor; make it by :meth:`from_float`.

    Attributes:
        gain: int16 ``(m,)``: ``gamma / s_y``.
        shift: int16 ``(m,)``: ``beta / s_y`` and half a step.
        form: The constants of the arithmetic.
        peak: Normalized values ``|z|`` up to here are represented; larger ones may be clipped to it. It is chosen so
            that outputs are clipped there anyway, as far as the spread of the gains allows.
    """

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
    def from_float(cls, layer: L1LayerNorm, input_scale: float, output_scale: float, bits: int = 8) -> Self:
        """Return the integer form of a layer.

        Args:
            layer: The layer; its parameters are read in float64.
            input_scale: s_x, the step of the inputs.
            output_scale: s_y, the step of the outputs.
            bits: Of the outputs, 4 to 8.

        Raises:
            TypeError: ``layer`` is not an L1LayerNorm.
            ValueError: A scale is not positive or too small for the layer, or a row is longer than 2^15.
        """
        if type(layer) is not L1LayerNorm:
            raise TypeError(f"{type(layer).__name__} is not an L1LayerNorm")
        scales: Any = {"input_scale": input_scale, "output_scale": output_scale, "bits": bits}
        limit = _IntegerNorm(**scales).limit
        size = math.prod(layer.normalized_shape)
        gain = torch.ones(size, dtype=torch.float64) if layer.weight is None else exact(layer.weight).flatten()
        shift = torch.zeros_like(gain) if layer.bias is None else exact(layer.bias).flatten()
        gain, shift = gain / output_scale, shift / output_scale
        fraction, output = _fraction_bits(gain, shift, size, limit)
        form = make_form(size, deviation_factor(layer.gaussian), layer.eps / input_scale, fraction, output, limit)
        gains = (gain * 2.0 ** (15 + output - fraction)).round().clamp(-_LARGEST, _LARGEST)
        shifts = ((shift + 0.5) * 2.0**output).round().clamp(-_LARGEST, _LARGEST)
        bound = _layer_bound(gain, shift, form)
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
        if rows.is_cuda and _has_triton():
            from normfuse.quantization import triton_norms

            return triton_norms.l1_rows(rows, self.gain, self.shift, self.form)
        kernels = native_norms.kernels() if rows.device.type == "cpu" else None
        if kernels is None:
            return integer_arithmetic.l1_rows(rows, self.gain, self.shift, self.form)
        return kernels.l1_rows(rows, self.gain, self.shift, self.form)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the constants, which are stored with the buffers."""
        return {**super().get_extra_state(), "form": list(self.form), "bound": self._bound}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the constants of another layer of the same shape."""
        super().set_extra_state(state)
        self.form, self._bound = NormForm(*state["form"]), state["bound"]


def _fraction_bits(gain: Tensor, shift: Tensor, size: int, limit: int) -> tuple[int, int]:
    """Return h and o: as many fraction bits as the range that matters leaves of 16.

    z matters up to where the outputs of every channel are clipped, but is given at least the bits that keep the error
    with the largest gain below a quarter of a step.
    """
    largest = float(gain.abs().max())
    offset = float(shift.abs().max())
    if not math.isfinite(largest) or not math.isfinite(offset):
        raise ValueError("the gain or the shift of the layer is not finite")
    least_bits = max(6, math.ceil(math.log2(max(largest, 1e-30))) + 3)
    smallest = float(gain.abs()[gain != 0].min()) if largest > 0 else 1.0
    needed = min(size / 2, (limit + 1 + offset) / smallest)
    fraction = min(max(13 - math.ceil(math.log2(needed + 2)), least_bits), 12)
    of_gain = math.floor(math.log2(_LARGEST / max(largest, 1e-30))) - 15 + fraction
    of_shift = math.floor(math.log2(_LARGEST / (offset + 1)))
    of_limit = 15 - math.ceil(math.log2(limit + 2))
    output = min(of_gain, of_shift, of_limit)
    if output < 2 or least_bits > 12:
        raise ValueError(
            f"gain and shift reach {largest:.4g} and {offset:.4g} output steps, too many for 16 bits: "
            "give a larger output_scale"
        )
    return fraction, output


def _layer_bound(gain: Tensor, shift: Tensor, form: NormForm) -> float:
    """Return the largest error of an output that is not clipped, over the channels, in output steps.

    In z: a unit for product and offset, one for the scale, m 2^-16 of one for 1/m, and 2^-14 of its size.
    In y: half a unit each for the product and the shift, that of the gain times z, and half a step for the output.
    """
    reach = ((form.limit + 1 + shift.abs()) / gain.abs().clamp(min=1e-30)).clamp(max=2.0 ** (13 - form.fraction))
    of_z = (2 + form.size * 2.0**-16) * 2.0**-form.fraction + (reach + 1) * 2.0**-14
    of_gain = reach * 2.0 ** (form.fraction - 16 - form.output)
    return float((gain.abs() * of_z + of_gain).max()) + 2.0**-form.output + 0.5


class IntegerL1BatchNorm(_IntegerNorm):
    """The inference form of an L1BatchNorm in integers, on int8 ``(N, C, *)``; make it by :meth:`from_float`.

    ``y = clip((x M + B) >> D)`` with its own M, B and D per channel.

    Attributes:
        multiplier: M, int32 ``(C,)``.
        addend: B, int32 ``(C,)``, with half a step.
        down: D, int32 ``(C,)``, 0 to 22.
    """

    multiplier: Tensor
    addend: Tensor
    down: Tensor

    def __init__(
        self,
        multiplier: Tensor,
        addend: Tensor,
        down: Tensor,
        *,
        input_scale: float,
        output_scale: float,
        bits: int,
    ) -> None:
        super().__init__(input_scale, output_scale, bits)
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("addend", addend)
        self.register_buffer("down", down)

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: AffineInference, input_scale: float, output_scale: float, bits: int = 8) -> Self:
        """Return the integer form of the inference form of a layer.

        Args:
            layer: An L1BatchNorm, or any norm of :mod:`normfuse.layers` with its channels on axis 1 and a fixed affine
                inference form.
            input_scale: s_x, the step of the inputs.
            output_scale: s_y, the step of the outputs.
            bits: Of the outputs, 4 to 8.

        Raises:
            TypeError: ``layer`` has no affine inference form on axis 1.
            ValueError: A scale is not positive, or too small for the layer.
        """
        if not isinstance(layer, AffineInference) or layer.dim != 1:
            raise TypeError(f"{type(layer).__name__} has no fixed affine form of the channels on axis 1")
        scales: Any = {"input_scale": input_scale, "output_scale": output_scale, "bits": bits}
        _IntegerNorm(**scales)  # raises where one is out of range
        a, c = layer.affine_map()
        a, c = a * (input_scale / output_scale), c / output_scale
        if not bool((a.abs() < 2**22).all() and torch.isfinite(c).all()):
            worst = float(a.abs().max())
            raise ValueError(f"a step of the input is {worst:.4g} of the output: give a larger output_scale")
        down = (14 - torch.frexp(a).exponent + 1).clamp(0, 22).to(torch.float64)
        multiplier = (a * 2**down).round()
        addend = ((c + 0.5) * 2**down).round().clamp(-(2.0**30), 2.0**30)  # beyond it the output is clipped
        device = next((p.device for p in layer.parameters()), None) if isinstance(layer, nn.Module) else None
        new = cls(*(t.to(torch.int32) for t in (multiplier, addend, down)), **scales)
        return new.to(device)

    def error_bound(self) -> float:
        """Return how far an output can be from the exact one, clipped to the limit, in steps of the output.

        Half a step for the output, and half a unit of 2^-D for each of B and, 128 times, M.
        """
        return 0.5 + float((64.5 * 2.0 ** -self.down.to(torch.float64)).max()) if len(self.down) else 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Apply the norm to int8 ``(N, C, *)``.

        Returns:
            int8 of the same shape and memory format.

        Raises:
            TypeError: ``x`` is not int8.
            ValueError: Another number of channels on axis 1.
        """
        self._check(x)
        if x.dim() < 2 or x.shape[1] != len(self.multiplier):
            raise ValueError(f"input {tuple(x.shape)} has not {len(self.multiplier)} channels on axis 1")
        kernels = native_norms.kernels() if x.device.type == "cpu" else None
        apply = integer_arithmetic.affine if kernels is None else kernels.affine
        return apply(x, self.multiplier, self.addend, self.down, self.limit)


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None
