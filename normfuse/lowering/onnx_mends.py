"""What torch's exporter writes wrong, put right in its graph before it is saved.

A 3-d convolution without bias is given one, zeros of shape ``(out, 2)`` (seen in torch 2.15); the operator wants
``(out,)`` or none, and no runtime takes it.
"""

from __future__ import annotations

from typing import Any


def mend(model: Any) -> None:
    """Take away biases of convolutions that are zero and no vectors; ``model`` is an ``onnx_ir.Model``."""
    for node in model.graph:
        if node.op_type == "Conv" and node.domain == "" and len(node.inputs) == 3 and _is_no_bias(node.inputs[2]):
            bias = node.inputs[2]
            node.resize_inputs(2)
            if bias.is_initializer() and not bias.uses():
                del model.graph.initializers[bias.name]


def _is_no_bias(value: Any) -> bool:
    constant = None if value is None else value.const_value
    return constant is not None and len(constant.shape) != 1 and not constant.numpy().any()
