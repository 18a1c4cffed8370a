"""Turn a LayerNorm that is written out in ONNX nodes into one LayerNormalization node.

    n = (x - mean) / sqrt(var + eps);   y = n gamma + beta            exporters of torch before opset 17
    y = (x - mean) (gamma / sqrt(var + eps)) + beta                   jax2tf and tf2onnx
    y = x s + (beta - mean s),   s = gamma / sqrt(var + eps)          Keras by tf2onnx

One node is faster, keeps its sums in float32, and is what engines look for. Axes in the middle are transposed to the
end and back. The operator came with opset 17: a model of an older one is taken there where none of its operators
changed in between.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from normfuse.base import Reason, Refusal, Refused
from normfuse.lowering.onnx_graph import moments
from normfuse.lowering.onnx_graph.moments import Statistic
from normfuse.lowering.onnx_graph.plan import Names, prune
from normfuse.lowering.onnx_graph.values import dims, is_standard, label
from normfuse.report import Outcome, Status

PASS_NAME = "fuse-layer-norm"
LAYER = "LayerNormalization"
OPSET = 17
_WIDENED = {"Add", "Sub", "Mul", "Div", "Pow", "Relu", "LeakyRelu", "PRelu", "Where", "Identity", "Reshape", "CumSum"}
"""Operators of which a version up to 17 took more types, or got an attribute that by default changes nothing."""
_KINDS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass(slots=True, eq=False)
class _Written:
    """A LayerNorm written out: ``output`` is the normalized ``x``, with gain and shift where these are constants."""

    output: ir.Value
    of: Statistic
    eps: float
    gain: np.ndarray | None = None
    shift: np.ndarray | None = None


def fuse_layer_norms(model: ir.Model, include: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[Outcome, ...]:
    """Replace what can be replaced in a model, in place, and return one outcome per LayerNorm that is written out."""
    names = Names(model)
    outcomes = []
    moved: dict[ir.Value, ir.Value] = {}
    for graph in model.graphs():
        for written in list(_found(graph)):
            node = written.output.producer()
            assert node is not None
            subject = label(node)
            refusal = _left_out(subject, include, exclude) or _refusal(written, model)
            if refusal is None:
                x = moved.get(written.of.x, written.of.x)  # a norm may read another one
                written.of = Statistic(x, written.of.axes)
                moved[written.output] = _replace(written, graph, names)
            status = Status.APPLIED if refusal is None else Status.REFUSED
            outcomes.append(Outcome(PASS_NAME, status, subject, LAYER, refusal=refusal, remains=refusal is None))
    return tuple(outcomes)


# find


def _found(graph: ir.Graph) -> Iterator[_Written]:
    taken: set[ir.Value] = set()
    for node in graph:
        written = _core(node) if is_standard(node) else None
        if written is None or written.output in taken:
            continue
        written = _with_affine(written)
        taken.add(written.output)
        yield written


def _core(node: ir.Node) -> _Written | None:
    """Return the norm whose division, or whose product with the inverse root, a node is."""
    if node.op_type == "Div":
        found, centre = moments.deviation(node.inputs[1]), moments.centred(node.inputs[0])
        matches = found is not None and found[0].same(centre)
        return _Written(node.outputs[0], found[0], found[1]) if found is not None and matches else None
    if node.op_type == "Add":
        return _keras(node)
    if node.op_type != "Mul":
        return None
    for left, right in (moments.operands(node), moments.operands(node)[::-1]):
        centre = moments.centred(left)
        scale = _scale(right) if centre is not None else None
        if scale is not None and scale[0].same(centre):
            return _Written(node.outputs[0], scale[0], scale[1], scale[2])
    return None


def _scale(value: ir.Value | None) -> tuple[Statistic, float, np.ndarray | None] | None:
    """Return ``(variance, eps, gamma)`` where a value is ``gamma / sqrt(variance + eps)``, gamma None if it is one."""
    plain = moments.inverse(value)
    if plain is not None:
        return *plain, None
    node = moments.producer(value, "Mul")
    for left, right in (moments.operands(node), moments.operands(node)[::-1]) if node is not None else ():
        found = moments.inverse(left)
        gain = moments.vector(right, found[0].axes, dims(found[0].x)) if found is not None else None
        if found is not None and gain is not None:
            return *found, gain
    return None


def _keras(node: ir.Node) -> _Written | None:
    """Return the norm ``x s + (beta - mean s)`` that ends in an Add."""
    for left, right in (moments.operands(node), moments.operands(node)[::-1]):
        product, rest = moments.producer(left, "Mul"), moments.producer(right, "Sub")
        taken = moments.producer(rest.inputs[1], "Mul") if rest is not None else None
        if product is None or rest is None or taken is None:
            continue
        for x, s in (moments.operands(product), moments.operands(product)[::-1]):
            scale = _scale(s)
            others = [v for v in taken.inputs if v is not s]
            centre = moments.mean(others[0]) if scale is not None and len(others) == 1 else None
            if scale is None or not scale[0].same(centre) or scale[0].x is not x:
                continue
            shift = moments.vector(rest.inputs[0], scale[0].axes, dims(scale[0].x))
            if shift is not None:
                return _Written(node.outputs[0], scale[0], scale[1], scale[2], shift)
    return None


def _with_affine(written: _Written) -> _Written:
    """Return the norm with the constant gain and then the constant shift that alone read it."""
    shape = dims(written.of.x)
    for operator in ("Mul", "Add"):
        if (written.gain if operator == "Mul" else written.shift) is not None:
            continue
        uses = list(written.output.uses())
        node = uses[0].node if len(uses) == 1 and not written.output.is_graph_output() else None
        if node is None or node.op_type != operator or not is_standard(node):
            continue
        array = moments.vector(node.inputs[1 - uses[0].idx], written.of.axes, shape)
        if array is not None:
            written.output = node.outputs[0]
            written.gain, written.shift = (array, None) if operator == "Mul" else (written.gain, array)
    return written


# check


def _left_out(subject: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> Refusal | None:
    wanted = not include or any(fnmatch.fnmatchcase(subject, pattern) for pattern in include)
    if wanted and not any(fnmatch.fnmatchcase(subject, pattern) for pattern in exclude):
        return None
    return Refusal(Reason.EXCLUDED, f"{subject} was left out by the user")


def _refusal(written: _Written, model: ir.Model) -> Refusal | None:
    try:
        _require_possible(written, model)
    except Refused as refused:
        return refused.refusal
    return None


def _require_possible(written: _Written, model: ir.Model) -> None:
    x, name = written.of.x, written.output.name
    if x.dtype not in _KINDS:
        raise Refused(Reason.DTYPE, f"{name} is {x.dtype}, and LayerNormalization computes in float32")
    trailing = written.of.axes == tuple(range(len(dims(x)) - len(written.of.axes), len(dims(x))))
    if not trailing and len(written.of.axes) > 1:
        raise Refused(Reason.AXIS, f"{name} is normalized over the axes {written.of.axes}, which are not the last")
    for axis in written.of.axes:
        if not isinstance(dims(x)[axis], int):
            raise Refused(Reason.RANK_UNKNOWN, f"the size of {x.name} along axis {axis} is not known")
    opset = model.opset_imports.get("", OPSET)
    if opset < OPSET and not _raise_opset(model, opset):
        text = f"the operator came with opset {OPSET}, and the model is of {opset}"
        raise Refused(Reason.UNSUPPORTED_LAYER, text, f"convert it (onnx.version_converter) to opset {OPSET}")


def _raise_opset(model: ir.Model, opset: int) -> bool:
    """Take a model to the opset of the operator, if all of its operators are the same there."""
    nodes = [node for body in (model.graph, *model.functions.values()) for node in body.all_nodes()]
    if model.functions or any(not _same_operator(n.op_type, opset) for n in nodes if is_standard(n)):
        return False
    model.opset_imports[""] = OPSET
    model.ir_version = max(model.ir_version, 8)  # the first with this opset
    return True


def _same_operator(operator: str, opset: int) -> bool:
    try:
        versions = [onnx.defs.get_schema(operator, at).since_version for at in (opset, OPSET)]
    except onnx.defs.SchemaError:
        return False
    return versions[0] == versions[1] or (operator in _WIDENED and opset >= 13)


# replace


def _replace(written: _Written, graph: ir.Graph, names: Names) -> ir.Value:
    """Put one LayerNormalization, between two Transposes if its axis is not last, in the place of the nodes.

    Returns:
        The value that took the place of the output.
    """
    x, axes = written.of.x, written.of.axes
    rank, last = len(dims(x)), written.output.producer()
    assert last is not None
    middle = axes[-1] != rank - 1
    order = [i for i in range(rank) if i not in axes] + list(axes)
    shape = [dims(x)[axis] for axis in axes]
    nodes: list[ir.Node] = []

    def add(operator: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        node = ir.node(operator, inputs, attributes=attributes)  # type: ignore[arg-type]
        node.outputs[0].name = names.fresh(f"{written.output.name}_{operator.lower()}")
        node.outputs[0].type = x.type
        node.name = node.outputs[0].name
        nodes.append(node)
        return node.outputs[0]

    value = add("Transpose", [x], perm=order) if middle else x
    gain = written.gain if written.gain is not None else np.ones(shape)  # type: ignore[arg-type]
    inputs = [value, _initializer("scale", gain, written, graph, names)]
    if written.shift is not None:
        inputs.append(_initializer("bias", written.shift, written, graph, names))
    value = add(LAYER, inputs, axis=-len(axes), epsilon=written.eps)
    if middle:
        value = add("Transpose", [value], perm=[order.index(i) for i in range(rank)])
    graph.insert_after(last, nodes)
    old, name = written.output, written.output.name
    value.shape, value.type, kept = old.shape, old.type, old.is_graph_output()
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    if kept:
        old.name, value.name = names.fresh(f"{name}_written_out"), name
    prune(old)
    return value


def _initializer(kind: str, array: np.ndarray, written: _Written, graph: ir.Graph, names: Names) -> ir.Value:
    dtype = written.of.x.dtype
    assert dtype is not None
    name = names.fresh(f"{written.output.name}_{kind}")
    value = ir.Value(name=name, const_value=ir.tensor(array.astype(dtype.numpy()), name=name, dtype=dtype))
    value.shape = ir.Shape(array.shape)
    value.type = ir.TensorType(dtype)
    graph.register_initializer(value)
    return value
