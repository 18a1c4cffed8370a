"""Operations of several tensors, and padding: how a per-channel map splits among their inputs.

- concat: each branch carries its part of the map; forwards, the other branches carry the identity
- sum: ``s (u + v) + c = (s u + c) + s v``: both are scaled, one is shifted
- product: ``s (u k) + c = (s u + c / k) k`` with a constant k per channel; without shift, one factor is scaled
- pad: ``s pad(u, p) + c = pad(s u + c, s p + c)``: the new pad value must be the same for every channel
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from normfuse import numerics
from normfuse.base import Reason, Refused
from normfuse.lowering.onnx_graph.channel_map import ChannelMap
from normfuse.lowering.onnx_graph.routes import Route, register
from normfuse.lowering.onnx_graph.values import constant, exact, has_input, integers, label, rank, size, weight


def concat_backwards(route: Route, node: ir.Node, m: ChannelMap) -> None:
    """Give each branch its part of the map, or all of it along another axis."""
    if _axis(node, rank(node.outputs[0])) != m.axis:
        for index in range(len(node.inputs)):
            route.backwards(node, index, m)
        return
    start = 0
    for index, value in enumerate(node.inputs):
        stop = start + size(value, m.axis)
        route.backwards(node, index, m.take(np.arange(start, stop), m.axis))
        start = stop


def concat_forwards(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Pass the map, with the identity on the channels of the other branches."""
    if _axis(node, rank(node.outputs[0])) != m.axis:
        raise Refused(Reason.AXIS, f"{label(node)} joins the value to others along another axis")
    sizes = [size(value, m.axis) for value in node.inputs]
    before, after = sum(sizes[:index]), sum(sizes[index + 1 :])
    scale = np.pad(m.scale, (before, after), constant_values=1.0)
    route.forwards(node.outputs[0], ChannelMap(scale, np.pad(m.shift, (before, after)), m.axis))


def split_forwards(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Give each output its part of the map, or all of it along another axis."""
    across = node.attributes.get_int("axis", 0) % rank(node.inputs[0]) != m.axis
    start = 0
    for output in node.outputs:
        stop = start if across else start + size(output, m.axis)
        route.forwards(output, m if across else m.take(np.arange(start, stop), m.axis))
        start = stop


def sum_backwards(route: Route, node: ir.Node, m: ChannelMap) -> None:
    """Scale both terms and shift one: a constant if there is one, else the first that can take it."""
    order = sorted((0, 1), key=lambda i: constant(node.inputs[i]) is None)
    takers = order if m.has_shift else order[:1]
    route.first_of([partial(_terms, route, node, m, taker) for taker in takers])


def _terms(route: Route, node: ir.Node, m: ChannelMap, taker: int) -> None:
    for index in (0, 1):
        sign = -1.0 if node.op_type == "Sub" and index == 1 else 1.0
        share = m.with_shift(sign * m.shift if index == taker else 0.0)
        _into_operand(route, node, index, share)


def sum_forwards(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Pass by a constant term: ``(s x + c) + k = s (x + k) + (c + k - s k)``."""
    axis = _output_axis(node, index, m)
    sign = -1.0 if node.op_type == "Sub" and index == 1 else 1.0
    shift = sign * m.shift
    if (m.scale != 1).any():
        term = _per_channel(node, 1 - index, m.on(axis), Reason.OPAQUE_OPERATION)
        shift = shift + (-term if node.op_type == "Sub" and index == 0 else term) * (1 - m.scale)
    route.forwards(node.outputs[0], m.on(axis).with_shift(shift))


def product_backwards(route: Route, node: ir.Node, m: ChannelMap) -> None:
    """Scale one factor; a shift passes by a constant factor that is one number per channel and not zero."""
    divides = node.op_type == "Div"
    if not m.has_shift:
        factors = [0] if divides else sorted((0, 1), key=lambda i: constant(node.inputs[i]) is None)
        route.first_of([partial(_into_operand, route, node, i, m) for i in factors])
        return
    index = next((i for i in ((1,) if divides else (0, 1)) if constant(node.inputs[i]) is not None), None)
    if index is None:
        raise Refused(Reason.NO_BIAS, f"a shift cannot pass {label(node)} ({node.op_type}) of two computed tensors")
    factor = _per_channel(node, index, m, Reason.NO_BIAS)
    if (factor == 0).any():
        raise Refused(Reason.NO_BIAS, f"a shift cannot pass {label(node)}, whose constant factor has zeros")
    _into_operand(route, node, 1 - index, m.with_shift(m.shift * factor if divides else m.shift / factor))


def product_forwards(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Pass a scale by any factor; a shift by a constant factor: ``(s x + c) k = s (x k) + c k``."""
    divides = node.op_type == "Div"
    if divides and index == 1:
        raise Refused(Reason.OPAQUE_OPERATION, f"{label(node)} divides by the value")
    axis = _output_axis(node, index, m)
    shift = m.shift
    if m.has_shift:
        factor = _per_channel(node, 1 - index, m.on(axis), Reason.NO_BIAS)
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = shift / factor if divides else shift * factor
    route.forwards(node.outputs[0], m.on(axis).with_shift(shift))


def pad_backwards(route: Route, node: ir.Node, m: ChannelMap) -> None:
    """Pass to what is padded; zero becomes another constant, the same for every channel."""
    _set_pad_value(route, node, m, lambda value: m.scale * value + m.shift)
    route.backwards(node, 0, m)


def pad_forwards(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Pass; the constant becomes the one that the map takes to it."""
    if index != 0:
        raise Refused(Reason.OPAQUE_OPERATION, f"{label(node)} reads the value as its input {index}")

    def before(value: float) -> np.ndarray:
        found = numerics.preimage(torch.tensor(m.scale), torch.tensor(m.shift), value)
        if found is None:
            text = f"{label(node)} pads with {value:g}, which a map with a scale of zero makes another constant"
            raise Refused(Reason.NONZERO_PADDING, text)
        return found.numpy()

    _set_pad_value(route, node, m, before)
    route.forwards(node.outputs[0], m)


def _set_pad_value(route: Route, node: ir.Node, m: ChannelMap, change: Callable[[float], np.ndarray]) -> None:
    total = rank(node.inputs[0])
    pads, axes = integers(node, "pads", 1), integers(node, "axes", 3) or list(range(total))
    if pads is None:
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{label(node)} is a Pad of an opset before 2")
    channel = [axis % total for axis in axes].index(m.axis) if m.axis in [a % total for a in axes] else None
    if channel is not None and (pads[channel] or pads[channel + len(axes)]):
        raise Refused(Reason.AXIS, f"{label(node)} pads the channel axis")
    if node.attributes.get_string("mode", "constant") != "constant" or not any(pads):
        return
    by_input = has_input(node, 2)
    old = float(exact(node, 2).reshape(())) if by_input else node.attributes.get_float("value", 0.0)
    new = change(old)
    if np.ptp(new) != 0:
        raise Refused(Reason.NONZERO_PADDING, f"{label(node)} pads every channel with the same constant")
    if new[0] == old:
        return
    if "pads" in node.attributes:
        route.plan.set(node, ir.AttrFloat32("value", float(new[0])))
        return
    dtype = weight(node, 2).dtype if by_input else _dtype(node)
    route.plan.write(node, 2, np.asarray(new[0]), dtype)


def _dtype(node: ir.Node) -> np.dtype:
    value = node.inputs[0]
    if value is None or value.dtype is None:
        raise Refused(Reason.DTYPE, f"the dtype that {label(node)} pads is not known")
    return np.dtype(value.dtype.numpy())


def _axis(node: ir.Node, total: int) -> int:
    return node.attributes.get_int("axis", 1) % total


def _into_operand(route: Route, node: ir.Node, index: int, m: ChannelMap) -> None:
    """Move a map of the output to a broadcast operand; a constant grows the channel axis if it lacks it."""
    _require_broadcast(node)
    if m.is_identity:
        return
    if constant(node.inputs[index]) is not None:
        scale, shift = m.aligned(rank(node.outputs[0]))
        route.plan.write(node, index, scale * exact(node, index) + shift, weight(node, index).dtype)
        return
    axis = m.axis - rank(node.outputs[0]) + rank(node.inputs[index])
    if axis < 0 or size(node.inputs[index], axis) != m.size:
        raise Refused(Reason.AXIS, f"input {index} of {label(node)} is broadcast along the channels")
    route.backwards(node, index, m.on(axis))


def _require_broadcast(node: ir.Node) -> None:
    """Refuse the broadcasting by attributes of opsets before 7, which aligns operands elsewhere."""
    if "axis" in node.attributes or "broadcast" in node.attributes:
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{label(node)} broadcasts as before opset 7", "convert the opset")


def _output_axis(node: ir.Node, index: int, m: ChannelMap) -> int:
    _require_broadcast(node)
    axis = m.axis + rank(node.outputs[0]) - rank(node.inputs[index])
    if size(node.outputs[0], axis) != m.size:
        raise Refused(Reason.AXIS, f"input {index} of {label(node)} is broadcast along the channels")
    return axis


def _per_channel(node: ir.Node, index: int, m: ChannelMap, reason: Reason) -> np.ndarray:
    """Return a constant operand as one number per channel, of shape (C,); refuse any other."""
    if constant(node.inputs[index]) is None:
        raise Refused(reason, f"{label(node)} ({node.op_type}) joins the value to a computed one")
    array = exact(node, index)
    total = max(rank(node.outputs[0]), array.ndim)
    array = array.reshape((1,) * (total - array.ndim) + array.shape)
    if any(n != 1 for axis, n in enumerate(array.shape) if axis != m.axis):
        raise Refused(reason, f"the constant of {label(node)} varies along other axes than the channels")
    return np.broadcast_to(array.reshape(-1), (m.size,))


register("Concat", concat_backwards, concat_forwards)
register("Split", None, split_forwards)
register("Pad", pad_backwards, pad_forwards)
for _op_type in ("Add", "Sub"):
    register(_op_type, sum_backwards, sum_forwards)
for _op_type in ("Mul", "Div"):
    register(_op_type, product_backwards, product_forwards)
