"""Questions about the values of an ONNX graph: is it constant, how many axes has it, who reads it.

A value is constant if no caller can replace it: an initializer that is not a graph input, a ``Constant`` node, or a
chain of the operations in ``EVALUATED`` over such values (exporters write weights through Identity or Transpose).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from normfuse.base import Reason, Refused
from normfuse.lowering.onnx_graph.channel_map import Dim

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


def is_standard(node: ir.Node) -> bool:
    """Return whether the operator is of the ONNX standard; a custom one may share its name but not its meaning."""
    return node.domain in ("", "ai.onnx")


def label(node: ir.Node) -> str:
    """Return the name of a node, or of its first output where it has none."""
    return node.name or node.outputs[0].name or node.op_type


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a constant value in its stored dtype, or None."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or not is_standard(node):
        return None
    return _of_constant(node, value) if node.op_type == "Constant" else _evaluated(node)


def weight(node: ir.Node, index: int) -> np.ndarray:
    """Return the constant floating-point input ``index`` of a node, in its stored dtype.

    Raises:
        Refused: ``PARAMETRIZED``, ``QUANTIZED`` or ``DTYPE``.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    array = constant(value)
    if array is not None:
        return _floating(array, node)
    name = value.name if value is not None else f"input {index}"
    producer = value.producer() if value is not None else None
    if value is not None and value.is_graph_input():
        hint = "remove it from the graph inputs" if value.is_initializer() else ""
        raise Refused(Reason.PARAMETRIZED, f"{name} of {label(node)} is a graph input, which a caller sets", hint)
    if producer is not None and producer.op_type in ("DequantizeLinear", "DynamicQuantizeLinear"):
        raise Refused(Reason.QUANTIZED, f"{name} of {label(node)} is quantized", "fold before quantizing")
    raise Refused(Reason.PARAMETRIZED, f"{name} of {label(node)} is computed at run time")


def exact(node: ir.Node, index: int) -> np.ndarray:
    """Return the constant input ``index`` of a node in float64; refuses as :func:`weight`."""
    return weight(node, index).astype(np.float64)


def has_input(node: ir.Node, index: int) -> bool:
    """Return whether an optional input is given."""
    return index < len(node.inputs) and node.inputs[index] is not None


def integers(node: ir.Node, name: str, index: int | None = None) -> list[int] | None:
    """Return a list of integers given as an attribute, or as an input by later opsets; None if not given.

    Raises:
        Refused: ``PARAMETRIZED``: it is an input and not constant.
    """
    if name in node.attributes:
        return list(node.attributes.get_ints(name, ()))
    if index is None or not has_input(node, index):
        return None
    array = constant(node.inputs[index])
    if array is None:
        raise Refused(Reason.PARAMETRIZED, f"{name} of {label(node)} is computed at run time")
    return [int(i) for i in array.reshape(-1)]


def dims(value: ir.Value | None) -> tuple[Dim, ...]:
    """Return the shape of a value: sizes, symbols, or None for an unknown size.

    Raises:
        Refused: ``RANK_UNKNOWN``.
    """
    array = constant(value)
    if array is not None:
        return array.shape
    if value is None or value.shape is None:
        name = value.name if value is not None else "an omitted input"
        raise Refused(Reason.RANK_UNKNOWN, f"the rank of {name} is not known", "give the model inputs a shape")
    sizes = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return tuple(None if isinstance(dim, int) and dim < 0 else dim for dim in sizes)


def rank(value: ir.Value | None) -> int:
    """Return the number of axes of a value; refuses as :func:`dims`."""
    return len(dims(value))


def size(value: ir.Value | None, axis: int) -> int:
    """Return the size of a value along an axis.

    Raises:
        Refused: ``RANK_UNKNOWN`` where it is not fixed.
    """
    found = dims(value)[axis]
    if isinstance(found, int):
        return found
    name = value.name if value is not None else "an omitted input"
    raise Refused(Reason.RANK_UNKNOWN, f"the size of {name} along axis {axis} is not known", "fix the input shapes")


def require_sole_use(value: ir.Value) -> None:
    """Refuse a value that more than one input reads, or that the graph returns besides.

    Raises:
        Refused: ``EXTRA_CONSUMER``.
    """
    readers = [label(use.node) for use in value.uses()]
    if value.is_graph_output():
        readers.append("the graph outputs")
    if len(readers) > 1:
        raise Refused(Reason.EXTRA_CONSUMER, f"{value.name} is read by {', '.join(readers)}")


def _of_constant(node: ir.Node, value: ir.Value) -> np.ndarray | None:
    """Return what a Constant node holds, None for a reference to an attribute of a function."""
    attribute = node.attributes.get("value")
    if attribute is not None:  # get_const_tensor would rename the tensor, which belongs to the user's model
        return None if attribute.is_ref() else attribute.as_tensor().numpy()
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _floating(array: np.ndarray, node: ir.Node) -> np.ndarray:
    if array.dtype.name not in FLOATS:
        raise Refused(Reason.DTYPE, f"{label(node)} holds {array.dtype.name} weights")
    return array


def _evaluated(node: ir.Node) -> np.ndarray | None:
    rule = EVALUATED.get(node.op_type)
    if rule is None or len(node.outputs) != 1:
        return None
    values = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
    inputs = [constant(value) for value in values]
    if any(array is None for array in inputs):
        return None
    array = rule(node, *inputs)
    return None if array is None else np.asarray(array)


def _reshape(node: ir.Node, array: np.ndarray, shape: np.ndarray) -> np.ndarray:
    copy_zero = not node.attributes.get_int("allowzero", 0)
    sizes = [array.shape[i] if copy_zero and n == 0 else int(n) for i, n in enumerate(shape)]
    return array.reshape(sizes)


def _unsqueeze(node: ir.Node, array: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return np.expand_dims(array, tuple(integers(node, "axes", 1) or ()))


def _squeeze(node: ir.Node, array: np.ndarray, *_: np.ndarray) -> np.ndarray:
    axes = integers(node, "axes", 1)
    return np.squeeze(array, None if axes is None else tuple(axes))


def _cast(node: ir.Node, array: np.ndarray) -> np.ndarray:
    return array.astype(ir.DataType(node.attributes.get_int("to", int(ir.DataType.FLOAT))).numpy())


def _cast_like(node: ir.Node, array: np.ndarray) -> np.ndarray | None:
    model = node.inputs[1]
    return None if model is None or model.dtype is None else array.astype(model.dtype.numpy())


def _shape(node: ir.Node, array: np.ndarray) -> np.ndarray:
    return np.array(array.shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)], np.int64)


EVALUATED: dict[str, Callable[..., np.ndarray | None]] = {
    "Identity": lambda node, array: array,
    "Transpose": lambda node, array: np.transpose(array, node.attributes.get_ints("perm", None)),
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Shape": _shape,
    "Expand": lambda node, array, shape: array * np.ones(shape, array.dtype),
    "Add": lambda node, a, b: a + b,
    "Sub": lambda node, a, b: a - b,
    "Mul": lambda node, a, b: a * b,
    "Div": lambda node, a, b: a / b,
    "Sqrt": lambda node, array: np.sqrt(array),
}
