"""L1BatchNorm, or any fixed map of each channel, on quantized values: int8 in, int8 out.

    y_q = clip((a s_x / s_y) x_q + c / s_y) = clip((x_q M + B) >> D)

with (a, c) the inference form; M, B and D are integers of each channel. See :mod:`normfuse.quantization.integer_norm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfuse.layers.affine_inference import AffineInference
from normfuse.quantization import integer_arithmetic, native_norms
from normfuse.quantization.integer_norm import IntegerNorm

if TYPE_CHECKING:
    from typing_extensions import Self


class IntegerL1BatchNorm(IntegerNorm):
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
        IntegerNorm(**scales)  # raises where one is out of range
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
        kernels = native_norms.kernels.get() if x.device.type == "cpu" else None
        apply = integer_arithmetic.affine if kernels is None else kernels.affine
        return apply(x, self.multiplier, self.addend, self.down, self.limit)
