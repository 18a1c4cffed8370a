"""Fold BatchNormalization inside an ONNX graph, and make each LayerNorm that is written out one node.

The norm is a fixed map per channel, ``y = s x + c``. It moves backwards into the constants of what produces its input,
or else forwards into those of every reader of its output, through operations that keep channels apart
(:mod:`normfuse.lowering.onnx_graph`). Each fold opens the way for others, so the norms are tried until none moves.
What a LayerNorm can be written as is in :mod:`normfuse.lowering.onnx_graph.layer_norm`.

    result = fold_onnx("model.onnx")
    print(result.report)
    write(result.model, "model.folded.onnx")
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import CheckerPass, ShapeInferencePass

from normfuse.atomic_files import staged
from normfuse.errors import LoadError, LoweringError, PassContractError
from normfuse.lowering.onnx_graph import layer_norm
from normfuse.lowering.onnx_graph.driver import PASS_NAME, fold_norms
from normfuse.lowering.onnx_graph.plan import prune
from normfuse.lowering.onnx_graph.values import is_standard
from normfuse.report import Report

INLINE_LIMIT = 1 << 30  # bytes; above it weights go to a file of their own (protobuf ends at 2 GiB)

Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model


@dataclass(frozen=True, slots=True)
class OnnxFoldResult:
    """A folded model, and what became of each of its norms.

    Attributes:
        model: The folded model; weights in external files stay there until :func:`write`.
        report: One outcome per BatchNormalization node, and per LayerNorm that was written out in nodes; the subject is
            the node's name (of the last one), or its output's if unnamed.
    """

    model: ir.Model
    report: Report

    def to_proto(self) -> onnx.ModelProto:
        """Return the model as one ``ModelProto`` that holds all of its weights (less than 2 GiB).

        Raises:
            LoweringError: Something in the model cannot be written.
        """
        model = self.model.clone()
        try:
            ir.external_data.load_to_model(model)
            return ir.to_proto(model)
        except Exception as error:  # of the serializer, which wraps what it met
            raise LoweringError(f"the model cannot be written as ONNX: {_first_line(error)}") from error


def fold_onnx(source: Source, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> OnnxFoldResult:
    """Fold the BatchNormalization nodes of an ONNX model into the weights around them.

    A LayerNorm that is written out in small nodes becomes one LayerNormalization; see
    :mod:`normfuse.lowering.onnx_graph.layer_norm`.

    Names of inputs and outputs, metadata and all other nodes stay; an initializer that other nodes read as well is
    copied for the node at hand. The arithmetic is in float64, rounded once. The source is not changed.

    Args:
        source: A path, or a model of ``onnx`` or ``onnx_ir``.
        include: Shell patterns of norm names; if given, only those are folded.
        exclude: Shell patterns of norm names that are left.

    Raises:
        LoadError: The file, or the external file that holds its weights, cannot be read as ONNX.
    """
    model = _load(source)
    objection = _check(model)
    try:
        with _inferred_shapes(model):
            outcomes = fold_norms(model, tuple(include), tuple(exclude))
            fused = layer_norm.fuse_layer_norms(model, tuple(include), tuple(exclude))
    except OSError as error:  # external weights are read when a norm needs them
        raise LoadError(f"weights outside the ONNX file cannot be read: {error}") from error
    for graph in model.graphs():
        for value in tuple(graph.initializers.values()):
            prune(value)
    passes = (PASS_NAME, layer_norm.PASS_NAME) if fused else (PASS_NAME,)
    return OnnxFoldResult(model, Report((*outcomes, *fused), passes, _verified(model, objection)))


def count_ops(model: Source) -> collections.Counter[str]:
    """Return how many nodes of each operator a model holds, in subgraphs and functions too.

    An operator outside the ONNX standard is listed as ``domain::op``.
    """
    loaded = model if isinstance(model, ir.Model) else _load(model)
    bodies = (loaded.graph, *loaded.functions.values())
    nodes = (node for body in bodies for node in body.all_nodes())
    return collections.Counter(n.op_type if is_standard(n) else f"{n.domain}::{n.op_type}" for n in nodes)


def write(model: onnx.ModelProto | ir.Model, path: str | os.PathLike[str]) -> Path:
    """Write a model so that ``path`` holds either the old file or the whole new one, and return the path.

    A model whose weights lie in external files, or exceed 1 GiB, is written with one file ``<name>.data`` beside it;
    each of the two is replaced at once, the data first.
    """
    path = Path(path)
    loaded = model if isinstance(model, ir.Model) else ir.from_proto(model)
    data = f"{path.name}.data" if _wants_data_file(loaded) else None
    with staged(path, LoweringError) as target:
        try:
            ir.save(loaded, target, external_data=data)
        except OSError:
            raise
        except Exception as error:  # of the serializer, which wraps what it met
            raise LoweringError(f"the model cannot be written as ONNX: {_first_line(error)}") from error
    return path


def _load(source: Source) -> ir.Model:
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the model"
    try:
        if isinstance(source, ir.Model):
            return source.clone()
        loaded = ir.from_proto(source) if isinstance(source, onnx.ModelProto) else ir.load(source)
        loaded.clone()  # which follows every name in it
    except FileNotFoundError as error:
        raise LoadError(f"no such file: {source}") from error
    except Exception as error:  # protobuf, the deserializer and onnx each raise their own kinds
        raise LoadError(f"{name} is not a readable ONNX model: {_first_line(error)}") from error
    _require_weights(loaded, name)
    return loaded


def _require_weights(model: ir.Model, name: str) -> None:
    """Refuse weights that are not there, or of another size than their shape; external ones are looked at, not read.

    Raises:
        LoadError: There is one.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            try:
                if tensor is not None:
                    tensor.numpy()
            except FileNotFoundError as error:
                raise LoadError(f"{name}: weights outside the ONNX file cannot be read: {error}") from error
            except Exception as error:  # sizes, offsets, types and paths, each with an error of its own
                text = f"{name}: the weight {value.name} is damaged, here or in the file that holds it"
                raise LoadError(f"{text} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)


def _check(model: ir.Model) -> str:
    """Return what the ONNX checker has against a model, empty if nothing."""
    try:
        CheckerPass()(model)
    except Exception as error:  # the checker's own exception is wrapped by the pass
        return str(error.__cause__ or error).strip().splitlines()[0]
    return ""


def _verified(model: ir.Model, before: str) -> tuple[str, ...]:
    after = _check(model)
    if after and not before:
        raise PassContractError(f"folding made the model invalid: {after}")
    return (f"onnx.checker already objects to the source: {before}",) if before else ()


@contextlib.contextmanager
def _inferred_shapes(model: ir.Model) -> Iterator[None]:
    """Infer shapes for the routes, and take them back afterwards: the file does not change by them."""
    values = [value for graph in model.graphs() for node in graph for value in node.outputs]
    before = [(value, value.shape, value.type) for value in values]
    declared = [(graph, i, v.shape, v.type) for graph in model.graphs() for i, v in enumerate(graph.outputs)]
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    yield
    for value, shape, kind in before:
        value.shape, value.type = shape, kind
    for graph, index, shape, kind in declared:
        graph.outputs[index].shape, graph.outputs[index].type = shape, kind


def _wants_data_file(model: ir.Model) -> bool:
    tensors = [t for graph in model.graphs() for v in graph.initializers.values() if (t := v.const_value) is not None]
    return any(isinstance(t, ir.ExternalTensor) for t in tensors) or sum(t.nbytes for t in tensors) > INLINE_LIMIT
