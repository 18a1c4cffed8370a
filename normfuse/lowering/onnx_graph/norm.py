"""An inference BatchNormalization node as a per-channel map.

    y = gain (x - mean) / sqrt(var + epsilon) + bias:   scale = gain / sqrt(var + epsilon),  shift = bias - scale mean

How a node says that it is in inference changed twice: ``is_test=1`` up to opset 6, a single output up to opset 13, and
``training_mode=0`` from opset 14. A node in training normalizes by its batch; it is refused and left as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from normfuse.base import Reason, Refused
from normfuse.lowering.onnx_graph.channel_map import ChannelMap
from normfuse.lowering.onnx_graph.values import constant, exact, label

EPSILON = float(np.float32(1e-5))  # attributes are float32, the default too


def channel_map(node: ir.Node, opset: int) -> ChannelMap:
    """Return the map that a BatchNormalization node applies along axis 1.

    Raises:
        Refused: ``BATCH_STATISTICS`` in training mode or with computed statistics, ``PARAMETRIZED`` with computed
            gain or bias, ``AXIS`` where it normalizes each element, ``NONFINITE`` with unusable statistics.
    """
    require_inference(node, opset)
    _require_stored_statistics(node)
    gain, bias, mean = (exact(node, index) for index in (1, 2, 3))
    with np.errstate(invalid="ignore", over="ignore"):
        scale = gain / deviation(node)
        shift = bias - scale * mean
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise Refused(Reason.NONFINITE, f"{label(node)} has non-finite parameters or statistics")
    return ChannelMap(scale, shift, 1)


def deviation(node: ir.Node) -> np.ndarray:
    """Return ``sqrt(var + epsilon)``, of shape (C,); refuses ``NONFINITE`` where the root does not exist."""
    variance = exact(node, 4) + node.attributes.get_float("epsilon", EPSILON)
    if not (variance > 0).all():
        raise Refused(Reason.NONFINITE, f"{label(node)} has a running variance that is not positive")
    return np.sqrt(variance)


def require_inference(node: ir.Node, opset: int) -> None:
    """Refuse a node that normalizes by its batch (``BATCH_STATISTICS``) or per element (``AXIS``)."""
    attributes = node.attributes
    if opset >= 14:
        training = "training_mode" in attributes and (
            attributes["training_mode"].is_ref() or attributes.get_int("training_mode") != 0
        )
    else:
        several = any(output.name for output in node.outputs[1:])
        training = several or (opset < 7 and attributes.get_int("is_test", 0) == 0)
    if training:
        raise Refused(
            Reason.BATCH_STATISTICS, f"{label(node)} is in training mode", "export the model in evaluation mode"
        )
    if attributes.get_int("spatial", 1) == 0:
        raise Refused(Reason.AXIS, f"{label(node)} normalizes each element, not each channel (spatial=0)")


def _require_stored_statistics(node: ir.Node) -> None:
    for index in (3, 4):
        value = node.inputs[index]
        if constant(value) is None and value is not None and not value.is_graph_input():
            raise Refused(Reason.BATCH_STATISTICS, f"the statistics {value.name} of {label(node)} are computed")
