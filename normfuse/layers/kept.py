"""The effective weight of a pair in Tune mode that is not trained, kept for as long as it is right.

Kept are ``a W`` and ``a (b - mean) + beta`` where the weight is smaller than the output (a copy of a larger one would
cost more memory than Tune mode saves: there the output is scaled). Whether they are still right is judged at every
call: by where the weight is and its version (raised by every write that autograd sees), and by the values (for writes
through ``.data``, which it does not see), all of the vectors' and a sample of the weight's.

Only tensors in a CPU's memory are kept: to look at a GPU's would make the program wait for it. Nor is a weight kept
under a process group, since sharding refills memory unseen.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from normfuse.layers.products import Product
from normfuse.layers.scaled import Statistics, scaled

_CHUNKS, _CHUNK = 8, 64  # what is looked at of a weight: so many pieces of so many bytes


class Kept:
    """A value kept beside the look of what it was made from; empty in copies and in files."""

    __slots__ = ("entry",)

    def __init__(self) -> None:
        self.entry: tuple[object, Any] = (None, None)  # in one piece, since several threads may run one model

    @property
    def value(self) -> Any:
        """The kept value, None for none."""
        return self.entry[1]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as an empty one."""
        return Kept, ()


def effective_weight(
    kept: Kept, weight: Tensor, bias: Tensor | None, norm: Statistics, product: Product, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``a W``, in the layout of the weight, and ``a (b - mean) + beta``, ``(out,)``, both in ``dtype``."""
    keeps = weight.is_cpu and not weight.is_inference() and not _distributed()
    seen, value = kept.entry
    if keeps and isinstance(seen, _Seen) and value[0].dtype is dtype and seen.again(weight, bias, norm):
        return value
    with torch.inference_mode(False), torch.no_grad():
        scale = norm.scale()
        value = scaled(weight, scale, product).to(dtype), norm.offset(scale, bias).to(dtype)
    if keeps:
        kept.entry = _Seen(weight, bias, norm), value
    return value


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Seen:
    """What a weight, its bias and the norm behind it looked like."""

    __slots__ = ("eps", "vectors", "version", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, norm: Statistics) -> None:
        self.eps, self.version = norm.eps, weight._version
        self.weight = _Memory(weight, _CHUNKS)
        self.vectors = [None if v is None else _Memory(v) for v in (bias, *norm[:4])]

    def again(self, weight: Tensor, bias: Tensor | None, norm: Statistics) -> bool:
        """Whether all of them look the same now."""
        if norm.eps != self.eps or weight._version != self.version or not self.weight.is_that_of(weight):
            return False
        for seen, vector in zip(self.vectors, (bias, *norm[:4]), strict=True):
            if (seen is None) != (vector is None):
                return False
            if seen is not None and vector is not None and not seen.is_that_of(vector):
                return False
        return True


class _Memory:
    """Where a tensor was and what it held there, whole or in some pieces.

    The pieces are windows onto its memory, made once: to look through them again takes a fraction of a microsecond.
    They are looked through only while a tensor of the same extent is at the same place.
    """

    __slots__ = ("dtype", "pieces", "place", "shape", "strides")

    def __init__(self, tensor: Tensor, count: int = 1) -> None:
        self.dtype, self.shape, self.strides = tensor.dtype, tensor.shape, tensor.stride()
        self.place = tensor.data_ptr()
        extent = tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)))
        size, step = (extent, extent) if count == 1 else (_CHUNK, max(extent // count, 1))
        windows = [_window(self.place + at, min(size, extent - at)) for at in range(0, extent, step)]
        self.pieces = [(window, window.raw) for window in windows]

    def is_that_of(self, tensor: Tensor) -> bool:
        """Whether a tensor is there now, and holds the same."""
        if tensor.data_ptr() != self.place or tensor.dtype is not self.dtype:
            return False
        if tensor.shape != self.shape or tensor.stride() != self.strides:
            return False
        return all(window.raw == value for window, value in self.pieces)


def _window(start: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(start)
