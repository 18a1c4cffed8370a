"""The calibrated form of a layer of torch: its arguments and its integers; the formulas are in ``calibrated``."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.numerics import exact
from normfuse.quantization.calibrated import CalibratedConv1d, CalibratedConv2d, CalibratedLayer, CalibratedLinear

KINDS: dict[type[nn.Module], type[CalibratedLayer]] = {
    nn.Linear: CalibratedLinear,
    nn.Conv1d: CalibratedConv1d,
    nn.Conv2d: CalibratedConv2d,
}
"""The calibrated form of each layer of torch."""


def arguments_of(module: nn.Linear | nn.Conv1d | nn.Conv2d, bits: int) -> dict[str, Any]:
    """Return the arguments, JSON values, of the calibrated form of a layer; it has a bias where the layer has none."""
    bias = True
    if isinstance(module, nn.Linear):
        return {"in_features": module.in_features, "out_features": module.out_features, "bias": bias, "bits": bits}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(module, name) for name in names} | {"bias": bias, "bits": bits}


def tensors_of(
    module: nn.Linear | nn.Conv1d | nn.Conv2d, input_scale: Tensor, input_shift: Tensor, bits: int, *, per_channel: bool
) -> dict[str, Tensor]:
    """Return the tensors of the calibrated form of a layer, worked out in float64.

    Args:
        module: The layer.
        input_scale: s_0, 0-d.
        input_shift: g, ``(in,)``.
        bits: Of weights and inputs.
        per_channel: Whether each output has a scale of its own; one for all otherwise.
    """
    limit = 2 ** (bits - 1) - 1
    weight = exact(module.weight).cpu()
    columns = torch.exp2(-input_shift.double().cpu())  # of each column of the weight of each output
    groups = getattr(module, "groups", 1)
    by_output = columns.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1).reshape(len(weight), -1)
    weight = weight * by_output.reshape(*by_output.shape, *[1] * (weight.dim() - 2))
    largest = weight.flatten(1).abs().amax(1) if weight.numel() else weight.new_zeros(len(weight))
    if not per_channel:
        largest = largest.max().expand(len(weight))
    wide = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
    scale = (largest / limit).clamp(min=torch.finfo(torch.float32).tiny).to(wide)
    values = weight / scale.double().reshape(-1, *[1] * (weight.dim() - 1))
    found = {
        "weight": values.round().clamp(-limit, limit).to(torch.int8),
        "weight_scale": scale,
        "input_scale": input_scale.to(wide),
        "input_shift": input_shift.to(torch.int8),
    }
    bias = module.weight.new_zeros(len(weight)) if module.bias is None else module.bias
    return {**found, "bias": bias.detach()}


def calibrated(
    module: nn.Linear | nn.Conv1d | nn.Conv2d,
    input_scale: Tensor,
    input_shift: Tensor,
    bits: int = 8,
    *,
    per_channel: bool = True,
) -> CalibratedLayer:
    """Return the calibrated form of a plain layer of torch, in eval mode on its device; arguments as above."""
    kind: Any = next(KINDS[cls] for cls in type(module).__mro__ if cls in KINDS)
    new = kind(**arguments_of(module, bits))
    for name, value in tensors_of(module, input_scale, input_shift, bits, per_channel=per_channel).items():
        dict(itertools.chain(new.named_parameters(), new.named_buffers()))[name].data = value.clone()
    return new.to(module.weight.device).eval()
