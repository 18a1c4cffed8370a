"""What a pair in Tune mode keeps from call to call, and how it is told whether that is still right.

Between two calls anything may write to a tensor: an optimizer, a user through ``.data``, which autograd does not see.
So what is kept stands beside the look of the tensors that it was made from: where they are and all that they hold.
These are vectors, of one value per channel; nothing that is made from a weight is kept.

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
    if isinstance(seen, Look) and value[0] == eps and seen.is_that_of(var):
        return value[1]
    with torch.inference_mode(False), torch.no_grad():
        rstd = torch.rsqrt(var + eps)
    if can_keep(var):
        kept.entry = Look(var), (eps, rstd)
    return rstd


def kept_distance(kept: Kept, mean: Tensor, var: Tensor, eps: float, bias: Tensor | None) -> float:
    """Return the largest ``|b - mean| / sqrt(var + eps)`` of vectors on another device than a CPU.

    It is made again, and the device waited for, where autograd has seen a write to the statistics: it only chooses
    between two ways to the same value. What training does to the bias does not count.
    """
    if mean.is_inference() or var.is_inference():  # which have no versions
        return _distance(mean, var, eps, bias)
    place = None if bias is None else bias.data_ptr()
    now = (eps, place, mean.data_ptr(), mean._version, var.data_ptr(), var._version)
    seen, value = kept.entry
    if seen != now:
        value = _distance(mean, var, eps, bias)
        kept.entry = now, value
    return value


@torch.no_grad()
def _distance(mean: Tensor, var: Tensor, eps: float, bias: Tensor | None) -> float:
    centre = mean if bias is None else mean - bias
    return float((centre.abs() * torch.rsqrt(var + eps)).amax())


def can_keep(*tensors: Tensor | None) -> bool:
    """Whether what is made from some tensors may be kept."""
    return not is_distributed() and all(tensor is None or tensor.is_cpu for tensor in tensors)


class Look:
    """Where a tensor was and what it held there, bit for bit.

    It holds a window onto the tensor's memory, made once: to look through it again takes a fraction of a microsecond.
    That is done only while a tensor of the same extent is at the same place.
    """

    __slots__ = ("dtype", "place", "seen", "shape", "strides", "window")

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.shape, self.strides = tensor.dtype, tensor.shape, tensor.stride()
        self.place = tensor.data_ptr()
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        self.window: Any = (ctypes.c_char * (tensor.element_size() * (1 + last))).from_address(self.place)
        self.seen = self.window.raw

    def is_that_of(self, tensor: Tensor) -> bool:
        """Whether a tensor is there now, and holds the same."""
        if tensor.data_ptr() != self.place or tensor.dtype is not self.dtype:
            return False
        if tensor.shape != self.shape or tensor.stride() != self.strides:
            return False
        return self.window.raw == self.seen
