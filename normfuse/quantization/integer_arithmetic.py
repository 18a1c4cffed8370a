"""The definition of the integer norms, bit for bit, in plain torch integers.

Rows of m integers x; K is f = sqrt(pi/2) or 1 and E is eps m^2 / (input step), both in 16 fraction bits; h and o are
the fraction bits of a normalized value z and of an output. Constants of a layer: N = m^2 2^nz in [2^30, 2^31) and
I = 2^30 / m, rounded. All divisions and shifts to the right are floors; ``mulhrs(a, b) = (a b + 2^14) >> 15``.

    S = sum x;    c = (2 S + m) / (2 m), the integer next to the mean;    e = S - m c
    D = sum |m x - S|;    den = max(1, K D + E);    den = d 2^z with d in [2^30, 2^31)
    r = N 2^20 / d, so that 1 / (f s + eps) = r 2^(-4 - nz - z) per input step;    b = h + 11 - nz - z

    wide rows, whose scale leaves 8 places:           R = r 2^(b - 8), rounded;    M = S I R / 2^37, rounded
                                                      z = mulhrs(x 2^8, R) - M
    narrow rows, F the least in 9..14 that suffices:  R = r 2^(b - F), rounded, at most 2^15 - 1
                                                      M = e I r / 2^(34 + nz + z - h), rounded
                                                      z = mulhrs(clip(x - c, 2^(15 - F) - 1) 2^F, R) - M
    y = clip((mulhrs(z, gain) + shift) >> o, limit),   z and the sum before the shift clipped to 16 bits

L1 RMSNorm does not centre: its S is 0, so that D = m sum |x|, and c, e and M are 0.

So an element needs 16 bits, sums need 32, and only the few numbers of a row need 64; one division per statistic. Wide
rows are those of ordinary size; narrow rows deviate so little from their mean that a step of the input is many steps of
z. A reconstruction: the fully quantized layers of arXiv 2411.10948 are known by its abstract only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_SIZE = 2**15
"""Longest row: up to it no number exceeds 63 bits."""


class NormForm(NamedTuple):
    """The constants of a layer, in the order that the compiled kernels take them.

    Attributes:
        size: m.
        factor: K.
        eps: E.
        normal: N.
        normal_bits: nz.
        inverse: I.
        fraction: h.
        output: o.
        limit: Largest magnitude of an output.
    """

    size: int
    factor: int
    eps: int
    normal: int
    normal_bits: int
    inverse: int
    fraction: int
    output: int
    limit: int


class Rows(NamedTuple):
    """What every row settles; all int64 ``(rows, 1)``."""

    wide: Tensor  # bool
    centre: Tensor
    shift: Tensor  # 8, or F
    scale: Tensor  # R
    offset: Tensor  # M


def make_form(size: int, factor: float, eps: float, fraction: int, output: int, limit: int) -> NormForm:
    """Return the constants for rows of ``size``; ``eps`` is in steps of the input.

    Raises:
        ValueError: ``size`` is not in 1..2^15, or ``eps`` exceeds 4096 steps.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"rows of {size} values: the integers suffice for 1 to {MAX_SIZE}")
    if eps > 4096:
        raise ValueError(f"eps is {eps:.4g} steps of the input: give a larger input_scale, at most 4096 steps")
    bits = 31 - (size * size).bit_length()
    scaled = round(eps * size * size * 2**16)
    inverse = (2**31 + size) // (2 * size)
    return NormForm(size, round(factor * 2**16), scaled, size * size << bits, bits, inverse, fraction, output, limit)


def l1_rows(x: Tensor, gain: Tensor, shift: Tensor, form: NormForm, *, centred: bool = True) -> Tensor:
    """Return the L1 LayerNorm of each row, or its L1 RMSNorm.

    Args:
        x: int8 ``(rows, m)``.
        gain: int16 ``(m,)``.
        shift: int16 ``(m,)``, with half an output added for rounding.
        form: The constants.
        centred: Whether the mean is subtracted, as LayerNorm does.

    Returns:
        int8 ``(rows, m)``.
    """
    wide = x.to(torch.int64)
    total = wide.sum(1, keepdim=True) if centred else wide.new_zeros(len(x), 1)
    deviation = (form.size * wide - total).abs().sum(1, keepdim=True)
    return write_rows(x, settle(total, form.factor * deviation + form.eps, form), gain, shift, form)


def settle(total: Tensor, denominator: Tensor, form: NormForm) -> Rows:
    """Return scale and offset of each row from S and K D + E, both int64 ``(rows, 1)``."""
    centre = torch.div(2 * total + form.size, 2 * form.size, rounding_mode="floor")
    den = denominator.clamp(min=1)
    z = _bit_length(den) - 31
    d = torch.where(z >= 0, den >> z.clamp(min=0), den << (-z).clamp(min=0))
    r = (form.normal << 20) // d
    least = _bit_length(r) - 15
    common = form.normal_bits + z - form.fraction - 11
    wide = 8 + common >= least
    shift = torch.where(wide, 8, (least - common).clamp(9, 14))
    right = shift + common
    places = right.clamp(1, 62)
    scale = torch.where(right >= least, (r + (1 << (places - 1))) >> places, 32767).clamp(max=32767)
    back = (34 + form.normal_bits + z - form.fraction).clamp(1, 62)
    narrow_offset = ((total - form.size * centre) * form.inverse * r + (1 << (back - 1))) >> back
    wide_offset = (total * form.inverse * scale + (1 << 36)) >> 37
    return Rows(wide, centre, shift, scale, torch.where(wide, wide_offset, narrow_offset))


def write_rows(x: Tensor, rows: Rows, gain: Tensor, shift: Tensor, form: NormForm) -> Tensor:
    """Return int8 ``(rows, m)``: the normalized rows with gain and shift, in steps of the output."""
    value, clip = x.to(torch.int32), (1 << (15 - rows.shift)) - 1
    clipped = (value - rows.centre).clamp(-clip, clip) << rows.shift
    shifted = torch.where(rows.wide, value << 8, clipped).to(torch.int32)
    z = _clip16(_mulhrs(shifted, rows.scale.to(torch.int32)) - rows.offset.to(torch.int32))
    y = _clip16(_mulhrs(z, gain.to(torch.int32)) + shift.to(torch.int32)) >> form.output
    return y.clamp(-form.limit, form.limit).to(torch.int8)


def affine(x: Tensor, multiplier: Tensor, addend: Tensor, down: Tensor, limit: int) -> Tensor:
    """Return ``clip((x multiplier + addend) >> down, limit)`` per channel, axis 1 of ``x``; int8 in and out.

    ``multiplier``, ``addend`` and ``down`` are int32 ``(C,)``; sums are 32 bits wide.
    """
    along = (1, -1, *[1] * (x.dim() - 2))
    multiplier, addend, down = (t.reshape(along) for t in (multiplier, addend, down))
    y = (x.to(torch.int32) * multiplier + addend) >> down
    return y.clamp(-limit, limit).to(torch.int8)


def _mulhrs(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two fractions of 15 bits, rounded: int32, as each factor has 16 bits."""
    return (a * b + (1 << 14)) >> 15


def _clip16(value: Tensor) -> Tensor:
    return value.clamp(-(2**15), 2**15 - 1)


def _bit_length(value: Tensor) -> Tensor:
    """Return the number of binary digits of positive int64 values below 2^62."""
    high = value >> 31  # each half is exact in float64
    low_bits = torch.frexp((value & (2**31 - 1)).to(torch.float64)).exponent
    high_bits = torch.frexp(high.to(torch.float64)).exponent + 31
    return torch.where(high > 0, high_bits, low_bits).to(torch.int64)
