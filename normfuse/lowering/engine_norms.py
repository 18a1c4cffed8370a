"""Which nodes of an ONNX graph, and which layers of the engine built from it, still compute a normalization.

A norm is an operator of that name, every node that comes from a norm module of the source (the exporter writes the
classes of the modules into each node), or, in files without that, the shape of a norm that was written out: a square
root of a mean or of a sum of squares, and what divides by it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from normfuse.lowering import graphs

if TYPE_CHECKING:
    import onnx

OPERATORS = frozenset({"BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization"})
OPERATORS |= {"RMSNormalization", "LpNormalization", "MeanVarianceNormalization", "LRN"}
OPERATORS |= {"SimplifiedLayerNormalization", "SkipLayerNormalization"}
CLASSES = "pkg.torch.onnx.class_hierarchy"
_NORM_CLASS = re.compile(r"(Norm|Normalization)\w{0,6}$")
_MEANS = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"})
_BETWEEN = frozenset({"Add", "Max", "Clip", "Cast", "Identity", "Mul", "Div"})
_STEPS = 4  # nodes between the mean and the root: an epsilon, a factor 1/n, casts


def norm_nodes(model: onnx.ModelProto) -> dict[str, str]:
    """Return ``{node: norm}`` for every node that takes part in a norm, the norm named by its module or operator."""
    found = {}
    produced = {value: node for node in model.graph.node for value in node.output}
    for node in model.graph.node:
        norm = _named(node) or _written_out(node, produced)
        if norm and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            found[node.name] = norm
    return found


def _named(node: onnx.NodeProto) -> str:
    properties = {entry.key: entry.value for entry in node.metadata_props}
    classes, scopes = (_texts(properties.get(key, "[]")) for key in (CLASSES, graphs.SCOPES))
    module = scopes[-2] if len(scopes) > 1 else ""
    if len(classes) > 1 and _NORM_CLASS.search(classes[-2]):  # the innermost: a block named for its norm holds others
        return module or classes[-2].rpartition(".")[2]
    return (module or node.op_type) if node.op_type in OPERATORS else ""


def _texts(value: str) -> list[str]:
    try:
        return [str(one) for one in ast.literal_eval(value)]
    except (SyntaxError, ValueError):
        return []


def _written_out(node: onnx.NodeProto, produced: Mapping[str, onnx.NodeProto]) -> str:
    if node.op_type not in ("Sqrt", "Rsqrt"):
        return ""
    return f"a norm written out at {node.name}" if _reads_mean(node, produced, _STEPS) else ""


def _reads_mean(node: onnx.NodeProto, produced: Mapping[str, onnx.NodeProto], steps: int) -> bool:
    for source in filter(None, map(produced.get, node.input)):
        if source.op_type in _MEANS:
            return True
        if steps and source.op_type in _BETWEEN and _reads_mean(source, produced, steps - 1):
            return True
    return False


def norm_layers(layers: Iterable[Mapping[str, Any]], norms: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the layers of an engine that come from a norm, alone or fused with others, and which norms those are.

    Args:
        layers: The layers, each with its ``name``, ``type`` and the ``onnx`` nodes it was made from.
        norms: From :func:`norm_nodes`.
    """
    for layer in layers:
        inside = sorted({norms[node] for node in layer["onnx"] if node in norms})
        if inside:
            yield {"name": layer["name"], "type": layer["type"], "norms": inside}
