"""Questions about an ONNX graph, and two edits that only a check needs.

Values live in initializers and in ``Constant`` nodes; nodes may hold subgraphs and models may hold functions. The
iterators here reach all of them.
"""

from __future__ import annotations

import ast
import collections
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from normfuse.divergence import manifest_pairs
from normfuse.errors import LoadError, MissingDependencyError

if TYPE_CHECKING:
    import onnx

INSTALL = "onnx is not installed: pip install 'normfuse[onnx]'"
SCOPES = "pkg.torch.onnx.name_scopes"
MANIFEST = "normfuse.manifest"


def require() -> Any:
    """Return the module ``onnx``.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(INSTALL) from error
    return onnx


def load(path: str | os.PathLike[str], *, weights: bool = False) -> onnx.ModelProto:
    """Read an ONNX file; with ``weights`` also the data it keeps in other files of its folder.

    Raises:
        LoadError: The file cannot be read, or is not an ONNX model.
        MissingDependencyError: onnx is not installed.
    """
    package = require()
    try:
        model = package.load(os.fspath(path), load_external_data=weights)
    except Exception as error:  # protobuf's and onnx's exceptions share no base class
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "not an ONNX model"
        raise LoadError(f"cannot read {os.fspath(path)}: {reason}") from error
    if not model.graph.node:
        raise LoadError(f"cannot read {os.fspath(path)}: not an ONNX model, or one without nodes")
    return model


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of the model: graph, subgraphs and functions."""
    yield from _nodes(model.graph.node)
    for function in model.functions:
        yield from _nodes(function.node)


def _nodes(sequence: Any) -> Iterator[onnx.NodeProto]:
    for node in sequence:
        yield node
        for graph in _subgraphs(node):
            yield from _nodes(graph.node)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield model.graph
    for node in nodes(model):
        yield from _subgraphs(node)


def constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every constant tensor: initializers, and values that nodes hold."""
    for graph in _graphs(model):
        yield from graph.initializer
    for node in nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def op_counts(model: onnx.ModelProto) -> collections.Counter[str]:
    """Return how many nodes of each operator the model has."""
    return collections.Counter(node.op_type for node in nodes(model))


def trains(node: onnx.NodeProto) -> bool:
    """Return whether the node normalizes with the statistics of the batch."""
    return any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)


def main_dtype(model: onnx.ModelProto) -> torch.dtype | None:
    """Return the floating-point type that holds most of the constants, or else of an input; None without any."""
    kinds = _floating()
    counts: collections.Counter[torch.dtype] = collections.Counter()
    for tensor in constants(model):
        if tensor.data_type in kinds:
            counts[kinds[tensor.data_type]] += max(1, int(torch.Size(tensor.dims).numel()))
    if counts:
        return counts.most_common(1)[0][0]
    inputs = (value.type.tensor_type.elem_type for value in model.graph.input)
    return next((kinds[kind] for kind in inputs if kind in kinds), None)


def _floating() -> dict[int, torch.dtype]:
    proto = require().TensorProto
    return {
        proto.FLOAT: torch.float32,
        proto.DOUBLE: torch.float64,
        proto.FLOAT16: torch.float16,
        proto.BFLOAT16: torch.bfloat16,
    }


def uses_bfloat16(model: onnx.ModelProto) -> bool:
    """Return whether the model computes with bfloat16 anywhere."""
    kind = require().TensorProto.BFLOAT16
    values = [*model.graph.input, *model.graph.output]
    return any(tensor.data_type == kind for tensor in constants(model)) or any(
        value.type.tensor_type.elem_type == kind for value in values
    )


def uses_float8(model: onnx.ModelProto) -> bool:
    """Return whether a constant of the model, such as a quantized weight, has eight bits of floating point."""
    proto = require().TensorProto
    kinds = {proto.FLOAT8E4M3FN, proto.FLOAT8E5M2, proto.FLOAT8E4M3FNUZ, proto.FLOAT8E5M2FNUZ}
    return any(tensor.data_type in kinds for tensor in constants(model))


def widen_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model, edited so that the same bfloat16 numbers are computed with in float32."""
    package = require()
    narrow, wide = package.TensorProto.BFLOAT16, package.TensorProto.FLOAT
    for tensor in constants(model):
        if tensor.data_type == narrow:
            array = package.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(package.numpy_helper.from_array(array, tensor.name))
    for node in nodes(model):
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == narrow:
                attribute.i = wide
    for graph in _graphs(model):
        del graph.value_info[:]
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == narrow:
                value.type.tensor_type.elem_type = wide
    return model


def expose_layers(model: onnx.ModelProto) -> dict[str, str]:
    """Make the output of each module of the source an output of the graph; return ``{module: value}``."""
    layers: dict[str, str] = {}
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
        for module in _modules(scopes):
            layers[module] = node.output[0]  # the last of its nodes remains
    new = set(layers.values()) - {value.name for value in model.graph.output}
    model.graph.output.extend(require().ValueInfoProto(name=value) for value in sorted(new))
    return layers


def module_of(node: onnx.NodeProto) -> str:
    """Return the innermost module of the source that a node comes from; empty where the file does not say."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    return next(reversed(_modules(scopes)), "")


def _modules(scopes: str) -> list[str]:
    """Return the modules that a node is in, outermost first: ``['', 'conv', 'conv2d_1']`` gives ``['conv']``."""
    try:
        names = ast.literal_eval(scopes)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # metadata of a file: of any form
        return []
    return [name for name in names[:-1] if isinstance(name, str) and name] if isinstance(names, list) else []


def pairs(model: onnx.ModelProto) -> list[set[str]]:
    """Return the pairs of layers that the manifest of the file lists as folded."""
    text = next((entry.value for entry in model.metadata_props if entry.key == MANIFEST), "{}")
    return manifest_pairs(json.loads(text))
