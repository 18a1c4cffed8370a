"""How the 16 bits of an integer norm of tokens are shared out, and how exact that makes it.

h are the fraction bits of a normalized value z, o those of an output; see
:mod:`normfuse.quantization.integer_arithmetic`, whose roundings the error adds up.
"""

from __future__ import annotations

import math

from torch import Tensor

from normfuse.quantization.integer_arithmetic import NormForm

LARGEST = 2**15 - 1


def fraction_bits(gain: Tensor, shift: Tensor, peak: float, limit: int) -> tuple[int, int]:
    """Return h and o: as many fraction bits as the range that matters leaves of 16.

    z matters up to where the outputs of every channel are clipped, but is given at least the bits that keep the error
    with the largest gain below a quarter of a step.

    Args:
        gain: In output steps, ``(m,)`` in float64.
        shift: In output steps.
        peak: Largest magnitude that z can have.
        limit: Largest output.

    Raises:
        ValueError: 16 bits do not suffice.
    """
    largest = float(gain.abs().max())
    offset = float(shift.abs().max())
    if not math.isfinite(largest) or not math.isfinite(offset):
        raise ValueError("the gain or the shift of the layer is not finite")
    least_bits = max(6, math.ceil(math.log2(max(largest, 1e-30))) + 3)
    smallest = float(gain.abs()[gain != 0].min()) if largest > 0 else 1.0
    needed = min(peak, (limit + 1 + offset) / smallest)
    fraction = min(max(13 - math.ceil(math.log2(needed + 2)), least_bits), 12)
    of_gain = math.floor(math.log2(LARGEST / max(largest, 1e-30))) - 15 + fraction
    of_shift = math.floor(math.log2(LARGEST / (offset + 1)))
    of_limit = 15 - math.ceil(math.log2(limit + 2))
    output = min(of_gain, of_shift, of_limit)
    if output < 2 or least_bits > 12:
        raise ValueError(
            f"gain and shift reach {largest:.4g} and {offset:.4g} output steps, too many for 16 bits: "
            "give a larger output_scale"
        )
    return fraction, output


def largest_error(gain: Tensor, shift: Tensor, form: NormForm) -> float:
    """Return the largest error of an output that is not clipped, over the channels, in output steps.

    In z: a unit for product and offset, one for the scale, m 2^-16 of one for 1/m, and 2^-14 of its size.
    In y: half a unit each for the product and the shift, that of the gain times z, and half a step for the output.
    """
    reach = ((form.limit + 1 + shift.abs()) / gain.abs().clamp(min=1e-30)).clamp(max=2.0 ** (13 - form.fraction))
    of_z = (2 + form.size * 2.0**-16) * 2.0**-form.fraction + (reach + 1) * 2.0**-14
    of_gain = reach * 2.0 ** (form.fraction - 16 - form.output)
    return float((gain.abs() * of_z + of_gain).max()) + 2.0**-form.output + 0.5
