"""Quantizers of eight-bit floating point, E4M3, from those of symmetric eight-bit integers of the same range.

    s = max|x| / 448,   q(x) = e4m3(x / s),   dq(q) = s q        s per tensor for values, per output channel for weights

448 is the largest number of E4M3. With three bits behind the leading one, the error is at most ``2^-4 |x|``, and
``2^-10 s`` below ``2^-6 s``. Other than for integers, a smaller scale is no better: it saturates the largest values and
is finer for none but the smallest. ONNX Runtime's own quantizer takes one, per tensor: the standard deviation of the
values over that of all numbers of E4M3. It saturates whatever is over 4.5 deviations from zero: the large weights of a
depthwise convolution, and every output of a softmax that is nearly uniform.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normfuse.errors import LoweringError
from normfuse.lowering import graphs

if TYPE_CHECKING:
    import onnx

LARGEST = torch.finfo(torch.float8_e4m3fn).max
LARGEST_INTEGER = 127
OPSET = 19  # the first whose quantizers take E4M3
QUANTIZED = "_quantized"  # what ONNX Runtime's quantizer appends to the name of a weight


def grouped_convolutions(path: Path) -> list[str]:
    """Return the names of the nodes that convolve in groups, as depthwise: E4M3 costs digits there and saves no time.

    TensorRT has no fast kernels for them, and advises int8 for networks of them (release notes of 10.12, as quoted in
    NVIDIA/TensorRT issue 4524).
    """
    nodes = [node for node in graphs.load(path).graph.node if node.op_type in ("Conv", "ConvTranspose")]
    return [node.name for node in nodes if any(one.name == "group" and one.i > 1 for one in node.attribute)]


def from_integers(path: Path, source: Path) -> None:
    """Rewrite a file with symmetric int8 quantizers for E4M3, in place.

    Args:
        path: The file; its int8 values reach from -127 to 127, and only its scales are used.
        source: The float32 file that it was made from, which holds the weights unrounded.

    Raises:
        LoweringError: The operators of the file are of a version without E4M3.
    """
    package = graphs.require()
    outside = path.with_name(f"{path.name}.data")
    external = outside.exists()
    model = graphs.load(path, weights=True)
    _require_opset(model)
    _convert(model, {tensor.name: tensor for tensor in graphs.load(source, weights=True).graph.initializer})
    outside.unlink(missing_ok=True)  # onnx would append to it
    package.save(model, os.fspath(path), save_as_external_data=external, location=outside.name)


def _require_opset(model: onnx.ModelProto) -> None:
    version = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if version < OPSET:
        raise LoweringError(f"fp8 needs opset {OPSET} or later, not {version}")


def _convert(model: onnx.ModelProto, unrounded: dict[str, onnx.TensorProto]) -> None:
    """Give the quantizers of a model E4M3 scales, zero points and weights."""
    helper: Any = graphs.require().numpy_helper
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for name in {node.input[1] for node in nodes}:
        scale = helper.to_array(tensors[name]) * (LARGEST_INTEGER / LARGEST)
        tensors[name].CopyFrom(helper.from_array(scale.astype("float32"), name))
    for name in {node.input[2] for node in nodes}:
        _store(tensors[name], torch.zeros(tuple(tensors[name].dims)))
    for node in nodes:
        if node.input[0] in tensors:
            weight = torch.from_numpy(helper.to_array(unrounded[node.input[0].removesuffix(QUANTIZED)]).copy())
            scale = torch.from_numpy(helper.to_array(tensors[node.input[1]]).copy())
            _store(tensors[node.input[0]], weight / _along(scale, node, weight.dim()))


def _along(scale: Tensor, node: onnx.NodeProto, dims: int) -> Tensor:
    """Return the scale, ``()``, or the scales along the node's axis, ``(1, channels, 1, ...)`` with ``dims`` axes."""
    if scale.dim() == 0:
        return scale
    axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
    shape = [1] * dims
    shape[axis] = -1
    return scale.reshape(shape)


def _store(tensor: onnx.TensorProto, values: Tensor) -> None:
    """Replace a tensor by values in E4M3, rounded to nearest and saturated."""
    bits = values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    name = tensor.name
    tensor.Clear()
    tensor.name, tensor.data_type = name, graphs.require().TensorProto.FLOAT8E4M3FN
    tensor.dims.extend(values.shape)
    tensor.raw_data = bits.contiguous().numpy().tobytes()
