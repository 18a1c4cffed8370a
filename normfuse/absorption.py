"""The new values with which an absorber takes a map: see :mod:`normfuse.numerics` for the formulas.

A layer without a bias gets one where that would be added; :mod:`normfuse.bias_trials` tries it where it is not plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from normfuse import bias_trials, numerics
from normfuse.absorbers import Absorber
from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.capture.leaves import base_layer
from normfuse.graph import ModelGraph, function_name
from normfuse.operations import describe


def absorb_output(absorber: Absorber, m: AffineMap, graph: ModelGraph) -> dict[str, Tensor]:
    """Return the float64 tensors, by name, with which the absorber's output is ``m`` of what it was.

    Raises:
        Refused: The map varies along another axis, or there is no place for its shift.
    """
    weight = graph.tensor(absorber.weight).detach()
    if absorber.kind in ("addend", "factor"):
        return _absorb_constant(absorber, weight, m)
    if absorber.kind == "norm" and weight.dim() != 1:
        raise Refused(Reason.AXIS, f"{absorber.name} normalises over several axes")
    scale, shift = m.vectors(_channel_axis(absorber, weight, graph), _out_size(absorber, weight), absorber.name)
    if absorber.kind == "embedding":
        return {absorber.weight: numerics.exact(weight) * scale + shift}
    if absorber.kind == "norm":
        return _absorb_gain(absorber, weight, scale, shift, graph)
    new = numerics.scale_outputs(weight, scale, groups=absorber.groups, transposed=absorber.transposed)
    old_bias = _bias(absorber, graph)
    return _with_bias(absorber, new, old_bias, shift if old_bias is None else scale * old_bias + shift, graph)


def absorb_input(absorber: Absorber, m: AffineMap, graph: ModelGraph) -> dict[str, Tensor]:
    """Return the float64 tensors, by name, with which the absorber does on ``x`` what it did on ``m`` of ``x``.

    Raises:
        Refused: As :func:`absorb_output`, or a shift would meet zero padding.
    """
    weight = graph.tensor(absorber.weight).detach()
    if m.has_shift and absorber.padded:
        raise Refused(Reason.NONZERO_PADDING, f"a shift cannot enter {absorber.name}, {_border(absorber)}")
    in_size = weight.shape[0] if absorber.transposed else weight.shape[1] * absorber.groups
    scale, shift = m.vectors(_channel_axis(absorber, weight, graph), in_size, absorber.name)
    new = numerics.scale_inputs(weight, scale, groups=absorber.groups, transposed=absorber.transposed)
    if not m.has_shift:
        return {absorber.weight: new}
    by_output = weight.T if absorber.kind == "linear" and absorber.transposed else weight
    added = numerics.output_of_shift(by_output, shift, groups=absorber.groups)
    old_bias = _bias(absorber, graph)
    return _with_bias(absorber, new, old_bias, added if old_bias is None else old_bias + added, graph)


def _border(absorber: Absorber) -> str:
    return "whose border sees fewer taps" if absorber.transposed else "which pads with zeros"


def _out_size(absorber: Absorber, weight: Tensor) -> int:
    if absorber.transposed:
        return weight.shape[1] * absorber.groups
    return weight.shape[1] if absorber.kind == "embedding" else weight.shape[0]


def _channel_axis(absorber: Absorber, weight: Tensor, graph: ModelGraph) -> int:
    """Return the axis of channels; that of a convolution counts from the end, as its batch axis may be missing."""
    if absorber.kind == "conv":
        return 1 - weight.dim()
    if absorber.kind != "norm":
        return -1
    if absorber.call is not None:
        return -1 if function_name(absorber.call) in ("layer_norm", "rms_norm") else 1
    module = graph.module(absorber.owner)
    if isinstance(module, _InstanceNorm):
        return -module._get_no_batch_dim()
    return 1 if isinstance(module, _NormBase | nn.GroupNorm) else -1


def _absorb_constant(absorber: Absorber, weight: Tensor, m: AffineMap) -> dict[str, Tensor]:
    value = numerics.exact(weight) * m.scale + (0 if absorber.kind == "factor" else m.shift)
    if value.numel() != weight.numel():
        raise Refused(Reason.NOT_CHEAPER, f"{absorber.name} would have to grow from {tuple(weight.shape)}")
    return {absorber.weight: value.reshape(weight.shape)}


def _absorb_gain(
    absorber: Absorber, weight: Tensor, scale: Tensor, shift: Tensor, graph: ModelGraph
) -> dict[str, Tensor]:
    bias = _bias(absorber, graph)
    new_bias = shift if bias is None else scale * bias + shift
    return _with_bias(absorber, numerics.exact(weight) * scale, bias, new_bias, graph)


def _bias(absorber: Absorber, graph: ModelGraph) -> Tensor | None:
    if absorber.bias is None:
        return None
    owner, _, attribute = absorber.bias.rpartition(".")
    value = getattr(graph.module(owner), attribute, None)
    return numerics.exact(value) if isinstance(value, Tensor) else None


def _with_bias(
    absorber: Absorber, weight: Tensor, old: Tensor | None, new: Tensor, graph: ModelGraph
) -> dict[str, Tensor]:
    if old is None and not bool((new != 0).any()):
        return {absorber.weight: weight}
    bias = absorber.bias if old is not None else _place_of_bias(absorber, graph)
    if bias is None:
        raise _without_bias(absorber, graph)
    return {absorber.weight: weight, bias: new}


def _without_bias(absorber: Absorber, graph: ModelGraph) -> Refused:
    if absorber.call is None:
        return Refused(Reason.NO_BIAS, f"{absorber.name} adds no bias")
    text = f"{describe(absorber.call, graph).label} adds no bias to what it makes of {absorber.weight}"
    return Refused(Reason.NO_BIAS, text, "let the call add one, of zeros")


def _place_of_bias(absorber: Absorber, graph: ModelGraph) -> str | None:
    """Return the name of the bias that would be added if the layer, which has none, had one.

    That is true of a layer with a forward of torch; it is tried where a function is called, or the forward is its own.
    """
    if absorber.call is not None:
        return bias_trials.place_of_bias(absorber.weight, graph)
    module = graph.module(absorber.owner)
    if base_layer(module) is None and isinstance(module, _ConvNd | nn.Linear):
        return absorber.bias if _bias_shows(module, _probe_shape(absorber, module, graph)) else None
    return absorber.bias


def _probe_shape(absorber: Absorber, module: nn.Module, graph: ModelGraph) -> tuple[int, ...]:
    calls = [graph.shape(call.inputs[0]) for call in graph.calls_of(absorber.owner) if call.inputs]
    if calls and calls[0] is not None:
        return calls[0]
    if isinstance(module, _ConvNd):
        return (1, module.in_channels, *[16] * len(module.kernel_size))
    return (1, int(getattr(module, "in_features", 1)))


def _bias_shows(module: Any, shape: tuple[int, ...]) -> bool:
    """Run the layer with a bias of zeros and one of random values, and see whether exactly that is the difference."""
    axis = 1 if isinstance(module, _ConvNd) else -1
    size = module.out_channels if isinstance(module, _ConvNd) else module.out_features
    weight = module.weight
    probe = torch.rand(size, dtype=torch.float64).to(weight)
    results = []
    with torch.no_grad():
        for bias in (torch.zeros_like(probe), probe):
            module.bias = nn.Parameter(bias, requires_grad=False)
            try:
                results.append(module(torch.zeros(shape, dtype=weight.dtype, device=weight.device)))
            except Exception:
                return False
            finally:
                module.bias = None
        expected = AffineMap.along(axis, results[0].dim(), torch.ones(size), probe.cpu()).shift
        return bool(torch.allclose((results[1] - results[0]).double().cpu(), expected.expand(results[0].shape), 1e-2))
