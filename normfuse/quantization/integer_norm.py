"""What the integer norms share: the steps of their integers, and buffers that no conversion of dtype touches.

An input is ``x = s_x x_q`` and an output ``y = s_y y_q``, with ``|y_q| <= 2^(b-1) - 1`` for b of 4 to 8 bits, held in
int8; there is no zero point. :mod:`normfuse.quantization.integer_arithmetic` defines every result bit for bit, on any
device. On CPUs the kernels of :func:`normfuse.build_kernels` give the same results many times faster, once
built; on CUDA a Triton kernel does, where Triton is installed. How far an output can be from the layer in floating
point is ``error_bound()``; half a step of it is the rounding of the output itself. A reconstruction: the fully
quantized layers of arXiv 2411.10948 are known by its abstract only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class IntegerNorm(nn.Module):
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
