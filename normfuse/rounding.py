"""How far rounding takes the outputs of a model, measured by one run of it.

Every *vector* that the model stores (gains, shifts, statistics, biases: tensors with one axis) is moved by one unit in
the last place, up or down. That is rounding as it happens at every layer, and it passes through the rest of the network
as any rounding does, however much that amplifies it. No second copy of the weights is made.

A unit is that of the digits which are really kept. They may be fewer than those of the model's type: where products
run in TF32, under autocast, or where a ``forward`` casts to a narrower type on its way, as norms of transformers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse.calibration import module_path
from normfuse.capture.modes import in_mode, unchanged
from normfuse.examples import Inputs
from normfuse.outputs import arguments, copied, leaves

Leaves = Mapping[str, Any]


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs, tensors: Mapping[str, Tensor] | None = None) -> Leaves:
    """Return what a model returns in eval mode, by name; it, its inputs and the generators stay as they were.

    Args:
        model: Any module.
        inputs: What it takes.
        tensors: Parameters and buffers that take the place of its own for this run.
    """
    args, kwargs = arguments(copied(inputs))
    with in_mode(model, training=False), module_path(), unchanged(model):
        return leaves(functional_call(model, dict(tensors), args, kwargs) if tensors else model(*args, **kwargs))


def moved_run(model: nn.Module, inputs: Inputs, eps: float) -> tuple[Leaves, float]:
    """Return what a model returns with its vectors moved, and the ``eps`` of the digits that it keeps on its way.

    Args:
        model: The model.
        inputs: What it takes.
        eps: The unit by which vectors move; where fewer digits are kept, the model is run again with theirs.

    Returns:
        Nothing, in place of the outputs, where tensors cannot be exchanged, as in a scripted module.
    """
    casts = _Casts()
    try:
        with casts:
            moved = run(model, inputs, _moved(model, eps))
        return (run(model, inputs, _moved(model, casts.eps)), casts.eps) if casts.eps > eps else (moved, eps)
    except Exception:  # such a module may refuse in any way
        return {}, max(eps, casts.eps)


class _Casts(TorchDispatchMode):
    """Watches for casts that lose digits; ``eps`` is that of the narrowest type."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping the handler, which would import the whole compiler."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_floating_point() and result.is_floating_point():
            before, after = (torch.finfo(tensor.dtype).eps for tensor in (args[0], result))
            self.eps = max(self.eps, after if after > before else 0.0)
        return result


def _moved(model: nn.Module, eps: float) -> dict[str, Tensor]:
    """Return every vector of a model, each element one ``eps`` of itself larger or smaller."""
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dim() and tensor.numel() == max(tensor.shape):
            sign = torch.randint(0, 2, tensor.shape, generator=generator).mul_(2).sub_(1).to(tensor.device)
            step = max(eps, torch.finfo(tensor.dtype).eps) * sign
            moved[name] = (tensor.detach() + tensor.detach() * step).to(tensor.dtype)
    return moved


def working_eps(model: nn.Module, dtype: torch.dtype) -> float:
    """Return the relative error of products where the model is: those of float32 may be computed with fewer digits."""
    eps = torch.finfo(dtype).eps
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    if dtype is not torch.float32 or tensor is None:
        return eps
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator) for shape in ((1, 32, 8, 8), (32, 32, 3, 3)))
    pairs = [(F.conv2d, (x, w)), (F.linear, (x.flatten(2).squeeze(0), torch.randn(32, 64, generator=generator)))]
    errors = []
    for function, operands in pairs:
        exact = function(*(t.double() for t in operands))
        found = function(*(t.to(tensor.device) for t in operands)).double().cpu()
        errors.append(float((found - exact).abs().max() / exact.abs().max()))
    return max(errors) if max(errors) > 64 * eps else eps
