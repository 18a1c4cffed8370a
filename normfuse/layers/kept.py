"""What a pair in Tune mode keeps from call to call, and how it is told whether that is still right.

Between two calls anything may write to a tensor: an optimizer, a user through ``.data``, which autograd does not see.
So what is kept stands beside the look of the tensors that it was made from: where they are and what they hold.

Only tensors in a CPU's memory are looked at: to look at a GPU's would make the program wait for it. Nor is anything
kept under a process group, since sharding refills memory unseen.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

if torch.distributed.is_available():
    from torch.distributed import is_initialized as is_distributed
else:

    def is_distributed() -> bool:
        """Whether a process group is initialized."""
        return False


_CHUNK = 64  # bytes in each of the pieces that are looked at of a large tensor


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


def kept_rstd(kept: Kept, var: Tensor, eps: float) -> Tensor:
    """Return ``1 / sqrt(var + eps)``, ``(C,)``, made again only where the variances or ``eps`` have changed."""
    seen, value = kept.entry
    if isinstance(seen, tuple) and seen[0] == eps and seen[1].is_that_of(var):
        return value
    with torch.inference_mode(False), torch.no_grad():
        value = torch.rsqrt(var + eps)
    if can_keep(var):
        kept.entry = (eps, Look(var)), value
    return value


def can_keep(tensor: Tensor) -> bool:
    """Whether what is made from a tensor may be kept."""
    return tensor.is_cpu and not tensor.is_inference() and not is_distributed()


class Look:
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
