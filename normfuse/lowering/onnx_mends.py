"""What stands between a graph of torch's exporter and a runtime that computes the same, put right before it is saved.

A 3-d convolution without bias is given one, zeros of shape ``(out, 2)`` (seen in torch 2.15); the operator wants
``(out,)`` or none, and no runtime takes it.

A zero padding before a max-pool is moved into the pool by ONNX Runtime (seen in 1.31), where it means minus infinity:
another value wherever all of a window is negative. It does so only where the padding is exactly zero, so it becomes the
smallest number above zero, unless what is padded cannot be negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_NOT_NEGATIVE = ("Relu", "Sigmoid", "Softmax", "Abs", "Exp", "Softplus")


def mend(model: Any) -> None:
    """Mend the graph of an ``onnx_ir.Model`` in place."""
    for node in model.graph:
        if node.domain == "" and node.op_type == "Conv":
            _drop_no_bias(node, model.graph)
        if node.domain == "" and node.op_type == "Pad" and _is_moved_into_a_max_pool(node):
            _pad_with_the_smallest(node, model.graph)


def _drop_no_bias(node: Any, graph: Any) -> None:
    """Take away a bias that is zero and no vector."""
    bias = node.inputs[2] if len(node.inputs) == 3 else None
    constant = None if bias is None else bias.const_value
    if constant is not None and len(constant.shape) != 1 and not constant.numpy().any():
        node.resize_inputs(2)
        _forget(bias, graph)


def _is_moved_into_a_max_pool(node: Any) -> bool:
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return False
    if not any(user.op_type == "MaxPool" for user, _ in node.outputs[0].uses()):
        return False
    before = node.inputs[0].producer()
    if before is not None and before.op_type in _NOT_NEGATIVE:
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return value is None or (value.const_value is not None and not value.const_value.numpy().any())


def _pad_with_the_smallest(node: Any, graph: Any) -> None:
    import onnx_ir as ir

    dtype = node.inputs[0].dtype
    zero = np.zeros((), dtype.numpy())
    name = f"{node.outputs[0].name}_smallest"
    tensor = ir.tensor(np.nextafter(zero, np.ones_like(zero)), name=name, dtype=dtype)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(()), type=ir.TensorType(dtype))
    graph.register_initializer(value)
    old = node.inputs[2] if len(node.inputs) > 2 else None
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)
    _forget(old, graph)


def _forget(value: Any, graph: Any) -> None:
    """Drop an initializer that nobody uses any more."""
    if value is not None and value.is_initializer() and not value.uses():
        del graph.initializers[value.name]
