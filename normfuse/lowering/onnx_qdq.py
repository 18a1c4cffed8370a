"""Calibrated integer layers as ONNX: QuantizeLinear and DequantizeLinear around Conv and MatMul.

    x -> Mul(2^g) -> Clip(-q s_0, q s_0) -> QuantizeLinear(s_0) -> DequantizeLinear(s_0)     the input of Conv or MatMul
    Wq, int8 -> DequantizeLinear(t, by output)                                               its weight

``Mul``, the power of two of each input channel, is there where the channels have different ones; the weights hold its
inverse. ``Clip`` keeps the integers within those of the layer, also of fewer than 8 bits, and from -128. For equal
inputs the integers are those of the layer, bit for bit; the sums are the runtime's.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.comparison import ANYTHING, Comparison
from normfuse.errors import LoweringError
from normfuse.lowering import graphs, integer_verdict, onnxruntime
from normfuse.quantization.calibrated import CalibratedLayer, CalibratedLinear
from normfuse.quantization.quantizing_layer import QuantizingLayer
from normfuse.quantization.shiftquant import along, powers_of_half
from normfuse.rerun import Samples
from normfuse.verify import verify


def is_calibrated(model: nn.Module) -> bool:
    """Whether a model has calibrated integer layers."""
    return any(isinstance(module, CalibratedLayer) for module in model.modules())


def stand_in(model: nn.Module, precision: str) -> nn.Module:
    """Let each calibrated layer of a model emit its nodes where it is exported; it then computes nothing of use.

    Raises:
        LoweringError: A layer quantizes afresh at each call, or another type than fp32 is asked for.
    """
    for name, module in model.named_modules():
        if isinstance(module, CalibratedLayer):
            if precision != "fp32":
                raise LoweringError(f"the model is quantized, and written with its own integers: fp32, not {precision}")
            module.forward = functools.partial(_emit, module, _hold(module))
        elif isinstance(module, QuantizingLayer):
            raise LoweringError(f"{name} quantizes afresh at each call, as in training: quantize with calibration data")
    return model


@dataclasses.dataclass(frozen=True)
class _Known:
    """What the exporter must not read from tensors: whether channels have different scales, and where they end."""

    shifted: bool
    most: float
    linear: bool


def _hold(layer: CalibratedLayer) -> _Known:
    """Register what the nodes of a layer hold, as buffers."""
    linear = isinstance(layer, CalibratedLinear)
    weight = layer.integers.T.contiguous() if linear else layer.integers
    factor = 1 / powers_of_half(layer.input_shift, layer.input_scale.dtype)
    values = {
        "qdq_weight": weight,
        "qdq_weight_zero": torch.zeros(len(layer.integers), dtype=torch.int8),
        "qdq_input_zero": torch.zeros((), dtype=torch.int8),
        "qdq_factor": factor if linear else factor.reshape(-1, *[1] * (layer.integers.dim() - 2)),
    }
    for name, value in values.items():
        layer.register_buffer(name, value)
    return _Known(bool(layer.input_shift.any()), layer.limit * float(layer.input_scale), linear)


def _emit(layer: Any, known: _Known, x: Tensor) -> Tensor:
    symbolic: Callable[..., Any] = torch.onnx.ops.symbolic
    x = x * layer.qdq_factor if known.shifted else x
    clipped, scale, zero = x.clamp(-known.most, known.most), layer.input_scale, layer.qdq_input_zero
    values = symbolic("QuantizeLinear", (clipped, scale, zero), {}, dtype=torch.int8, shape=x.shape)
    x = symbolic("DequantizeLinear", (values, scale, zero), {}, dtype=torch.float32, shape=x.shape)
    held = (layer.qdq_weight, layer.weight_scale, layer.qdq_weight_zero)
    options = {"dtype": torch.float32, "shape": layer.qdq_weight.shape}
    weight = symbolic("DequantizeLinear", held, {"axis": int(known.linear)}, **options)
    if known.linear:
        out = torch.matmul(x, weight)
        return out if layer.bias is None else out + layer.bias
    pads = layer.pads
    symmetric = pads[::2] == pads[1::2] and layer.padding_mode == "zeros"
    if not symmetric:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, pads, mode=mode)
    padding = tuple(reversed(pads[::2])) if symmetric else 0
    convolve: Any = F.conv1d if layer.dims == 1 else F.conv2d
    return convolve(x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


def compare(model: nn.Module, path: str | os.PathLike[str], samples: Samples) -> Comparison:
    """Compare a file with the integer model it was written from.

    Layer by layer, each on the integers that it reads in the file: its output must be within one quantization step,
    ``max|y| / q`` of the layer. From layer to layer a last bit can move an integer by one, so the outputs of the whole
    are held to their direction and largest entries only (:mod:`.integer_verdict`).
    """
    found = verify(model, Path(path), samples, tolerance=ANYTHING)
    steps = [layer_steps(model, path, inputs) for inputs in samples.values[:2]]
    worst = max(((size, name) for each in steps for name, size in each.items()), default=(0.0, ""))
    failure = found.failure
    if not failure and not worst[0] <= 1:
        failure = f"{worst[1]} is off by {worst[0]:.3g} quantization steps"
    note = (
        f"quantized: {len(steps[0])} layers, on the integers that each reads in the file, are {worst[0]:.1g} steps off"
    )
    found = dataclasses.replace(found, failure=failure, notes=(*found.notes, note))
    step = max(1 / layer.limit for layer in model.modules() if isinstance(layer, CalibratedLayer))
    return integer_verdict.judged(found, "the quantized model", step=step)


@torch.no_grad()
def layer_steps(model: nn.Module, path: str | os.PathLike[str], inputs: Any) -> dict[str, float]:
    """Return for each calibrated layer how far its output in the file is from the layer's on the same integers.

    In quantization steps. Layers that are called more than once are left out: the file does not tell their calls apart.
    """
    proto = graphs.load(Path(path), weights=True)
    read, written = _values_of_layers(proto)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CalibratedLayer) and n in read}
    present = {value.name for value in proto.graph.output}
    exposed = {value for name in layers for value in (read[name], written[name])} - present
    proto.graph.output.extend(graphs.require().ValueInfoProto(name=value) for value in sorted(exposed))
    opened = onnxruntime.session(proto, optimization="disabled")
    names = [slot.name for slot in opened.get_outputs()]
    values = dict(zip(names, onnxruntime.run(opened, inputs), strict=True))
    return {name: _steps(layer, values[read[name]], values[written[name]]) for name, layer in layers.items()}


def _values_of_layers(proto: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Return which integers each module reads, where it does so once, and which value it gives."""
    read: dict[str, str] = {}
    written: dict[str, str] = {}
    twice: set[str] = set()
    for node in proto.graph.node:
        module = graphs.module_of(node)
        written[module] = node.output[0]  # the last of its nodes remains
        if node.op_type == "QuantizeLinear":
            twice |= {module} & set(read)
            read[module] = node.output[0]
    return {name: value for name, value in read.items() if name not in twice}, written


def _steps(layer: CalibratedLayer, integers: Tensor, found: Tensor) -> float:
    axis = integers.dim() - 1 if isinstance(layer, CalibratedLinear) else 1
    steps = layer.input_scale * powers_of_half(layer.input_shift, layer.input_scale.dtype)
    x = integers * steps.cpu().reshape(along(axis, integers.dim()))
    expected = layer(x.to(layer.input_scale.device)).cpu()
    step = float(expected.abs().max()) / layer.limit
    return float((found - expected).abs().max()) / step if step else float(found.abs().max())
