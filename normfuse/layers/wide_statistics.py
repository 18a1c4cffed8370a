"""Running statistics that stay in float32 when a module is moved to half precision, where averages no longer move."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.float16, torch.bfloat16)

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


def narrowed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``y`` in ``dtype``; itself where it has it, without a call.

    The compiler of torch 2.11 loses the gradients of an ``autograd.Function`` that returns a cast to the same type.
    """
    return y if y.dtype == dtype else y.to(dtype)


class WideStatistics(_Base):
    """Mixin before ``nn.Module``: ``half()`` and the like leave the module's own buffers in float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: b for name, b in self.named_buffers(recurse=False) if b.dtype in _WIDE}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = cast("Tensor", getattr(self, name))
            if now.dtype in _NARROW:
                setattr(self, name, value.to(device=now.device, dtype=torch.float32))
        return self
