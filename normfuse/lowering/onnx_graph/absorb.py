"""Operations that absorb a per-channel map in their constants.

Backwards, into what produces the value (``y = s (W x + b) + c``): rows of the weight by s, bias ``s b + c``.
Forwards, into what reads it (``W (s x + c) + b``): columns of the weight by s, bias ``b + W c``. A convolution adds W c
at the border only if it does not pad there.

Layouts: Conv ``(out, in/g, *k)``, ConvTranspose ``(in, out/g, *k)``, Gemm ``alpha A' B' + beta C`` with B' of
``(in, out)``, MatMul ``(..., in, out)`` on the right or ``(..., out, in)`` on the left.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from normfuse.base import Reason, Refused
from normfuse.lowering.onnx_graph import norm
from normfuse.lowering.onnx_graph.channel_map import ChannelMap
from normfuse.lowering.onnx_graph.routes import Route, register
from normfuse.lowering.onnx_graph.values import constant, exact, has_input, integers, label, rank, weight


def conv_backwards(route: Route, node: ir.Node, m: ChannelMap) -> None:
    """Scale the output channels of a Conv and shift its bias."""
    kernel = exact(node, 1)
    m = _along(node, m, 1, kernel.shape[0])
    route.plan.write(node, 1, kernel * m.scale.reshape(-1, *[1] * (kernel.ndim - 1)), weight(node, 1).dtype)
    _affine_bias(route, node, 2, m)


def conv_forwards(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Scale the input channels of a Conv; a shift needs a Conv that does not pad."""
    _require_data(node, index)
    kernel, groups = exact(node, 1), node.attributes.get_int("group", 1)
    m = _along(node, m, 1, kernel.shape[1] * groups)
    if m.has_shift and _pads(node, kernel.shape[2:]):
        raise Refused(
            Reason.NONZERO_PADDING, f"a shift cannot pass the zero padding of {label(node)}", "keep this norm"
        )
    scale, shift = (v.reshape(groups, 1, -1, *[1] * (kernel.ndim - 2)) for v in (m.scale, m.shift))
    grouped = kernel.reshape(groups, -1, *kernel.shape[1:])
    route.plan.write(node, 1, (grouped * scale).reshape(kernel.shape), weight(node, 1).dtype)
    if m.has_shift:
        _add_to_bias(route, node, 2, (grouped * shift).reshape(kernel.shape[0], -1).sum(1))


def transposed_backwards(route: Route, node: ir.Node, m: ChannelMap) -> None:
    """Scale the output channels of a ConvTranspose, which lie on axis 1 group by group, and shift its bias."""
    kernel, groups = exact(node, 1), node.attributes.get_int("group", 1)
    m = _along(node, m, 1, kernel.shape[1] * groups)
    scale = m.scale.reshape(groups, 1, -1, *[1] * (kernel.ndim - 2))
    grouped = kernel.reshape(groups, -1, *kernel.shape[1:])
    route.plan.write(node, 1, (grouped * scale).reshape(kernel.shape), weight(node, 1).dtype)
    _affine_bias(route, node, 2, m)


def transposed_forwards(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Scale the input channels of a ConvTranspose; a shift needs a kernel of one element and no stride."""
    _require_data(node, index)
    kernel, groups = exact(node, 1), node.attributes.get_int("group", 1)
    m = _along(node, m, 1, kernel.shape[0])
    uneven = any(n != 1 for n in (*kernel.shape[2:], *(integers(node, "strides") or ())))
    if m.has_shift and (uneven or any(integers(node, "pads") or ()) or any(integers(node, "output_padding") or ())):
        raise Refused(Reason.NONZERO_PADDING, f"{label(node)} (ConvTranspose) does not spread a shift evenly")
    columns = [1] * (kernel.ndim - 1)
    route.plan.write(node, 1, kernel * m.scale.reshape(-1, *columns), weight(node, 1).dtype)
    if m.has_shift:
        moved = (kernel * m.shift.reshape(-1, *columns)).reshape(groups, -1, kernel.shape[1])
        _add_to_bias(route, node, 2, moved.sum(1).reshape(-1))


def gemm_backwards(route: Route, node: ir.Node, m: ChannelMap) -> None:
    """Scale the columns of B'; ``beta C`` becomes ``s beta C + c`` with ``beta = 1``."""
    matrix, transposed = exact(node, 1), node.attributes.get_int("transB", 0)
    m = _along(node, m, 1, matrix.shape[0 if transposed else 1])
    scale = m.scale[:, None] if transposed else m.scale
    route.plan.write(node, 1, matrix * scale, weight(node, 1).dtype)
    if has_input(node, 2) or m.has_shift:
        _gemm_bias(route, node, m.scale * _beta_c(node) + m.shift)


def gemm_forwards(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Scale the rows of B'; ``beta C`` becomes ``beta C + alpha c B'`` with ``beta = 1``."""
    _require_data(node, index)
    matrix, transposed = exact(node, 1), node.attributes.get_int("transB", 0)
    m = _along(node, m, 0 if node.attributes.get_int("transA", 0) else 1, matrix.shape[1 if transposed else 0])
    route.plan.write(node, 1, matrix * (m.scale if transposed else m.scale[:, None]), weight(node, 1).dtype)
    if m.has_shift:
        moved = m.shift @ (matrix.T if transposed else matrix)
        _gemm_bias(route, node, _beta_c(node) + node.attributes.get_float("alpha", 1.0) * moved)


def matmul_backwards(route: Route, node: ir.Node, m: ChannelMap) -> None:
    """Scale the output side of the constant factor; a shift becomes an Add behind."""
    side = _constant_side(node)
    matrix, total = exact(node, side), rank(node.outputs[0])
    m = _along(node, m, total - 1 if side else total - 2, matrix.shape[-1 if side else -2])
    scale = m.scale if side else m.scale[:, None]
    route.plan.write(node, side, matrix * scale, weight(node, side).dtype)
    if m.has_shift:
        route.add_after(node.outputs[0], m.shift if side else m.shift[:, None], weight(node, side).dtype)


def matmul_forwards(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Scale the input side of the constant factor; a shift becomes an Add behind."""
    side = _constant_side(node)
    matrix, total = exact(node, side), rank(node.inputs[index])
    m = _along(node, m, total - 1 if side else total - 2, matrix.shape[-2 if side else -1])
    route.plan.write(node, side, matrix * (m.scale[:, None] if side else m.scale), weight(node, side).dtype)
    if m.has_shift:
        moved = np.matmul(m.shift[None, :], matrix) if side else np.matmul(matrix, m.shift[:, None])
        route.add_after(node.outputs[0], moved, weight(node, side).dtype)


def norm_backwards(route: Route, node: ir.Node, m: ChannelMap) -> None:
    """Change gain and bias of another normalization that ends in ``gain z + bias`` along the same axis."""
    if node.op_type == "BatchNormalization":
        norm.require_inference(node, route.opset)
    total = rank(node.outputs[0]) if node.op_type == "LayerNormalization" else 2
    m = _along(node, m, total - 1, weight(node, 1).shape[-1])
    if node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) not in (-1, total - 1):
        raise Refused(Reason.AXIS, f"the gain of {label(node)} has more axes than the channels")
    route.plan.write(node, 1, exact(node, 1) * m.scale, weight(node, 1).dtype)
    _affine_bias(route, node, 2, m)


def norm_forwards(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Compose with another inference BatchNormalization that keeps its statistics.

    With gain g, bias b, mean u and deviation d: gain ``g s``, bias ``b + g (c - u + s u) / d``.
    """
    _require_data(node, index)
    norm.channel_map(node, route.opset)
    gain, bias, mean = (exact(node, i) for i in (1, 2, 3))
    m = _along(node, m, 1, gain.size)
    route.plan.write(node, 1, gain * m.scale, weight(node, 1).dtype)
    moved = gain * (m.shift - mean + m.scale * mean) / norm.deviation(node)
    route.plan.write(node, 2, bias + moved, weight(node, 2).dtype)


def _affine_bias(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    if has_input(node, index):
        route.plan.write(node, index, m.scale * exact(node, index) + m.shift, weight(node, index).dtype)
    elif m.has_shift:
        route.plan.write(node, index, m.shift, weight(node, 1).dtype)


def _add_to_bias(route: Route, node: ir.Node, index: int, moved: np.ndarray) -> None:
    old = exact(node, index) if has_input(node, index) else 0.0
    route.plan.write(node, index, old + moved, weight(node, 1).dtype)


def _beta_c(node: ir.Node) -> np.ndarray | float:
    return node.attributes.get_float("beta", 1.0) * exact(node, 2) if has_input(node, 2) else 0.0


def _gemm_bias(route: Route, node: ir.Node, array: np.ndarray) -> None:
    route.plan.write(node, 2, array, weight(node, 1).dtype)
    if node.attributes.get_float("beta", 1.0) != 1.0:
        route.plan.set(node, ir.AttrFloat32("beta", 1.0))


def _constant_side(node: ir.Node) -> int:
    for side in (1, 0):
        if constant(node.inputs[side]) is not None and exact(node, side).ndim >= 2:
            return side
    weight(node, 1)  # refuses with the reason why the usual side is not constant
    raise Refused(Reason.AXIS, f"{label(node)} multiplies by a vector")


def _pads(node: ir.Node, kernel: tuple[int, ...]) -> bool:
    if node.attributes.get_string("auto_pad", "NOTSET").startswith("SAME"):
        return any(n != 1 for n in kernel)
    return any(integers(node, "pads") or ())


def _along(node: ir.Node, m: ChannelMap, axis: int, size: int) -> ChannelMap:
    """Return the map along the axis of a node's channels, of which there are so many.

    Raises:
        Refused: ``AXIS`` where it is along another one, or one of another number of channels.
    """
    if m.is_constant:
        return m.spread(axis, size)
    if m.axis != axis:
        text = f"the map varies along axis {m.axis}, the channels of {label(node)} lie along axis {axis}"
        raise Refused(Reason.AXIS, text)
    if m.size != size:
        raise Refused(Reason.AXIS, f"the map is one of {m.size} channels, {label(node)} has {size}")
    return m


def _require_data(node: ir.Node, index: int) -> None:
    if index != 0:
        raise Refused(Reason.OPAQUE_OPERATION, f"{label(node)} reads the value as its input {index}, not as data")


register("Conv", conv_backwards, conv_forwards)
register("ConvTranspose", transposed_backwards, transposed_forwards)
register("Gemm", gemm_backwards, gemm_forwards)
register("MatMul", matmul_backwards, matmul_forwards)
register("BatchNormalization", norm_backwards, norm_forwards)
for _op_type in ("InstanceNormalization", "LayerNormalization"):
    register(_op_type, norm_backwards, None)
