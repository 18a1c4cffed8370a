"""A network as if its weights and activations were integers, for a moment; and shifts that make up for it.

    weights, per output channel or per tensor:  s = max |W| / (2^(b-1) - 1);    W_q = s round(W / s)
    an activation with peak u, from l = 0:      s = u / (2^b - 1);              y_q = s round(clamp(y, 0, u) / s)

    correction of shifts, layer by layer in order, behind corrected layers:     b <- b + E[y] - E[y_q]   (per channel)

Rounding moves the mean and the variance of what a convolution writes. In front of a BatchNorm its statistics can follow
(:func:`normfuse.statistics.adaptive_batch_norm`); where the norm is folded the shift takes the change of the mean.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normfuse.calibration import Batch, Batches, Calibration, Enough, Listener, listen
from normfuse.capture import unwrap
from normfuse.norm_forms import as_tokens
from normfuse.progress import tracked
from normfuse.statistics.moments import ChannelMoments, gather
from normfuse.structure import restored_on_error

if TYPE_CHECKING:
    from normfuse.statistics.moments import Group

M = TypeVar("M", bound=nn.Module)
PRODUCTS = (_ConvNd, nn.Linear)
_log = logging.getLogger("normfuse")


@contextlib.contextmanager
def simulated_integers(
    model: M,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    per_channel: bool = True,
    peaks: Mapping[str, float] | None = None,
) -> Iterator[M]:
    """Run a block with the weights of convolutions and linear layers, and some activations, rounded to integers.

    Args:
        model: Any module; everything is as it was after the block.
        weight_bits: b of the weights, 2 to 16.
        activation_bits: b of the activations.
        per_channel: A scale for each output channel, or one for each weight.
        peaks: u by the name of an activation module, such as :func:`normfuse.statistics.peak_activations` gives; its
            output is clipped to ``[0, u]`` and rounded. No others are.

    Raises:
        ValueError: The bits are out of range, or a peak is not positive.
    """
    if not (2 <= weight_bits <= 16 and 2 <= activation_bits <= 16):
        raise ValueError("give 2 to 16 bits")
    if any(not peak > 0 for peak in (peaks or {}).values()):
        raise ValueError("a peak is a positive number")
    handles = []
    layers = {id(m.weight): m for m in model.modules() if isinstance(m, PRODUCTS) and isinstance(m.weight, Tensor)}
    saved = {key: layer.weight.detach().clone() for key, layer in layers.items()}
    try:
        for name, peak in (peaks or {}).items():
            handles.append(model.get_submodule(name).register_forward_hook(_rounding_hook(peak, activation_bits)))
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.copy_(rounded_weight(layer, weight_bits, per_channel=per_channel))
        yield model
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for key, layer in layers.items():
                layer.weight.copy_(saved[key])


def rounded_weight(layer: nn.Module, bits: int, *, per_channel: bool) -> Tensor:
    """Return the weight of a convolution or linear layer, rounded to integers times a scale; symmetric about 0."""
    weight = layer.weight.detach()  # type: ignore[union-attr]
    largest = 2 ** (bits - 1) - 1
    axes = _within_channel(layer, weight) if per_channel else list(range(weight.dim()))  # type: ignore[arg-type]
    scale = weight.abs().amax(axes, keepdim=True) / largest  # type: ignore[operator]
    return torch.where(scale > 0, (weight / scale).round().clamp(-largest, largest) * scale, 0.0)  # type: ignore[operator]


def _within_channel(layer: nn.Module, weight: Tensor) -> list[int]:
    """Return the axes over which one scale is shared; a transposed convolution of groups shares it among those."""
    axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
    return [i for i in range(weight.dim()) if i != axis]


def _rounding_hook(peak: float, bits: int) -> Callable[..., Tensor]:
    scale = peak / (2**bits - 1)
    return lambda module, args, output: (output.clamp(0, peak) / scale).round() * scale


def correct_bias(
    model: M,
    batches: Calibration,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    per_channel: bool = True,
    peaks: Mapping[str, float] | None = None,
    process_group: Group = None,
    progress: bool = True,
) -> M:
    """Move the shifts of a folded model so that its integer form has the means of the float one, in place.

    Each convolution and linear layer with a bias, in order of execution, gets ``b + E[y] - E[y_q]``, per channel, with
    y of the float model and ``y_q`` of the simulated one behind the layers that are corrected already. To be quantized
    afterwards; in floating point the model is the worse for it. The cost is one run over the data, and a partial one
    for each layer.

    Args:
        model: A folded model, in which each such layer has its bias; those without are logged and left.
        batches: As for :func:`normfuse.statistics.reestimate`.
        weight_bits: As for :func:`simulated_integers`, like the two that follow.
        activation_bits: As above.
        per_channel: As above.
        peaks: As above.
        process_group: As for :func:`normfuse.statistics.reestimate`.
        progress: Show a bar, if standard error is a terminal.

    Raises:
        ValueError: No layer has a bias, or there is no data.
    """
    inner = unwrap(model)
    layers: dict[str, Any] = {n: m for n, m in inner.named_modules() if isinstance(m, PRODUCTS) and m.bias is not None}
    if not layers:
        raise ValueError("no convolution or linear layer has a bias to correct; fold the norms first")
    data = Batches(batches, inner)
    wanted, order = written(inner, layers, data, process_group)
    rounding = {"weight_bits": weight_bits, "activation_bits": activation_bits, "per_channel": per_channel}
    with restored_on_error(inner, [layer.bias for layer in layers.values()]):
        for name in tracked(order, "correcting", shown=progress):
            with simulated_integers(inner, peaks=peaks, **rounding):
                found, _ = written(inner, {name: layers[name]}, data, process_group, stop=True)
            with torch.no_grad():
                layers[name].bias += (wanted[name].mean - found[name].mean).to(layers[name].bias)
    _log.info("corrected the shifts of %d layers", len(order))
    return model


def written(
    model: nn.Module, layers: Mapping[str, Any], data: Batches, group: Group, *, stop: bool = False
) -> tuple[dict[str, ChannelMoments], list[str]]:
    """Return the moments of what layers write, and their names in order of execution.

    Args:
        model: The model.
        layers: Convolutions and linear layers by name; one that is called several times has the moments of all calls.
        data: What to run on.
        group: Of processes, or None.
        stop: End each run after the first call.
    """
    moments: dict[str, ChannelMoments] = {}

    def listener_of(name: str, layer: Any) -> Listener:
        axis = -1 if isinstance(layer, nn.Linear) else 1

        def listener(_: Tensor, y: Tensor, padding: Tensor | None) -> None:
            moments.setdefault(name, ChannelMoments(y.shape[axis])).add(as_tokens(y, axis, padding))
            if stop:
                raise Enough

        return listener

    items: Iterator[Batch] = iter(data)
    listen(model, {layer: listener_of(name, layer) for name, layer in layers.items()}, items)
    gather(list(moments.values()), group, data.device)
    return moments, list(moments)
