"""The integer L1 LayerNorm and RMSNorm on CUDA, in Triton: one program a row, the same integers as the definition.

See :mod:`normfuse.quantization.integer_arithmetic` for the formulas. The row is held in registers, so the sum of
``|m x - S|`` is taken as it stands, in 64 bits. Rows of any length up to 2^15.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from normfuse.quantization.integer_arithmetic import NormForm


@triton.jit
def _bit_length(value):
    """Return the number of binary digits of a positive int64."""
    length = value * 0
    for step in tl.static_range(6):  # pyright: ignore[reportGeneralTypeIssues]
        width = 32 >> step
        above = (value >> width) > 0
        length = tl.where(above, length + width, length)
        value = tl.where(above, value >> width, value)
    return length + value


@triton.jit
def _floor_divide(value, size):
    """Return floor(value / size) for positive ``size``; the processor truncates."""
    quotient = value // size
    return tl.where(quotient * size > value, quotient - 1, quotient)


@triton.jit
def _clip(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def _l1_row(
    x_pointer,
    y_pointer,
    gain_pointer,
    shift_pointer,
    factor,
    eps,
    normal,
    normal_bits,
    inverse,
    size: tl.constexpr,
    fraction: tl.constexpr,
    output: tl.constexpr,
    limit: tl.constexpr,
    centred: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < size
    x = tl.load(x_pointer + row * size + column, mask=inside, other=0).to(tl.int32)

    total = tl.sum(x, 0).to(tl.int64)
    if not centred:
        total = total * 0
    scaled = tl.where(inside, x.to(tl.int64) * size - total, 0)
    deviation = tl.sum(tl.abs(scaled), 0)
    centre = _floor_divide(2 * total + size, 2 * size)
    den = tl.maximum(factor.to(tl.int64) * deviation + eps, 1)

    z = _bit_length(den) - 31
    d = tl.where(z >= 0, den >> tl.maximum(z, 0), den << tl.maximum(-z, 0))
    r = (normal.to(tl.int64) << 20) // d
    least = _bit_length(r) - 15
    common = normal_bits + z - fraction - 11
    wide = 8 + common >= least
    places = tl.where(wide, 8, _clip(least - common, 9, 14))
    right = _clip(places + common, 1, 62)
    one = tl.full((), 1, tl.int64)
    rounded = tl.minimum((r + (one << (right - 1))) >> right, 32767)
    scale = tl.where(places + common >= least, rounded, 32767)
    back = _clip(34 + normal_bits + z - fraction, 1, 62)
    narrow_offset = ((total - size * centre) * inverse * r + (one << (back - 1))) >> back
    wide_offset = (total * inverse * scale + (one << 36)) >> 37
    offset = tl.where(wide, wide_offset, narrow_offset).to(tl.int32)

    clip = ((one << (15 - places)) - 1).to(tl.int32)
    clipped = _clip(x - centre.to(tl.int32), -clip, clip) << places.to(tl.int32)
    w = tl.where(wide, x << 8, clipped)
    normalized = _clip(((w * scale.to(tl.int32) + 16384) >> 15) - offset, -32768, 32767)
    gain = tl.load(gain_pointer + column, mask=inside, other=0).to(tl.int32)
    shift = tl.load(shift_pointer + column, mask=inside, other=0).to(tl.int32)
    y = _clip(((normalized * gain + 16384) >> 15) + shift, -32768, 32767) >> output
    tl.store(y_pointer + row * size + column, _clip(y, -limit, limit).to(tl.int8), mask=inside)


def l1_rows(x: Tensor, gain: Tensor, shift: Tensor, form: NormForm, *, centred: bool = True) -> Tensor:
    """Do what :func:`.integer_arithmetic.l1_rows` does."""
    x, gain, shift = (t.contiguous() for t in (x, gain, shift))
    y = torch.empty_like(x)
    if x.numel():
        block = triton.next_power_of_2(form.size)
        constants: dict[str, Any] = {
            "size": form.size,
            "fraction": form.fraction,
            "output": form.output,
            "limit": form.limit,
            "centred": centred,
            "block": block,
            "num_warps": min(16, max(1, block // 512)),
        }
        varying = (form.factor, form.eps, form.normal, form.normal_bits, form.inverse)
        _l1_row[(len(x),)](x, y, gain, shift, *varying, **constants)
    return y
