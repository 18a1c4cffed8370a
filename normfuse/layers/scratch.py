"""Memory that every call in a thread shares, for large tensors that are needed only within one call.

A fresh tensor of some megabytes costs more, in pages that the system must clear, than the arithmetic on it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_room = threading.local()
_LARGE = 1 << 15  # elements; above, an allocation comes as fresh pages


def is_large(tensor: Tensor) -> bool:
    """Whether scratch memory pays for a tensor of this size."""
    return tensor.is_cpu and tensor.numel() >= _LARGE


def scratch(like: Tensor) -> Tensor:
    """Return a tensor of the same shape, in the same order, in memory that the next call overwrites."""
    held: dict[torch.dtype, Tensor] = vars(_room).setdefault("held", {})
    size = like.numel()
    if like.dtype not in held or held[like.dtype].numel() < size:
        with torch.inference_mode(False):
            held[like.dtype] = torch.empty(size, dtype=like.dtype, device=like.device)
    room = held[like.dtype]
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return room.as_strided(like.shape, like.stride())
    return room[:size].view(like.shape)


def times(one: Tensor, other: Tensor) -> Tensor:
    """Return a product in the dtype of its first factor, where that is large in scratch memory."""
    if is_large(one):
        return torch.mul(one, other, out=scratch(one))
    made = one * other
    return made if made.dtype is one.dtype else made.to(one.dtype)
