"""What a pair in Tune mode computes from values that stay as they are, kept for as long as it is right.

Two things are kept: ``1 / sqrt(var + eps)`` and ``-mean``, since Tune mode does not move the statistics; and, where
nothing of the pair is trained and the weight is smaller than the output, the effective weight ``a W`` with its offset
(a copy of a larger one would cost more memory than Tune mode saves: there the output is scaled). Whether they are still
right is judged at every call, by the tensors, their memory, their versions (raised by every write that autograd sees)
and their values (for writes through ``.data``, which it does not see): all of the vectors', a sample of the weight's.

Only tensors in a CPU's memory are kept: to look at a GPU's would make the program wait for it. Nor is an effective
weight kept under a process group, since sharding refills memory unseen.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from normfuse.layers.products import Product
from normfuse.layers.scaled import Statistics, needs_plain, scaled

_CHUNKS, _CHUNK = 8, 64  # what is looked at of a weight: so many pieces of so many bytes


class Kept:
    """Values kept under a key that says what they were made from; empty in copies and in files."""

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


def fixed_statistics(
    kept: Kept, mean: Tensor, var: Tensor, eps: float, channels: slice | list[int] | None
) -> tuple[Tensor, Tensor]:
    """Return ``1 / sqrt(var + eps)`` and ``-mean`` of the channels, of all for None."""
    if needs_plain(mean, var):
        return _fixed(mean, var, eps, channels)
    key = (_vector(mean), _vector(var), eps) if mean.is_cpu else None
    entry = kept.entry
    if key is None or key != entry[0]:
        with torch.inference_mode(False), torch.no_grad():
            kept.entry = entry = key, _fixed(mean, var, eps, channels)
    return entry[1]


def _fixed(mean: Tensor, var: Tensor, eps: float, channels: slice | list[int] | None) -> tuple[Tensor, Tensor]:
    rstd, centre = torch.rsqrt(var + eps), mean.neg()
    return (rstd, centre) if channels is None else (rstd[channels], centre[channels])


def effective_weight(
    kept: Kept, weight: Tensor, bias: Tensor | None, norm: Statistics, product: Product, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``a W``, in the layout of the weight, and ``a (b - mean) + beta``, ``(out,)``, both in ``dtype``."""
    key = None
    if weight.is_cpu and not weight.is_inference() and not _distributed():
        vectors = (None if v is None else _vector(v) for v in (bias, norm.gain, norm.shift))
        key = (_sample(weight), *vectors, id(norm.rstd), dtype)
    entry = kept.entry
    if key is not None and key == entry[0]:
        return entry[1][:2]
    with torch.inference_mode(False), torch.no_grad():
        scale = norm.scale()
        new = scaled(weight, scale, product).to(dtype), norm.offset(scale, bias).to(dtype)
    if key is not None:
        kept.entry = key, (*new, norm.rstd)  # held, so that no other tensor gets its id
    return new


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _vector(tensor: Tensor) -> tuple[Any, ...]:
    values = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
    return tensor.dtype, ctypes.string_at(values.data_ptr(), values.nbytes)


def _sample(weight: Tensor) -> tuple[Any, ...]:
    """Return who a weight is and a few pieces of its memory."""
    start = weight.data_ptr()
    end = weight.untyped_storage().nbytes() - int(weight.storage_offset()) * weight.element_size()
    room = min(end, weight.nbytes)
    step = max(room // _CHUNKS, 1)
    pieces = [ctypes.string_at(start + at, min(_CHUNK, room - at)) for at in range(0, room, step)]
    return id(weight), weight._version, start, weight.dtype, weight.shape, weight.stride(), *pieces
