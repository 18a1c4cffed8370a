"""The one place that compares a folded model with its source, and that makes norms which hide nothing.

A fresh BatchNorm has mean 0, variance 1, gain 1 and shift 0, and hides most fold bugs: :func:`randomize_norms` first.
Exact passes are compared in float64, where the algebra agrees to rounding; lower precision needs a stated tolerance.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

EXACT = 1e-10
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def assert_parity(
    reference: nn.Module, candidate: nn.Module, inputs: Inputs, *, tolerance: float | None = None
) -> None:
    """Assert that two models give the same outputs: same structure, shapes, dtypes and values.

    Args:
        reference: The source, run in eval mode.
        candidate: The folded model, run as it is.
        inputs: As ``example_inputs``.
        tolerance: Largest difference allowed, relative to the largest element of each output. 1e-10 by default in
            float64 and not at all by default in any other precision.
    """
    pairs = list(zip(outputs(reference, inputs), outputs(candidate, inputs), strict=True))
    for expected, found in pairs:
        assert (expected.shape, expected.dtype) == (found.shape, found.dtype)
        assert error(expected, found) <= _allowed(expected, tolerance), f"differs by {error(expected, found):.3g}"
    assert pairs, "nothing to compare"


def error(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference, relative to the largest element expected; infinite if one is not finite."""
    expected, found = (t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in (expected, found))
    if not bool(torch.isfinite(expected).all() and torch.isfinite(found).all()):
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    return float((expected - found).abs().max()) / max(float(expected.abs().max()), 1e-30)


def _allowed(expected: Tensor, tolerance: float | None) -> float:
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0
    if tolerance is None and expected.dtype not in (torch.float64, torch.complex128):
        raise TypeError(f"state a tolerance for {expected.dtype}: only float64 has one by default")
    return EXACT if tolerance is None else tolerance


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return every tensor of the model's output on copies of the inputs, in eval mode, from a fixed random state."""
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copied = cloned(inputs)
        args, kwargs = (
            ((), copied) if isinstance(copied, Mapping) else (copied, {}) if type(copied) is tuple else ((copied,), {})
        )
        return list(tensors(model(*args, **kwargs)))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode; a folded model refuses ``train()``, so the flags are set back one by one."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def cloned(value: Any) -> Any:
    """Return inputs with every tensor copied, in its memory format: a model may write into its input."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: cloned(item) for key, item in value.items()}
    return type(value)(map(cloned, value)) if isinstance(value, list | tuple) else value


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested outputs: sequences, mappings, dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for item in value.values() for tensor in tensors(item))
    elif isinstance(value, list | tuple):
        yield from (tensor for item in value for tensor in tensors(item))
    elif dataclasses.is_dataclass(value):
        yield from (tensor for item in dataclasses.fields(value) for tensor in tensors(getattr(value, item.name)))


def randomize_norms(model: nn.Module, seed: int = 0, *, positive: bool = False) -> nn.Module:
    """Give every norm random statistics, gain and shift, in place; gains have both signs and one is zero.

    Args:
        model: Any module; returned.
        seed: Of the values.
        positive: Make every gain positive, for the folds that pass a ReLU or a max-pool.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        statistics = hasattr(module, "running_var") or hasattr(module, "running_second_moment")
        if statistics or isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            _randomize(module, generator, positive)
    return model


def _randomize(norm: nn.Module, generator: torch.Generator, positive: bool) -> None:
    for name, low, high in (("running_mean", -1.0, 1.0), ("running_var", 0.3, 3.0), ("bias", -1.0, 1.0)):
        _fill(getattr(norm, name, None), low, high, generator)
    _fill(getattr(norm, "running_second_moment", None), 0.3, 3.0, generator)
    weight = getattr(norm, "weight", None)
    _fill(weight, 0.3, 2.0, generator)
    if isinstance(weight, Tensor) and not positive:
        with torch.no_grad():
            weight.view(-1)[::3] *= -1
            if weight.numel() > 2:
                weight.view(-1)[1] = 0


def _fill(tensor: Tensor | None, low: float, high: float, generator: torch.Generator) -> None:
    if isinstance(tensor, Tensor) and not isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        with torch.no_grad():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)


def example_of(model: nn.Module, batch: int = 2) -> Tensor:
    """Return a random image batch of the size that a timm model states, else 3x64x64, in the model's dtype."""
    config = getattr(model, "default_cfg", None) or {}
    size = config.get("input_size", (3, 64, 64))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)
