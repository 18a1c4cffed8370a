"""Refusals in an ONNX graph: of norms, on their routes, and of LayerNorms that are written out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from normfuse.lowering.onnx_fold import OnnxFoldResult, fold_onnx
from normfuse.lowering.onnx_graph import branch
from normfuse.lowering.onnx_graph.channel_map import ChannelMap
from normfuse.lowering.onnx_graph.routes import Route
from tests.lowering.onnx_models import CONV, IMAGE, array, bn, model, norm, scaling

PLAIN = norm("n", 6)
POSITIVE = norm("n", 6, gain=np.linspace(0.5, 2, 6))
PAIR = IMAGE.replace("x)", "x, double[2,6,4,4] e)", 1)
INTO = "(double[2,6,6,6] x) => (double[?,?,?,?] y)"
BACK = "(double[2,6,6] x) => (double[?,?,?] y)"


@dataclass(frozen=True)
class OnnxCase:
    """One sentence: what the report says, behind a bar the hint; the graph as text; its constants.

    Attributes:
        change: Called with the model, for what the text cannot say.
        options: Arguments of the fold.
    """

    sentence: str
    text: str
    arrays: dict[str, Any] = field(default_factory=dict)
    norm: dict[str, np.ndarray] = field(default_factory=lambda: PLAIN)
    opset: int = 17
    change: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> OnnxFoldResult:
        """Fold the graph."""
        arrays = {name: value for name, value in (self.norm | self.arrays).items() if name in self.text}
        made = model(self.text, opset=self.opset, **arrays)
        if self.change is not None:
            self.change(made)
        return fold_onnx(made, **self.options)


def through(op: str) -> str:
    """A convolution, an operation on ``h``, and the norm."""
    return f"{IMAGE} {{ h = Conv(x, w, b) p = {op} y = {bn('p')} }}"


def ahead(op: str) -> str:
    """The norm and an operation on ``h``."""
    return f"{INTO} {{ h = {bn('x')} y = {op} }}"


def attribute(name: str, key: str, value: Any) -> Any:
    """Return what sets an attribute of the first node of an operator."""

    def change(made: onnx.ModelProto) -> None:
        node = next(node for node in made.graph.node if node.op_type == name)
        node.attribute.append(onnx.helper.make_attribute(key, value))

    return change


def as_input(name: str) -> Any:
    """Return what makes an initializer an input of the graph as well."""

    def change(made: onnx.ModelProto) -> None:
        shape = next(t.dims for t in made.graph.initializer if t.name == name)
        made.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, shape))

    return change


W6 = {"w6": array(3, 6, 1, 1)}
ONNX = [
    # norms
    OnnxCase("y is in training mode | export the model in evaluation mode", through("Neg(h)"), CONV,
             change=attribute("BatchNormalization", "training_mode", 1)),
    OnnxCase("y has a running variance that is not positive", through("Neg(h)"), CONV,
             PLAIN | {"n_var": np.full(6, -1.0)}),
    OnnxCase("y has non-finite parameters or statistics", through("Neg(h)"), CONV,
             PLAIN | {"n_mean": np.full(6, np.inf)}),
    OnnxCase("the statistics m of y are computed", f"{IMAGE.replace('x)', 'x, double[6] r)', 1)} {{ h = Conv(x, w, b)"
             " m = Sigmoid(r) y = BatchNormalization(h, n_gain, n_bias, m, n_var) }", CONV),
    OnnxCase("n_gain of y is a graph input, which a caller sets | remove it from the graph inputs",
             through("Neg(h)"), CONV, change=as_input("n_gain")),
    OnnxCase("y matches an excluded pattern", through("Neg(h)"), CONV, options={"exclude": ["y"]}),
    OnnxCase("y matches no included pattern", through("Neg(h)"), CONV, options={"include": ["z"]}),
    # what absorbs
    OnnxCase("a shift cannot pass the zero padding of y | keep this norm", ahead("Conv<pads=[1,1,1,1]>(h, w6)"), W6),
    OnnxCase("y (ConvTranspose) does not spread a shift evenly", ahead("ConvTranspose(h, t)"),
             {"t": array(6, 2, 3, 3)}),
    OnnxCase("the map varies along axis 1, the channels of h lie along axis 2",
             f"{BACK} {{ h = MatMul(x, v) y = {bn('h')} }}", {"v": array(6, 6)}),
    OnnxCase("y multiplies by a vector", f"{BACK.replace('?,?,?', '?,?')} {{ h = {bn('x')} y = MatMul(h, v) }}",
             {"v": array(6)}),
    OnnxCase("y reads the value as its input 1, not as data",
             "(double[6,4,1,1] x, double[2,4,6,6] z) => (double[?,?,?,?] y)"
             f" {{ h = {bn('x', 'm')} y = Conv(z, h) }}", norm("m", 4)),
    OnnxCase("the gain of h has more axes than the channels",
             f"{BACK} {{ h = LayerNormalization<axis=1>(x, g) t = Transpose<perm=[0,2,1]>(h) y = {bn('t')} }}",
             {"g": array(6, 6)}),
    OnnxCase("w of h is computed at run time", "(double[2,4,6,6] x, double[6,4,3,3] r) => (double[?,?,?,?] y)"
             f" {{ w = Sigmoid(r) h = Conv(x, w) y = {bn('h')} }}"),
    OnnxCase("h would hold 1e+05, beyond float16 | fold in float32 first",
             f"(float16[2,4,6,6] x) => (float16[?,?,?,?] y) {{ h = Conv(x, w) y = {bn('h')} }}",
             {"w": np.full((6, 4, 1, 1), 1e3, np.float16)},
             {name: value.astype(np.float16) for name, value in norm(
                 "n", 6, gain=np.full(6, 100.0), bias=np.zeros(6), mean=np.zeros(6), var=np.ones(6)).items()}),
    # operations
    OnnxCase("p (Sigmoid) has no rule", through("Sigmoid(h)"), CONV),
    OnnxCase("a shift cannot pass p (Relu)", through("Relu(h)"), CONV),
    OnnxCase("a negative scale cannot pass p (MaxPool)", through("MaxPool<kernel_shape=[2,2]>(h)"), CONV),
    OnnxCase("p counts its zero padding, so a shift cannot pass",
             through("AveragePool<kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1>(h)"), CONV),
    OnnxCase("p (Dropout) may be in training mode", through("Dropout(h, r, t)"),
             CONV | {"r": np.array(0.5), "t": np.array(True)}),
    OnnxCase("p reduces the channel axis", ahead("Conv(p, one)").replace("y =", "p = ReduceMean<axes=[1]>(h) y ="),
             {"one": array(2, 1, 1, 1)}),
    OnnxCase("p slices the channel axis", ahead("Conv(p, w3)").replace("y =", "p = Slice(h, a, c, d) y ="),
             {"a": np.array([0]), "c": np.array([3]), "d": np.array([1]), "w3": array(2, 3, 1, 1)}),
    OnnxCase("p reverses the channel axis", ahead("Conv(p, w6)").replace("y =", "p = Slice(h, a, c, d, s) y ="),
             W6 | {"a": np.array([-1]), "c": np.array([-9]), "d": np.array([1]), "s": np.array([-1])}),
    OnnxCase("p pads the channel axis", through("Pad(h, q)").replace("n_", "m_"),
             CONV | {"q": np.array([0, 1, 0, 0, 0, 0, 0, 0])}, norm("m", 7)),
    OnnxCase("p pads every channel with the same constant", through("Pad(h, q)"),
             CONV | {"q": np.array([0, 0, 1, 0, 0, 0, 1, 0])}),
    OnnxCase("p pads with 0, which a map with a scale of zero makes another constant",
             ahead("Conv(p, w6)").replace("y =", "p = Pad(h, q) y ="), W6 | {"q": np.array([0, 0, 1, 0, 0, 0, 1, 0])},
             norm("n", 6, gain=np.zeros(6), bias=np.full(6, 2.0), mean=np.zeros(6))),
    OnnxCase("p reshapes (6, 4, 2, 4) to (2, 6, 4, 4), which mixes channels",
             through("Reshape(h, s)").replace("n_", "m_"), CONV | {"s": np.array([6, 4, 2, 4])}, norm("m", 4)),
    OnnxCase("the slope of p varies along other axes than the channels", through("PRelu(h, s)"),
             CONV | {"s": np.abs(array(6, 1, 4)) + 0.1},
             norm("n", 6, gain=np.zeros(6), bias=np.full(6, 2.0), mean=np.zeros(6))),
    OnnxCase("a channel of scale zero is a negative constant behind p, which makes no such value",
             through("Relu(h)"), CONV, norm("n", 6, gain=np.zeros(6), bias=np.full(6, -2.0), mean=np.zeros(6))),
    OnnxCase("the indices of p are used", "(double[2,4,6,6] x) => (double[?,?,?,?] y, int64[?,?,?,?] i)"
             f" {{ h = Conv(x, w, b) p, i = MaxPool<kernel_shape=[2,2]>(h) y = {bn('p')} }}", CONV, POSITIVE),
    # joins
    OnnxCase("a shift cannot pass p (Mul) of two computed tensors",
             f"{PAIR} {{ h = Conv(x, w, b) p = Mul(h, e) y = {bn('p')} }}", CONV),
    OnnxCase("a shift cannot pass p, whose constant factor has zeros", through("Mul(h, z)"), CONV | {"z": np.zeros(1)}),
    OnnxCase("y divides by the value", ahead("Div(k, h)"), {"k": array(1)}),
    OnnxCase("input 0 of p is broadcast along the channels",
             through("Sub(o, k)").replace("p =", "o = ReduceMean<axes=[1]>(h) p ="), CONV | {"k": array(6, 1, 1)}),
    OnnxCase("y (Add) joins the value to a computed one", f"{INTO.replace('x)', 'x, double[2,6,6,6] e)', 1)}"
             f" {{ h = {bn('x')} y = Add(h, e) }}"),
    OnnxCase("the constant of p varies along other axes than the channels", through("Mul(h, k)"),
             CONV | {"k": array(4)}),
    OnnxCase("p joins the value to others along another axis", f"{INTO.replace('x)', 'x, double[2,6,6,6] e)', 1)}"
             f" {{ h = {bn('x')} p = Concat<axis=2>(h, e) y = Conv(p, w6) }}", W6),
    OnnxCase("the map reaches y along two routes",
             ahead("Conv(m, w6)").replace("y =", "a = Neg(h) m = Mul(a, h) y ="), W6, scaling("n", 6)),
    OnnxCase("and one elsewhere", "(double[3,6] x) => (double[3,5] y, double[3,5] z)"
             f" {{ h = {bn('x')} z = MatMul(h, v) y = MatMul(h, v) }}", {"v": array(6, 5)}),
    OnnxCase("input 0 of y is broadcast along the channels", f"{INTO.replace('6', '1', 1)} {{ h = {bn('x')}"
             " y = Add(h, k) }", {"k": array(6, 1, 1)}, norm("n", 1)),
    OnnxCase("p broadcasts as before opset 7 | convert the opset",
             through("Add<broadcast=1, axis=1>(h, k)").replace("Normalization(", "Normalization<is_test=1>("),
             CONV | {"k": array(6)}, opset=6),
    OnnxCase("p is a Pad of an opset before 2", through("Pad<paddings=[0,0,1,0,0,0,1,0]>(h)").replace(
        "Normalization(", "Normalization<is_test=1, consumed_inputs=[0,0,0,1,1]>("), CONV, opset=1),
    # sizes and axes
    OnnxCase("the map is one of 5 channels, h has 6", through("Neg(h)"), CONV, norm("n", 5)),
    OnnxCase("p fills from outside the picture", through(
        'Resize<coordinate_transformation_mode="tf_crop_and_resize", mode="linear">(h, f, , z)'),
        CONV | {"f": np.array([0.0, 0, 0, 0, 1, 1, 1, 1]), "z": np.array([2, 6, 4, 4])}),
    OnnxCase("p resizes the channel axis", through("Resize(h, , f)"),
             CONV | {"f": np.array([1, 2, 1, 1], np.float32)}, norm("n", 12)),
    OnnxCase("p mixes axis 2", f"{IMAGE} {{ h = Conv(x, w8) p = DepthToSpace<blocksize=2>(h)"
             f" t = Transpose<perm=[0,2,1,3]>(p) y = {bn('t')} }}", {"w8": array(8, 4, 3, 3)}, norm("n", 8)),
    OnnxCase("p merges channels of different scale", "(double[2,4,6,6] x) => (double[?,?,?,?] y)"
             f" {{ h = {bn('x')} p = DepthToSpace<blocksize=2>(h) y = Conv(p, w1) }}", {"w1": array(2, 1, 1, 1)},
             norm("n", 4)),
    OnnxCase("p pools over axis 2, where the map is", f"{IMAGE} {{ h = Conv(x, w, b) p = MaxPool<kernel_shape=[1,1]>(h)"
             f" t = Transpose<perm=[0,2,1,3]>(p) y = {bn('t')} }}", CONV, norm("n", 4)),
    # who reads
    OnnxCase("x is an input of the graph", ahead("Sigmoid(h)")),
    OnnxCase("y is an output of the graph", through("Sigmoid(h)"), CONV),
    OnnxCase("h is read by y, z", "(double[2,4,6,6] x) => (double[?,?,?,?] y, double[?,?,?,?] z)"
             f" {{ h = Conv(x, w, b) y = {bn('h')} z = Sigmoid(h) }}", CONV),
    # unknown sizes
    OnnxCase("the size of p along axis 1 is not known | fix the input shapes", "(double[2,4,6,6] x, double[2,C,4,4] e)"
             f" => (double[?,?,?,?] y) {{ h = Conv(x, w3, b3) p = Neg(e) c = Concat<axis=1>(p, h) y = {bn('c')} }}",
             {"w3": array(3, 4, 3, 3), "b3": array(3)}),
]  # fmt: skip


def pad(dtype: ir.DataType | None) -> ir.Node:
    """Return a Pad of an image with one row more, and a constant that is not given."""
    kind = None if dtype is None else ir.TensorType(dtype)
    x = ir.Value(name="x", shape=ir.Shape([2, 2, 4, 4]), type=kind)
    widths = ir.Value(name="q", const_value=ir.tensor(np.array([0, 0, 1, 0, 0, 0, 0, 0])))
    return ir.node("Pad", [x, widths], name="p")


def shift() -> ChannelMap:
    return ChannelMap(np.ones(2), np.ones(2), 1)


def pad_as_constant() -> None:
    branch.pad_forwards(Route(17), pad(ir.DataType.DOUBLE), 2, shift())


def pad_of_unknown_type() -> None:
    branch.pad_backwards(Route(17), pad(None), shift())


ONNX_DIRECT = {
    "p reads the value as its input 2": pad_as_constant,
    "the dtype that p pads is not known": pad_of_unknown_type,
}
"""What no graph that the checker admits leads to."""
