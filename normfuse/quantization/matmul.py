"""The product of two ShiftQuant matrices: integers exactly, then one multiplication by the scale.

For ``A (M, K)`` and ``B (N, K)`` that are both grouped along K, with ``t_k = (Ga - 1 - ga_k) + (Gb - 1 - gb_k)``,

    Y = sum_k (sa 2^-ga_k Aq_mk) (sb 2^-gb_k Bq_nk)  =  sa sb 2^-(Ga+Gb-2)  sum_k (Aq_mk << t_k) Bq_nk

so the channels stay in place and the groups enter as left shifts, of either operand: what counts is their sum (part of
the reconstruction described in :mod:`normfuse.quantization.shiftquant`). B is shifted by its own ``Gb-1-gb_k`` where
that fits int8, that is where ``bits + G - 1 <= 8``; otherwise A takes that shift too. A shifted value that does not fit
int8 is written in digits of base 128,

    v = v_0 + 128 v_1 + 128^2 v_2 + ...,    -64 <= v_i <= 63 but for the last,

and each digit is one more int8 product with the same B. A shift along the axis that is kept is no part of the sum: it
scales a row or a column of the result by a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normfuse.quantization.engine_choice import choose, limit_class
from normfuse.quantization.integer_engines import Engine
from normfuse.quantization.shiftquant import Quantized, powers_of_half

INT8 = 127


class Prepared:
    """A right operand that keeps what the engines make of it, for a weight that is used many times.

    Args:
        b: Quantized matrix ``(N, K)``; it must not be changed afterwards.
        reused: Whether it will be used often: its engine is then chosen by the time without packing.

    Raises:
        ValueError: Not a matrix.
    """

    def __init__(self, b: Quantized, *, reused: bool = True) -> None:
        _require_matrix(b)
        self.quantized, self.reused = b, reused
        self.fits = b.dim == 0 or b.limit << (b.groups - 1) <= INT8
        """Whether ``b`` takes its own shift; otherwise the left operand does."""
        own = self.fits and b.dim == 1
        self.limit = b.limit << (b.groups - 1) if own else b.limit
        self.values = b.values << (b.groups - 1 - b.shift) if own else b.values  # int8 (N, K)
        self._packed: dict[tuple[str, int], list[Any]] = {}

    def left_shift(self) -> Tensor | None:
        """Return what the left operand must be shifted by for ``b``, ``(K,)``; None for nothing."""
        return None if self.fits else self.quantized.groups - 1 - self.quantized.shift

    def packed(self, engine: Engine, depth: int) -> list[Any]:
        """Return the form that an engine takes, one part for each ``depth`` columns."""
        key = (engine.name, depth)
        if key not in self._packed:
            parts = [engine.pack(part) for part in self.values.split(depth, dim=1)]
            if not self.reused:
                return parts
            self._packed[key] = parts
        return self._packed[key]


def shiftquant_matmul(a: Quantized, b: Quantized | Prepared) -> Tensor:
    """Return ``A B^T``, ``(M, N)``: exactly ``sums * (sa * sb * 2**-shifts)`` with ``sums`` in integers.

    Each of ``sums``, the product of the scales and the result is rounded at most once to the floating-point type, which
    is float64 where one of the operands was, and else float32; the result is then cast to the common dtype of the
    two tensors that were quantized. Gradients do not pass: see :mod:`normfuse.quantization.modules`.

    Args:
        a: Quantized ``(M, K)``, grouped along either axis.
        b: Quantized ``(N, K)``, grouped along either axis, or one that was prepared for many products.

    Raises:
        ValueError: Not two matrices of the same K, or sums that would not fit 63 bits.
    """
    right = b if isinstance(b, Prepared) else Prepared(b, reused=False)
    q = right.quantized
    _require_matrix(a)
    if a.shape[1] != q.shape[1]:
        raise ValueError(f"(M, K) and (N, K) need the same K, not {tuple(a.shape)} and {tuple(q.shape)}")
    with torch.no_grad():
        sums, shifts = integer_product(a, right)
        compute = torch.promote_types(a.scale.dtype, q.scale.dtype)
        result = sums.to(compute).mul_(a.scale.to(compute) * q.scale.to(compute) * 2.0**-shifts)
        if a.dim == 0:
            result.mul_(powers_of_half(a.shift, compute).unsqueeze(1))
        if q.dim == 0:
            result.mul_(powers_of_half(q.shift, compute))
        return result.to(torch.promote_types(a.dtype, q.dtype))


def integer_product(a: Quantized, b: Prepared) -> tuple[Tensor, int]:
    """Return the sums, ``(M, N)``, integers of any dtype that holds them, and the power of two they were shifted by.

    ``sums * 2**-shifts * sa * sb`` is the product, but for shifts along kept axes. The tensor of the sums is new.
    """
    shift, most = _left_shift(a, b)
    largest = max(1, a.shape[1]) * (a.limit << most) * b.limit
    if largest >= 2**63:
        raise ValueError(f"the sums of this product need more than 63 bits: use fewer groups than {a.groups}")
    accumulator = torch.int32 if largest < 2**31 else torch.int64
    shifts = most + (b.quantized.groups - 1 if b.quantized.dim == 1 and b.fits else 0)
    if 0 in (*a.shape, len(b.values)):
        return torch.zeros(a.shape[0], len(b.values), dtype=accumulator, device=a.values.device), shifts
    total: Tensor | None = None
    for place, (digit, limit) in enumerate(_digits(a, shift, most)):
        for sums in _product(digit, limit, b):
            total = _accumulate(total, sums, 128**place, accumulator)
    assert total is not None
    return total, shifts


def _left_shift(a: Quantized, b: Prepared) -> tuple[Tensor | None, int]:
    """Return what the left operand must be shifted by, int8 ``(K,)``, and the most that this can be."""
    shift, most = b.left_shift(), 0 if b.fits else b.quantized.groups - 1
    if a.dim == 1 and a.groups > 1:
        own = a.groups - 1 - a.shift
        return (own if shift is None else own + shift), most + a.groups - 1
    return shift, most


def _digits(a: Quantized, shift: Tensor | None, most: int) -> Iterator[tuple[Tensor, int]]:
    """Yield the digits of the shifted left operand, the lowest first, int8 ``(M, K)``, each with its limit."""
    limit = a.limit << most
    if shift is None:
        yield a.values, limit
    elif limit <= INT8:
        yield a.values << shift, limit
    elif most <= 7:  # two digits, found without leaving int8
        low = (a.values << shift).bitwise_and_(127)  # the shift drops what does not fit, and only that
        high = (a.values >> (7 - shift)).add_(low >> 6)  # one more where the low digit is negative
        yield low.bitwise_xor_(64).sub_(64), 64
        yield high, (limit + 64) >> 7
    else:
        yield from _digits_of_wide(a.values.long() << shift.long(), limit)


def _digits_of_wide(values: Tensor, limit: int) -> Iterator[tuple[Tensor, int]]:
    while limit > INT8:
        low = ((values + 64) & 127) - 64
        yield low.to(torch.int8), 64
        values = (values - low) >> 7
        limit = (limit + 64) >> 7
    yield values.to(torch.int8), limit


def _product(digit: Tensor, limit: int, b: Prepared) -> Iterator[Tensor]:
    """Yield the products of the parts of K that the chosen engine can take at once."""
    (m, k), n = digit.shape, len(b.values)
    qa, qb = limit_class(limit), limit_class(b.limit)
    engine = choose(digit.device, qa, qb, (m, k, n), packed=b.reused)
    depth = engine.depth(qa, qb)
    for left, right in zip(digit.split(depth, dim=1), b.packed(engine, depth), strict=True):
        yield engine.multiply(left, right, qa)


def _accumulate(total: Tensor | None, sums: Tensor, factor: int, dtype: torch.dtype) -> Tensor:
    """Return ``total + factor * sums``; a product that is alone stays in the dtype that its engine gave it."""
    if total is None:
        return sums if factor == 1 else sums.to(dtype) * factor
    return total.to(dtype).add_(sums.to(dtype), alpha=factor)


def _require_matrix(q: Quantized) -> None:
    if q.values.dim() != 2 or q.values.dtype != torch.int8:
        raise ValueError(f"a product needs int8 matrices, not {q.values.dtype} of shape {tuple(q.shape)}")
