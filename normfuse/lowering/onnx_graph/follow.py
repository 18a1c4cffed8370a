"""Operations that hand a per-channel map from input to output: they keep channels apart.

They are linear with weights that sum to one (averages, interpolation), move elements (reshapes), or commute with the
map under a condition: ``max(s x + c) = s max(x) + c`` for s >= 0; ``relu(s x) = s relu(x)`` for s >= 0 and no shift;
``relu(0 x + c) = relu(c)``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from normfuse import numerics
from normfuse.base import Reason, Refused
from normfuse.lowering.onnx_graph.channel_map import ChannelMap, reshaped
from normfuse.lowering.onnx_graph.routes import Route, register_follow
from normfuse.lowering.onnx_graph.values import constant, dims, exact, has_input, integers, label, rank, size


def identity(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass the map unchanged."""
    return m


def dropout(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass where the node is off: ``is_test`` up to opset 6, always up to 11, then without ``training_mode``."""
    mode = constant(node.inputs[2]) if has_input(node, 2) else np.False_
    if mode is None or np.any(mode) or (route.opset < 7 and not node.attributes.get_int("is_test", 0)):
        raise Refused(Reason.OPAQUE_OPERATION, f"{label(node)} (Dropout) may be in training mode")
    return m


def negation(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass with the shift negated: ``s (-x) + c = -(s x - c)``."""
    return m.with_shift(-m.shift)


def transpose(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass along the permuted axis."""
    order = integers(node, "perm") or list(range(rank(node.inputs[0])))[::-1]
    return m.on(order.index(m.axis) if forwards else order[m.axis])


def reshape(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass along the axis on which the channels are after the reshape, if there is one."""
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    return reshaped(m, before, after, label(node)) if forwards else reshaped(m, after, before, label(node))


def average(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass; a window that counts padding as zero passes a scale only."""
    _require_spatial(node, m)
    padded = any(integers(node, "pads") or ()) or node.attributes.get_string("auto_pad", "NOTSET").startswith("SAME")
    counted = node.attributes.get_int("count_include_pad", 0) and (padded or node.attributes.get_int("ceil_mode", 0))
    if counted and m.has_shift:
        raise Refused(Reason.NONZERO_PADDING, f"{label(node)} counts its zero padding, so a shift cannot pass")
    return m


def maximum(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass where no scale is negative and nothing reads the positions of the maxima."""
    _require_spatial(node, m)
    _require_order(node, m)
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise Refused(Reason.OPAQUE_OPERATION, f"the indices of {label(node)} are used")
    return m


def rectifier(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass a scale that is not negative; a shift only in channels of scale 0: constants, which are rectified."""
    if ((m.scale != 0) & (m.shift != 0)).any():
        raise Refused(Reason.OPAQUE_OPERATION, f"a shift cannot pass {label(node)} ({node.op_type})")
    _require_order(node, m)
    if not m.has_shift:
        return m
    slope, constants = (torch.from_numpy(np.array(v, np.float64)) for v in (_slope(node, m), m.shift))
    shift = (numerics.rectified if forwards else numerics.unrectified)(constants, slope)
    if bool(shift.isnan().any()):
        text = f"a channel of scale zero is a negative constant behind {label(node)}, which makes no such value"
        raise Refused(Reason.OPAQUE_OPERATION, text)
    return m.with_shift(shift.numpy())


def _slope(node: ir.Node, m: ChannelMap) -> np.ndarray:
    """Return the slope of a rectifier below zero, one number or one for each channel of the map."""
    if node.op_type != "PRelu":
        return np.asarray(node.attributes.get_float("alpha", 0.01) if node.op_type == "LeakyRelu" else 0.0)
    slope = exact(node, 1)
    slope = slope.reshape((1,) * (rank(node.inputs[0]) - slope.ndim) + slope.shape)
    if any(n != 1 for axis, n in enumerate(slope.shape) if axis != m.axis):
        raise Refused(Reason.AXIS, f"the slope of {label(node)} varies along other axes than the channels")
    return slope.reshape(-1)


def reduction(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass a mean or a maximum over axes other than the channel; reduced axes may vanish."""
    if node.op_type == "ReduceMax":
        _require_order(node, m)
    total = rank(node.inputs[0])
    axes = integers(node, "axes", 1)
    if not axes:
        axes = [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(total))
    reduced = {axis % total for axis in axes}
    kept = [a for a in range(total) if node.attributes.get_int("keepdims", 1) or a not in reduced]
    axis = m.axis if forwards else kept[m.axis]
    if axis in reduced:
        raise Refused(Reason.AXIS, f"{label(node)} reduces the channel axis")
    return m.on(kept.index(axis) if forwards else axis)


def resize(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass an interpolation whose weights sum to one and that leaves the channel axis alone."""
    if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Refused(Reason.OPAQUE_OPERATION, f"{label(node)} fills from outside the picture")
    if size(node.inputs[0], m.axis) != size(node.outputs[0], m.axis):
        raise Refused(Reason.AXIS, f"{label(node)} resizes the channel axis")
    return m


def part(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass a slice along axes other than the channel."""
    total = rank(node.inputs[0])
    axes = integers(node, "axes", 3)
    starts = integers(node, "starts", 1) if axes is None else None
    axes = list(range(len(starts or ()))) if axes is None else axes
    if m.axis in {axis % total for axis in axes} and size(node.inputs[0], m.axis) != size(node.outputs[0], m.axis):
        raise Refused(Reason.AXIS, f"{label(node)} slices the channel axis")
    if m.axis in {axis % total for axis in axes} and min(integers(node, "steps", 4) or [1]) < 0:
        raise Refused(Reason.AXIS, f"{label(node)} reverses the channel axis")
    return m


def pixel_shuffle(route: Route, node: ir.Node, m: ChannelMap, forwards: bool) -> ChannelMap:
    """Pass DepthToSpace backwards and SpaceToDepth forwards, where each channel becomes several with one map."""
    if m.axis != 1:
        raise Refused(Reason.AXIS, f"{label(node)} mixes axis {m.axis}")
    copies = node.attributes.get_int("blocksize", 1) ** 2
    spreads = forwards is (node.op_type == "SpaceToDepth")
    inner = node.attributes.get_string("mode", "DCR") == "CRD"
    channels = np.arange(m.size)
    if spreads:
        return m.take(np.repeat(channels, copies) if inner else np.tile(channels, copies), 1)
    count = m.size // copies
    grid = channels.reshape((count, copies) if inner else (copies, count))
    first, groups = (grid[:, 0], grid.T) if inner else (grid[0], grid)
    if any(not np.array_equal(v[g], v[first]) for v in (m.scale, m.shift) for g in groups):
        raise Refused(Reason.AXIS, f"{label(node)} merges channels of different scale")
    return m.take(first, 1)


def _require_spatial(node: ir.Node, m: ChannelMap) -> None:
    if m.axis > 1:
        raise Refused(Reason.AXIS, f"{label(node)} pools over axis {m.axis}, where the map is")


def _require_order(node: ir.Node, m: ChannelMap) -> None:
    if (m.scale < 0).any():
        raise Refused(Reason.SIGN, f"a negative scale cannot pass {label(node)} ({node.op_type})")


FOLLOW = {
    "Identity": identity,
    "Dropout": dropout,
    "Neg": negation,
    "Transpose": transpose,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), average),
    **dict.fromkeys(("MaxPool", "GlobalMaxPool"), maximum),
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu"), rectifier),
    **dict.fromkeys(("ReduceMean", "ReduceMax"), reduction),
    **dict.fromkeys(("Resize", "Upsample"), resize),
    "Slice": part,
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), pixel_shuffle),
}
for _op_type, _rule in FOLLOW.items():
    register_follow(_op_type, _rule)
