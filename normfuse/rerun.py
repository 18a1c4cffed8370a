"""Run a model again in another precision, without a trace on it.

The judge of a verification is the source in float64: its rounding is nine digits below that of float32, so what is
left of a difference belongs to the candidate. A ``forward`` that asks for a narrower type by name
(``x.float()``, ``softmax(..., dtype=torch.float32)``, ``torch.zeros(n)``) is given float64 instead for that run.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normfuse import surgery
from normfuse.capture.modes import seeded
from normfuse.exclusive import exclusive
from normfuse.graph import Inputs
from normfuse.outputs import arguments, copied, map_tensors

NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


@dataclass(frozen=True)
class Samples:
    """Several inputs for one model, each as :data:`normfuse.graph.Inputs`."""

    values: tuple[Inputs, ...]


def sample_inputs(inputs: Inputs, count: int, seed: int = 0) -> Samples:
    """Return ``inputs`` itself and ``count - 1`` random variants of the same shapes and types.

    Floating-point tensors keep their mean and spread (spread 1 where the example is constant); integers stay between
    the smallest and largest of the example, so that indices remain valid; booleans are kept.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    generator = torch.Generator().manual_seed(seed)
    variants = (map_tensors(inputs, lambda t: _variant(t, generator)) for _ in range(count - 1))
    return Samples((inputs, *variants))


def _variant(example: Tensor, generator: torch.Generator) -> Tensor:
    if example.numel() == 0 or example.is_complex() or example.dtype is torch.bool:
        return example
    if example.is_floating_point():
        wide = example.detach().double().cpu()
        spread = wide.std(correction=0)
        noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64)
        return (wide.mean() + noise * torch.where(spread > 0, spread, 1.0)).to(example)
    low, high = int(example.min()), int(example.max())
    return torch.randint(low, high + 1, example.shape, generator=generator).to(example)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model in eval mode, and every one of its modules back into its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def main_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the floating-point type that holds most of the model's elements, None where it has none."""
    counts: collections.Counter[torch.dtype] = collections.Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            counts[tensor.dtype] += max(tensor.numel(), 1)
    return counts.most_common(1)[0][0] if counts else None


def duplicate(model: nn.Module) -> nn.Module:
    """Return a copy of the model in eval mode."""
    return surgery.copy(model).eval()


def convert(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating-point parameters and buffers of a model, in place; complex ones stay."""
    casts: dict[torch.dtype, Callable[[nn.Module], nn.Module]] = {
        torch.float64: nn.Module.double,
        torch.float32: nn.Module.float,
        torch.float16: nn.Module.half,
        torch.bfloat16: nn.Module.bfloat16,
    }
    return casts[dtype](model)


def cast_inputs(inputs: Any, dtype: torch.dtype | None) -> Any:
    """Return a copy of the inputs with floating-point tensors in ``dtype`` (None: in their own)."""
    inputs = copied(inputs)
    return inputs if dtype is None else map_tensors(inputs, lambda t: t.to(dtype if t.is_floating_point() else None))


@exclusive
def run(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None = None, *, promote: bool = False) -> Any:
    """Call the model without gradients on a copy of the inputs.

    Args:
        model: The model, in eval mode and already in ``dtype``.
        inputs: What it takes.
        dtype: The type for floating-point inputs; None leaves them alone.
        promote: Read every narrower type that ``forward`` names as float64.
    """
    args, kwargs = arguments(cast_inputs(inputs, dtype))
    with torch.no_grad(), seeded(model), _Promote() if promote else contextlib.nullcontext():
        return model(*args, **kwargs)


class _Promote(TorchFunctionMode):
    """Reads narrower floating-point types as float64: in arguments, as the default, and where integers become floats.

    The default type of torch belongs to the whole process, so it is not changed; what is made by it is made again.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func in _CASTS else func
        args, kwargs = tuple(map(_widen, args)), {key: _widen(value) for key, value in (kwargs or {}).items()}
        if func in _factories() and kwargs.get("dtype") is None:
            return _made(func, args, kwargs)
        result = func(*args, **kwargs)
        if not (isinstance(result, Tensor) and result.dtype in NARROW and _takes_only_integers(args, kwargs)):
            return result
        try:  # an integer divided by another is of the default type
            return func(*map_tensors(args, Tensor.double), **map_tensors(kwargs, Tensor.double))
        except (RuntimeError, TypeError, IndexError):  # which wants its integers as they are
            return result


@functools.cache
def _factories() -> frozenset[Any]:
    """Return the functions that make a tensor out of none."""
    from torch.utils._device import _device_constructors

    return frozenset(_device_constructors())


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in (torch.rand, torch.randn, torch.normal):  # to call them twice would draw twice
        return func(*args, **{**kwargs, "dtype": torch.float64})
    result = func(*args, **kwargs)
    narrow = isinstance(result, Tensor) and result.dtype in NARROW
    return func(*args, **{**kwargs, "dtype": torch.float64}) if narrow else result


def _takes_only_integers(args: Any, kwargs: Any) -> bool:
    seen: list[Tensor] = []
    map_tensors((args, kwargs), lambda tensor: seen.append(tensor) or tensor)
    return bool(seen) and not any(tensor.is_floating_point() or tensor.is_complex() for tensor in seen)


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value
