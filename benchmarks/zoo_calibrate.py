"""Give a freshly built network the statistics and gains of a trained one, in one forward pass.

A fresh norm (mean 0, variance 1, gain 1, shift 0) hides every mistake of a fold. Here each norm with stored statistics
takes those of the values that reach it, perturbed, at the moment of its first call, so that the layers behind it are
calibrated to what it then produces:

    mean = E[x] + 0.2 sd z      var = E[(x - E x)^2] u,  u in [0.5, 2]
    gain = s g,  g in [0.5, 1.5];  s = -1 for one channel in ten, 1e-3 for one in twenty;   shift = 0.3 z

Every other constant parameter (LayerNorm gains, LayerScale, zero-initialized biases and branches) is randomised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo_outputs import call


def calibrate(model: nn.Module, inputs: Any, seed: int) -> None:
    """Randomise ``model`` in place: constant parameters first, then each norm as the example reaches it."""
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if has_statistics(module)]
    owned = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in owned:
                randomise_constant(parameter, generator)
        reached = _calibrate_called(model, norms, inputs, generator) if norms else set()
        for norm in norms:
            if norm not in reached:
                like = torch.empty(norm.get_buffer("running_mean").shape, dtype=torch.float64)
                _set(norm, 0.2 * _normal(like, generator), _uniform(like, 0.5, 2, generator), generator)


def has_statistics(module: nn.Module) -> bool:
    """Return whether the module stores a running mean and variance (BatchNorm, FrozenBatchNorm and relatives)."""
    return isinstance(getattr(module, "running_mean", None), Tensor) and isinstance(
        getattr(module, "running_var", None), Tensor
    )


def randomise_constant(parameter: Tensor, generator: torch.Generator) -> None:
    """Replace a parameter whose entries are all equal: zeros by small values, gains by gains around the same value."""
    if not parameter.is_floating_point() or not parameter.numel() or (parameter != parameter.flatten()[0]).any():
        return
    value = parameter.flatten()[0].item()
    noise = _normal(parameter, generator)
    if value == 0:
        parameter.copy_(0.1 * noise)
    elif abs(value) < 0.05:  # a LayerScale starts at 1e-6 to 1e-2, which would hide its branch
        parameter.copy_(0.5 + 0.2 * noise)
    else:
        parameter.copy_(value * (1 + 0.2 * noise))


def _calibrate_called(
    model: nn.Module, norms: list[nn.Module], inputs: Any, generator: torch.Generator
) -> set[nn.Module]:
    reached: set[nn.Module] = set()
    handles = [norm.register_forward_pre_hook(_taker(reached, generator)) for norm in norms]
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def _taker(reached: set[nn.Module], generator: torch.Generator) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def take(norm: nn.Module, args: tuple[Any, ...]) -> None:
        if norm in reached:
            return
        reached.add(norm)
        mean, var = _statistics(args[0])
        mean = mean + 0.2 * var.sqrt() * _normal(mean, generator)
        _set(norm, mean, var * _uniform(var, 0.5, 2, generator), generator)

    return take


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over every axis but 1, with a floor that keeps a dead channel from exploding."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, mean = torch.var_mean(x, axes, correction=0)
    if x.numel() == x.shape[1]:
        var = torch.full_like(mean, mean.square().mean().item())
    return mean, torch.maximum(var, 0.01 * mean.square() + 0.05 * var.mean() + 1e-6)


def _set(norm: Any, mean: Tensor, var: Tensor, generator: torch.Generator) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    if isinstance(norm.weight, Tensor):
        gain = _uniform(norm.weight, 0.5, 1.5, generator)
        draw = _uniform(norm.weight, 0, 1, generator)
        norm.weight.copy_(torch.where(draw < 0.1, -gain, torch.where(draw > 0.95, 1e-3 * gain, gain)))
    if isinstance(norm.bias, Tensor):
        norm.bias.copy_(0.3 * _normal(norm.bias, generator))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=like.dtype)
