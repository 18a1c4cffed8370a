"""Ways to multiply matrices of small integers with what torch has, each with the depth up to which it is exact.

All compute ``a b^T`` for int8 ``a (M, K)`` and ``b (N, K)``, ``|a| <= qa`` and ``|b| <= qb``:

    int8      int8 x int8 with int32 sums                                  K qa qb < 2^31
    onednn    (a + qa) as uint8, x int8; the sums come as float32          K (qa + qa) qb <= 2^24
    fbgemm    (a + 128) as uint8, x int8; the sums come as float32         K (qa + 128) qb <= 2^24
    float32   the integers held in float32                                 K qa qb <= 2^24
    float64   the integers held in float64                                 K qa qb <= 2^53
    int64     plain integers: the definition of the product                K qa qb < 2^63

Where an offset c makes ``a`` unsigned, ``sum (a + c) b - c sum b`` is what is computed. A library may subtract integers
and then convert to float32, or convert first; which of them it does differs between instruction sets, and between its
kernels. So the depth is that of the worse order, in which the sum of ``(a + c) b`` has to be exact in float32.

Depth alone does not make an engine exact. On CPUs without VNNI, products of uint8 and int8 are added in pairs in 16
bits, and saturate silently where ``2 u qb > 32767``, ``u`` being the largest uint8 value. Shifting by ``qa`` rather
than by 128 leaves more room. Whether an engine is exact on this machine is found out in
:mod:`normfuse.quantization.engine_choice`. Signed activations are not offered to oneDNN's linear layer: without VNNI
that can take seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FBGEMM_OFFSET = 128
MAX_DEPTH = 2**14  # of one call, so that a depth can be tried out before it is relied on


@dataclass(frozen=True, slots=True)
class Engine:
    """One way to multiply.

    Attributes:
        name: For messages and tests.
        device: Type of device that it runs on; None for any.
        largest_sum: What a sum may reach and be exact, in whichever order the library works.
        pack: Bring ``b``, int8 ``(N, K)``, into the form that ``multiply`` takes.
        multiply: Return ``a b^T``, ``(M, N)``, as int32, int64 or floats of integer value, given ``a``, int8
            ``(M, K)``; the packed ``b``; and ``qa``.
        offset: Return what is added to ``a`` before it is multiplied, given ``qa``.
    """

    name: str
    device: str | None
    largest_sum: int
    pack: Callable[[Tensor], Any]
    multiply: Callable[[Tensor, Any, int], Tensor]
    offset: Callable[[int], int] = lambda qa: 0

    def depth(self, qa: int, qb: int) -> int:
        """Return the largest K of one call for which every sum is exact, that with the offset too."""
        return min(MAX_DEPTH, self.largest_sum // max(1, (qa + self.offset(qa)) * qb))


def reference(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b^T`` in int64, on the CPU: the definition that every engine must meet bit for bit."""
    return a.cpu().long() @ b.cpu().long().T


def _multiply_int64(a: Tensor, packed: Tensor, qa: int) -> Tensor:
    return reference(a, packed).to(a.device)


def _held_in(dtype: torch.dtype) -> tuple[Callable[[Tensor], Any], Callable[[Tensor, Any, int], Tensor]]:
    def multiply(a: Tensor, packed: Tensor, qa: int) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):  # it would round the sums to 8 or 11 bits
            return a.to(dtype) @ packed

    return lambda b: b.to(dtype).T, multiply


def _row_major(values: Tensor) -> Tensor:
    """Return a matrix with the strides ``(columns, 1)`` also where an axis has one element, whose stride says nothing.

    torch 2.11 multiplies int8 matrices by their strides, and wrongly where that of such an axis is another.
    """
    values = values.contiguous()
    return values.as_strided(values.shape, (values.shape[1], 1))


def _pack_int8(b: Tensor) -> Tensor:
    if 1 in b.shape:
        return _row_major(b.T)
    return b.T if b.T.is_contiguous() else b.contiguous().T


def _multiply_int8(a: Tensor, packed: Tensor, qa: int) -> Tensor:
    return torch.ops.aten._int_mm(_row_major(a), packed)


def _multiply_int8_cuda(a: Tensor, packed: Tensor, qa: int) -> Tensor:
    rows, inner, columns = len(a), -a.shape[1] % 8, -packed.shape[1] % 8  # cuBLAS: multiples of 8, more than 16 rows
    a = torch.nn.functional.pad(a, (0, inner, 0, max(0, 17 - rows)))
    packed = torch.nn.functional.pad(packed.T, (0, inner, 0, columns)).T
    return torch.ops.aten._int_mm(a, packed)[:rows, : packed.shape[1] - columns]


def _pack_onednn(b: Tensor) -> tuple[Any, Tensor, Tensor]:
    ones = torch.ones(len(b), dtype=torch.float32, device=b.device)
    zeros = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    return torch.ops.onednn.qlinear_prepack(b.contiguous(), None), ones, zeros


def _multiply_onednn(a: Tensor, packed: tuple[Any, Tensor, Tensor], qa: int) -> Tensor:
    weight, ones, zeros = packed
    unsigned = (a.contiguous().view(torch.uint8) + qa).contiguous()  # wraps: a + qa lies in 0 .. 2 qa
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, qa, weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _pack_fbgemm(b: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tensors with a quantized dtype are deprecated, their kernels not
        quantized = torch.ops.aten._make_per_tensor_quantized_tensor(b.contiguous(), 1.0, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)


def _multiply_fbgemm(a: Tensor, packed: Any, qa: int) -> Tensor:
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return multiply(a.to(torch.float32).contiguous(), 1.0, FBGEMM_OFFSET, packed)


ENGINES = (
    Engine("int8", "cpu", 2**31 - 1, _pack_int8, _multiply_int8),
    Engine("int8", "cuda", 2**31 - 1, _pack_int8, _multiply_int8_cuda),
    Engine("onednn", "cpu", 2**24, _pack_onednn, _multiply_onednn, lambda qa: qa),
    Engine("fbgemm", "cpu", 2**24, _pack_fbgemm, _multiply_fbgemm, lambda qa: FBGEMM_OFFSET),
    Engine("float32", None, 2**24, *_held_in(torch.float32)),
    Engine("float64", None, 2**53, *_held_in(torch.float64)),
)
"""The engines to choose from."""

INT64 = Engine("int64", None, 2**63 - 1, lambda b: b, _multiply_int64)
"""The slow one that is always exact, for where no other is."""
