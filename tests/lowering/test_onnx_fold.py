"""Folding inside an ONNX graph: the same function in float64, every norm reported once, nothing else touched."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from normfuse import base
from normfuse.base import Reason
from normfuse.errors import LoadError
from normfuse.lowering.onnx_fold import OnnxFoldResult, count_ops, fold_onnx, write
from normfuse.report import Status

RANDOM = np.random.default_rng(7)


def array(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape)


def norm(name: str, channels: int, **fixed: np.ndarray) -> dict[str, np.ndarray]:
    """Random parameters of a norm; with three channels or more, one gain is negative and one is zero."""
    gain = RANDOM.uniform(0.5, 2, channels)
    gain[:2] = (-1.3, 0.0) if channels > 2 else gain[:2]
    parts = {"gain": gain, "bias": array(channels), "mean": array(channels), "var": RANDOM.uniform(0.1, 3, channels)}
    return {f"{name}_{key}": value for key, value in (parts | fixed).items()}


def scaling(name: str, channels: int, *, positive: bool = True) -> dict[str, np.ndarray]:
    """A norm without shift."""
    gain = RANDOM.uniform(0.5, 2, channels) * (1 if positive else -1)
    return norm(name, channels, gain=gain, bias=np.zeros(channels), mean=np.zeros(channels))


def bn(value: str, name: str = "n") -> str:
    return f"BatchNormalization({value}, {name}_gain, {name}_bias, {name}_mean, {name}_var)"


def model(text: str, opset: int = 17, **arrays: np.ndarray) -> onnx.ModelProto:
    graph = onnx.parser.parse_graph(f"g {text}")
    graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    opsets = [onnx.helper.make_opsetid("", opset)]
    made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(made)
    return made


def outputs(made: onnx.ModelProto, seed: int = 3) -> list[np.ndarray]:
    random, feeds = np.random.default_rng(seed), {}
    for value in made.graph.input:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [dim.dim_value or 2 for dim in tensor.shape.dim]
        feeds[value.name] = np.asarray(
            random.standard_normal(shape) > 0 if dtype == bool else random.standard_normal(shape), dtype
        )
    return ReferenceEvaluator(made).run(None, feeds)


def folds(made: onnx.ModelProto, left: int = 0) -> OnnxFoldResult:
    """Fold, and assert that the function, the interface and the source stay, and how many norms are left."""
    before, norms = made.SerializeToString(), count_ops(made)["BatchNormalization"]
    result = fold_onnx(made)
    folded = result.to_proto()
    onnx.checker.check_model(folded, full_check=True)
    assert made.SerializeToString() == before
    assert folded.graph.input == made.graph.input
    assert folded.graph.output == made.graph.output
    assert len(result.report.norms) == norms == len({o.subject for o in result.report.norms})
    assert count_ops(folded)["BatchNormalization"] == left == norms - len(result.report.applied)
    for new, old in zip(outputs(folded), outputs(made), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-10, atol=1e-10)
    return result


def refusal(made: onnx.ModelProto) -> base.Refusal:
    """Assert that the only norm is refused and the model is as it was, and return why."""
    result = folds(made, left=1)
    assert count_ops(result.model) == count_ops(made)
    (outcome,) = result.report.outcomes
    assert outcome.status is Status.REFUSED
    assert outcome.refusal is not None
    assert outcome.refusal.detail
    return outcome.refusal


IMAGE = "(double[2,4,6,6] x) => (double[?,?,?,?] y)"
CONV = {"w": array(6, 4, 3, 3), "b": array(6)}

BACKWARDS = {
    "conv": (f"{IMAGE} {{ h = Conv<pads=[1,1,1,1]>(x, w, b) y = {bn('h')} }}", CONV),
    "conv without bias": (f"{IMAGE} {{ h = Conv(x, w) y = {bn('h')} }}", {"w": CONV["w"]}),
    "grouped conv": (
        f"{IMAGE} {{ h = Conv<group=2>(x, w, b) y = {bn('h')} }}",
        {"w": array(6, 2, 3, 3), "b": array(6)},
    ),
    "grouped transposed": (
        f"{IMAGE} {{ h = ConvTranspose<group=2, strides=[2,2]>(x, w, b) y = {bn('h')} }}",
        {"w": array(4, 3, 3, 3), "b": array(6)},
    ),
    "gemm with beta": (
        f"(double[3,4] x) => (double[3,6] y) {{ h = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b) y = {bn('h')} }}",
        {"w": array(6, 4), "b": array(3, 1)},
    ),
    "gemm without bias": (
        f"(double[4,3] x) => (double[3,6] y) {{ h = Gemm<transA=1>(x, w) y = {bn('h')} }}",
        {"w": array(4, 6)},
    ),
    "matmul, add": (
        f"(double[3,4] x) => (double[3,6] y) {{ h = MatMul(x, w) s = Add(b, h) y = {bn('s')} }}",
        {"w": array(4, 6), "b": array(6)},
    ),
    "matmul, transposed": (
        f"(double[2,5,4] x) => (double[2,6,5] y) {{ h = MatMul(x, w) t = Transpose<perm=[0,2,1]>(h) y = {bn('t')} }}",
        {"w": array(4, 6)},
    ),
    "matmul from the left": (
        f"(double[2,4,5] x) => (double[2,6,5] y) {{ h = MatMul(w, x) y = {bn('h')} }}",
        {"w": array(6, 4)},
    ),
    "weight behind identity": (
        f"{IMAGE} {{ v = Identity(w) u = Transpose<perm=[1,0,2,3]>(v) h = Conv(x, u) y = {bn('h')} }}",
        {"w": array(4, 6, 3, 3)},
    ),
    "average pools": (
        f"{IMAGE} {{ h = Conv(x, w, b) p = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0]>(h)"
        f" q = ReduceMean<axes=[-1]>(p) d = Dropout(q) y = {bn('d')} }}",
        CONV,
    ),
    "global pool, flatten": (
        f"(double[2,4,6,6] x) => (double[?,?] y)"
        f" {{ h = Conv(x, w, b) p = GlobalAveragePool(h) f = Flatten(p) y = {bn('f')} }}",
        CONV,
    ),
    "squeeze, unsqueeze": (
        f"(double[N,4,6,6] x) => (double[?,?,?] y) {{ h = Conv(x, w, b) p = GlobalAveragePool(h)"
        f" s = Squeeze(p, last) u = Unsqueeze(s, two) y = {bn('u')} }}",
        {**CONV, "last": np.array([2, 3]), "two": np.array([2])},
    ),
    "concat": (
        f"{IMAGE} {{ g = Conv(x, w) h = Conv(x, v) c = Concat<axis=1>(g, h) y = {bn('c')} }}",
        {"w": array(2, 4, 3, 3), "v": array(4, 4, 3, 3)},
    ),
    "sum": (
        f"{IMAGE} {{ g = Conv(x, w) h = Conv(x, v) c = Sub(g, h) y = {bn('c')} }}",
        {"w": array(6, 4, 3, 3), "v": array(6, 4, 3, 3)},
    ),
    "constant minus": (
        f"{IMAGE} {{ h = Conv(x, w, b) c = Sub(k, h) n = Neg(c) y = {bn('n')} }}",
        {**CONV, "k": array(1)},
    ),
    "product": (
        f"{IMAGE} {{ h = Conv(x, w, b) c = Mul(h, k) d = Div(c, l) y = {bn('d')} }}",
        {**CONV, "k": array(6, 1, 1), "l": array(1)},
    ),
    "pad by reflection": (
        f'{IMAGE} {{ h = Conv(x, w, b) p = Pad<mode="reflect">(h, q) y = {bn("p")} }}',
        {**CONV, "q": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    ),
    "resize, slice": (
        f'{IMAGE} {{ h = Conv(x, w, b) r = Resize<mode="linear">(h, , z) s = Slice(r, l, t, a) y = {bn("s")} }}',
        {**CONV, "z": np.array([1, 1, 2, 2], np.float32), "l": np.array([1]), "t": np.array([5]), "a": np.array([-1])},
    ),
    "depth to space": (
        f'{IMAGE} {{ h = Conv(x, w) r = DepthToSpace<blocksize=2, mode="CRD">(h) y = {bn("r")} }}',
        {"w": array(24, 4, 3, 3)},
    ),
    "layer norm": (
        f"(double[2,5,6] x) => (double[2,6,5] y)"
        f" {{ h = LayerNormalization(x, w) t = Transpose<perm=[0,2,1]>(h) y = {bn('t')} }}",
        {"w": array(6)},
    ),
    "instance norm": (
        f"(double[2,6,5] x) => (double[2,6,5] y) {{ h = InstanceNormalization(x, w, b) y = {bn('h')} }}",
        {"w": array(6), "b": array(6)},
    ),
}


@pytest.mark.parametrize("case", BACKWARDS)
def test_norm_moves_backwards(case: str) -> None:
    text, arrays = BACKWARDS[case]
    result = folds(model(text, **arrays, **norm("n", 6)))
    assert result.report.applied[0].partners


FORWARDS = {
    "conv": (
        "(double[2,4,6,6] x) => (double[?,?,?,?] y)",
        "y = Conv(h, w, b)",
        {"w": array(6, 4, 3, 3), "b": array(6)},
    ),
    "grouped conv": ("(double[2,4,6,6] x) => (double[?,?,?,?] y)", "y = Conv<group=2>(h, w)", {"w": array(6, 2, 3, 3)}),
    "same padding of 1x1": (
        "(double[2,4,6,6] x) => (double[?,?,?,?] y)",
        'y = Conv<auto_pad="SAME_UPPER">(h, w)',
        {"w": array(6, 4, 1, 1)},
    ),
    "pointwise transposed": (
        "(double[2,4,6,6] x) => (double[?,?,?,?] y)",
        "y = ConvTranspose<group=2>(h, w, b)",
        {"w": array(4, 3, 1, 1), "b": array(6)},
    ),
    "gemm": (
        "(double[3,4] x) => (double[3,6] y)",
        "y = Gemm<alpha=0.5, beta=2.0, transB=1>(h, w, b)",
        {"w": array(6, 4), "b": array(1)},
    ),
    "matmul, add": (
        "(double[3,4] x) => (double[3,6] y)",
        "m = MatMul(h, w) y = Add(m, b)",
        {"w": array(4, 6), "b": array(6)},
    ),
    "matmul from the left": ("(double[2,4,5] x) => (double[2,6,5] y)", "y = MatMul(w, h)", {"w": array(6, 4)}),
    "flatten, gemm": (
        "(double[2,4,3,3] x) => (double[2,6] y)",
        "f = Flatten(h) y = Gemm(f, w)",
        {"w": array(36, 6)},
    ),
    "concat, two readers": (
        "(double[2,4,6,6] x, double[2,1,6,6] e) => (double[?,?,?,?] y, double[?,?,?,?] z)",
        "c = Concat<axis=1>(e, h) y = Conv(c, w) z = Conv(c, v)",
        {"w": array(6, 5, 3, 3), "v": array(2, 5, 1, 1)},
    ),
    "split": (
        "(double[2,4,6,6] x) => (double[?,?,?,?] y, double[?,?,?,?] z)",
        "a, c = Split<axis=1>(h, s) y = Conv(a, w) z = Conv(c, v)",
        {"w": array(6, 3, 3, 3), "v": array(2, 1, 1, 1), "s": np.array([3, 1])},
    ),
    "constants": (
        "(double[2,4,6,6] x) => (double[?,?,?,?] y)",
        "a = Mul(k, h) c = Add(a, l) d = Sub(one, c) n = Neg(d) y = Conv(n, w)",
        {"w": array(6, 4, 3, 3), "k": array(4, 1, 1), "l": array(1, 4, 1, 1), "one": array()},
    ),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_norm_moves_forwards(case: str) -> None:
    signature, body, arrays = FORWARDS[case]
    folds(model(f"{signature} {{ h = {bn('x')} {body} }}", **arrays, **norm("n", 4)))


@pytest.mark.parametrize(
    "op", ["Relu(h)", "LeakyRelu(h)", "PRelu(h, k)", "MaxPool<kernel_shape=[2,2]>(h)", "Mul(h, e)"]
)
@pytest.mark.parametrize("forwards", [False, True])
def test_positive_scale_passes_what_keeps_order(op: str, forwards: bool) -> None:
    inside = (
        f"h = {bn('x')} r = {op} y = Conv<pads=[1,1,1,1]>(r, w)"
        if forwards
        else f"h = Conv(x, w) r = {op} y = {bn('r')}"
    )
    text = f"(double[2,4,6,6] x, double[2,1,1,1] e) => (double[?,?,?,?] y) {{ {inside} }}"
    arrays = {"w": array(4, 4, 3, 3), "k": array(4, 1, 1)}
    folds(model(text, **arrays, **scaling("n", 4)))
    if not op.startswith("Mul"):
        assert refusal(model(text, **arrays, **scaling("n", 4, positive=False))).reason is Reason.SIGN


def test_max_pool_passes_a_shift() -> None:
    arrays = norm("n", 6, gain=np.array([0.0, 1, 2, 3, 4, 5]))
    folds(model(f"{IMAGE} {{ h = Conv(x, w, b) p = GlobalMaxPool(h) y = {bn('p')} }}", **CONV, **arrays))


@pytest.mark.parametrize(("bias", "reason"), [(0.7, None), (None, Reason.NONZERO_PADDING)])
def test_pad_value_becomes_another_constant(bias: float | None, reason: Reason | None) -> None:
    arrays = norm("n", 6, mean=np.zeros(6)) if bias is None else norm("n", 6, mean=np.zeros(6), bias=np.full(6, bias))
    made = model(
        f"{IMAGE} {{ h = Conv(x, w, b) p = Pad(h, q) y = {bn('p')} }}",
        **CONV, **arrays, q=np.array([0, 0, 1, 0, 0, 0, 1, 0]),
    )  # fmt: skip
    if reason is None:
        folds(made)
    else:
        assert refusal(made).reason is reason


def test_norms_in_a_row_and_around_a_block_all_fold() -> None:
    made = model(
        f"{IMAGE} {{ a = {bn('x', 'i')} h = Conv(a, w, b) c = {bn('h')} d = {bn('c', 'm')}"
        f" r = Relu(d) g = Conv<pads=[1,1,1,1]>(r, v) s = {bn('g', 'k')} y = Add(s, r) }}",
        **CONV, **norm("i", 4), **norm("n", 6), **norm("m", 6), v=array(6, 6, 3, 3), **norm("k", 6),
    )  # fmt: skip
    result = folds(made)
    assert count_ops(result.model) == {"Conv": 2, "Relu": 1, "Add": 1}


TO_CONV = f"{IMAGE} {{ h = Conv(x, w, b) y = {bn('h')} }}"
REFUSED = {
    "extra reader": (Reason.EXTRA_CONSUMER, f"{IMAGE} {{ h = Conv(x, w, b) n = {bn('h')} y = Add(n, h) }}"),
    "read by the outputs": (
        Reason.EXTRA_CONSUMER,
        f"(double[2,4,6,6] x) => (double[?,?,?,?] y, double[?,?,?,?] h) {{ h = Conv(x, w, b) y = {bn('h')} }}",
    ),
    "opaque": (Reason.OPAQUE_OPERATION, f"{IMAGE} {{ h = Conv(x, w, b) r = Sigmoid(h) y = {bn('r')} }}"),
    "shift through relu": (Reason.SIGN, f"{IMAGE} {{ h = Conv(x, w, b) r = Relu(h) y = {bn('r')} }}"),
    "zeros that are averaged": (
        Reason.NONZERO_PADDING,
        f"{IMAGE} {{ h = Conv(x, w, b) r = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1>(h)"
        f" y = {bn('r')} }}",
    ),
    "other axis": (
        Reason.AXIS,
        f"(double[2,6,5] x) => (double[2,6,4] y) {{ h = MatMul(x, v) y = {bn('h')} }}",
    ),
    "flattened positions": (
        Reason.AXIS,
        f"(double[6,4,3,3] x) => (double[1,6] y) {{ h = Conv(x, w, b) r = Reshape(h, s) y = {bn('r')} }}",
    ),
    "product of two": (
        Reason.NO_BIAS,
        f"{IMAGE} {{ h = Conv(x, w, b) g = Sigmoid(h) m = Mul(x6, g) y = {bn('m')} }}".replace(
            "x)", "x, double[2,6,4,4] x6)", 1
        ),
    ),
    "computed weight": (
        Reason.PARAMETRIZED,
        f"(double[2,4,6,6] x, double[6,4,3,3] w) => (double[?,?,?,?] y) {{ h = Conv(x, w, b) y = {bn('h')} }}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_backwards(case: str) -> None:
    reason, text = REFUSED[case]
    arrays = {**CONV, "v": array(5, 4), "s": np.array([1, 6]), **norm("n", 6)}
    arrays = {name: value for name, value in arrays.items() if name in text and f"] {name})" not in text.split("=>")[0]}
    if "flattened" in case:
        text, arrays["w"], arrays["b"] = text.replace("[6,4,3,3]", "[1,4,5,4]"), array(1, 4, 3, 3), array(1)
    assert refusal(model(text, **arrays)).reason is reason


def test_refused_forwards_by_zero_padding() -> None:
    text = f"{IMAGE} {{ h = {bn('x')} y = Conv<pads=[1,1,1,1]>(h, w) }}"
    arrays = {"w": array(6, 4, 3, 3)}
    found = refusal(model(text, **arrays, **norm("n", 4)))
    assert found.reason is Reason.NONZERO_PADDING
    assert "is an input of the graph" in found.detail
    folds(model(text, **arrays, **scaling("n", 4, positive=False)))


def test_refused_forwards_when_one_reader_cannot() -> None:
    text = f"{IMAGE} {{ h = {bn('x')} g = Conv(h, w) s = Sigmoid(h) p = GlobalAveragePool(s) y = Mul(g, p) }}"
    found = refusal(model(text, w=array(4, 4, 3, 3), **norm("n", 4)))
    assert found.reason is Reason.NO_PRODUCER
    assert "Sigmoid" in found.detail


def test_refused_when_two_routes_meet() -> None:
    text = f"{IMAGE} {{ h = {bn('x')} a = Relu(h) m = Mul(a, h) y = Conv(m, w) }}"
    assert "two routes" in refusal(model(text, w=array(4, 4, 3, 3), **scaling("n", 4))).detail


def test_refused_when_it_would_take_two_additions() -> None:
    text = f"(double[3,4] x) => (double[3,6] y, double[3,5] z) {{ h = {bn('x')} y = MatMul(h, w) z = MatMul(h, v) }}"
    made = model(text, w=array(4, 6), v=array(4, 5), **norm("n", 4))
    result = folds(made, left=1)
    assert "one elsewhere" in result.report.refused[0].refusal.detail


def test_unknown_rank_is_refused() -> None:
    made = model(TO_CONV, **CONV, **norm("n", 6))
    made = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (double x) => (double y) {{ h = MatMul(x, w) y = {bn("h")} }}'
    )
    made.graph.input[0].type.tensor_type.ClearField("shape")
    made.graph.output[0].type.tensor_type.ClearField("shape")
    arrays = {"w": array(4, 6), **norm("n", 6)}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    (outcome,) = fold_onnx(made).report.outcomes
    assert outcome.refusal.reason is Reason.RANK_UNKNOWN
    assert outcome.refusal.hint


@pytest.mark.parametrize(("opset", "attribute"), [(17, "training_mode"), (13, None), (6, None)])
def test_training_mode_is_refused_and_kept(opset: int, attribute: str | None) -> None:
    made = model(TO_CONV, **CONV, **norm("n", 6))
    made.opset_import[0].version = opset
    node = made.graph.node[1]
    if attribute:
        node.attribute.append(onnx.helper.make_attribute(attribute, 1))
    if opset > 6:
        node.output.extend(["mean_out", "var_out"])
    result = fold_onnx(made)
    (outcome,) = result.report.outcomes
    assert outcome.refusal.reason is Reason.BATCH_STATISTICS
    assert result.to_proto().graph.node[1] == node


def test_statistics_of_the_batch_are_refused() -> None:
    text = (
        "(double[2,6,4,4] x) => (double[2,6,4,4] y) { m = ReduceMean<axes=[0,2,3], keepdims=0>(x)"
        " y = BatchNormalization(x, n_gain, n_bias, m, n_var) }"
    )
    arrays = norm("n", 6)
    del arrays["n_mean"]
    assert refusal(model(text, **arrays)).reason is Reason.BATCH_STATISTICS


def test_half_precision_overflow_is_refused() -> None:
    made = model(TO_CONV, **CONV, **norm("n", 6))
    half = model(TO_CONV.replace("double", "float16"), **{
        name: value.astype(np.float16) for name, value in
        {**CONV, **norm("n", 6, gain=np.full(6, 6e4), var=np.full(6, 1e-3))}.items()
    })  # fmt: skip
    assert fold_onnx(made).report
    (outcome,) = fold_onnx(half).report.outcomes
    assert outcome.refusal.reason is Reason.RANGE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float"])
def test_dtype_of_the_weights_is_kept(dtype: str) -> None:
    kind = ir.DataType[{"float": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[dtype]]
    text = TO_CONV.replace("double", dtype)
    arrays = {name: value.astype(kind.numpy()) for name, value in {"w": CONV["w"], **norm("n", 6)}.items()}
    graph = onnx.parser.parse_graph(f"g {text.replace(', b)', ')')}")
    graph.initializer.extend(ir.to_proto(ir.tensor(a, name=name)) for name, a in arrays.items())
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    result = fold_onnx(made)
    assert result.report
    assert {v.dtype for v in result.model.graph.initializers.values()} == {kind}


def test_overridable_initializer_is_refused() -> None:
    made = model(TO_CONV, **CONV, **norm("n", 6))
    made.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.DOUBLE, CONV["w"].shape))
    result = fold_onnx(made)
    (outcome,) = result.report.outcomes
    assert outcome.refusal.reason is Reason.PARAMETRIZED
    assert "remove it from the graph inputs" in outcome.refusal.hint


def test_shared_initializer_is_copied_for_each_node() -> None:
    text = f"{IMAGE} {{ g = Conv(x, w, b) h = Conv(x, w, b) i = {bn('g')} j = {bn('h', 'm')} k = Conv(x, w, b)"
    made = model(f"{text} s = Add(i, j) y = Add(s, k) }}", **CONV, **norm("n", 6), **norm("m", 6), w_folded=array(1))
    made.graph.node.append(onnx.helper.make_node("Identity", ["w_folded"], ["z"]))
    made.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.DOUBLE, [1]))
    folded = folds(made).to_proto()
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in folded.graph.initializer}
    np.testing.assert_array_equal(kept["w"], CONV["w"])
    assert sum(name.startswith("w") for name in kept) == 4


def test_unused_initializers_go_and_the_rest_stays() -> None:
    made = model(TO_CONV, **CONV, **norm("n", 6), unused=array(3))
    made.metadata_props.add(key="author", value="someone")
    made.graph.node[0].doc_string = "the first"
    folded = folds(made).to_proto()
    assert {t.name for t in folded.graph.initializer} == {"w", "b"}
    assert folded.metadata_props == made.metadata_props
    assert folded.graph.node[0].doc_string == "the first"
    assert len(folded.graph.value_info) == 0


def test_constants_as_nodes_fold() -> None:
    made = model(TO_CONV, **CONV, **norm("n", 6))
    nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in made.graph.initializer]
    nodes += made.graph.node
    del made.graph.initializer[:], made.graph.node[:]
    made.graph.node.extend(nodes)
    assert count_ops(folds(made).model) == {"Conv": 1}


def test_identity_norm_between_input_and_output_keeps_both_names() -> None:
    ones, zeros = np.ones(4), np.zeros(4)
    exact = norm("n", 4, gain=ones, bias=zeros, mean=zeros, var=ones - np.float64(np.float32(1e-5)))
    made = model(f"(double[2,4] x) => (double[2,4] y) {{ y = {bn('x')} }}", **exact)
    assert count_ops(folds(made).model) == {"Identity": 1}


def test_norms_inside_branches_fold_there() -> None:
    inner = "<pads=[1,1,1,1]>(x, w, b)"
    text = (
        f"(double[2,4,6,6] x, bool c) => (double[2,6,6,6] y) {{ o = Conv{inner} q = If(c) <then_branch = t () =>"
        f" (double[2,6,6,6] p) {{ h = Conv{inner} p = {bn('h')} }}, else_branch = e () => (double[2,6,6,6] p2)"
        f" {{ p2 = {bn('o', 'm')} }}> y = Relu(q) }}"
    )
    result = folds(model(text, **CONV, **norm("n", 6), **norm("m", 6)), left=1)
    assert result.report.refused[0].refusal.reason is Reason.OPAQUE_OPERATION
    assert "outside the subgraph" in result.report.refused[0].refusal.detail


def test_norms_inside_functions_are_refused() -> None:
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "own": 1]> g (double[2,3] x) => (double[2,3] y) { y = own.f(x, n, n) }'
        '<domain: "own", opset_import: ["": 17]> f (x, g, b) => (y) { y = BatchNormalization(x, g, b, b, g) }'
    )
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3), "n"))
    (outcome,) = fold_onnx(made).report.outcomes
    assert outcome.refusal.reason is Reason.SHARED_MODULE
    assert count_ops(made) == {"own::f": 1, "BatchNormalization": 1}


def test_include_and_exclude_by_name() -> None:
    made = model(
        f"{IMAGE} {{ h = Conv(x, w, b) a = {bn('h')} r = Relu(a) g = Conv(r, v) y = {bn('g', 'm')} }}",
        **CONV, **norm("n", 6), v=array(3, 6, 1, 1), **norm("m", 3),
    )  # fmt: skip
    for keywords in ({"include": ["y*"]}, {"exclude": ["a"]}):
        first, second = fold_onnx(made, **keywords).report.outcomes
        assert (first.subject, first.refusal.reason) == ("a", Reason.EXCLUDED)
        assert (second.subject, second.status) == ("y", Status.APPLIED)


def test_files_with_external_data(tmp_path: Path) -> None:
    made, path = model(TO_CONV, **CONV, **norm("n", 6)), tmp_path / "source" / "m.onnx"
    path.parent.mkdir()
    expected = outputs(made)[0]
    onnx.save_model(made, path, save_as_external_data=True, location="m.onnx.data", size_threshold=100)
    result = fold_onnx(path)
    for target in (tmp_path / "folded.onnx", path):
        assert write(result.model, target) == target
        assert (target.parent / f"{target.name}.data").exists()
        onnx.checker.check_model(str(target))
        np.testing.assert_allclose(outputs(onnx.load(target))[0], expected, rtol=1e-10, atol=1e-10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folded.onnx", "folded.onnx.data", "source"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def fail(model: ir.Model, target: Path, **keywords: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(ir, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write(model(TO_CONV, **CONV, **norm("n", 6)), path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.onnx", b"old")]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file"):
        fold_onnx(tmp_path / "missing.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a protobuf")
    with pytest.raises(LoadError, match="not a readable ONNX model"):
        fold_onnx(tmp_path / "bad.onnx")


@pytest.mark.models
def test_paddle_classifier_folds_completely(tmp_path: Path) -> None:
    """A trained text-direction classifier whose weights are Constant nodes, on a scanned page."""
    found = importlib.util.find_spec("rapidocr")
    if found is None or not found.submodule_search_locations:
        pytest.skip("rapidocr is not installed")
    ort, data = pytest.importorskip("onnxruntime"), pytest.importorskip("skimage.data")
    source = Path(next(iter(found.submodule_search_locations))) / "models" / "ch_ppocr_mobile_v2.0_cls_mobile.onnx"
    result = fold_onnx(source)
    assert (len(result.report.applied), len(result.report.norms)) == (35, 35)
    lost = count_ops(source) - count_ops(result.model)
    assert set(lost) == {"BatchNormalization", "Constant"}
    assert lost["BatchNormalization"] == 35

    picture = np.repeat((data.page()[:48, :192].astype(np.float32) / 127.5 - 1)[None, None], 3, axis=1)
    path = write(result.model, tmp_path / "folded.onnx")
    sessions = [ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for p in (source, path)]
    for turned, label, score in ((picture, 0, 0.999), (np.ascontiguousarray(picture[:, :, ::-1, ::-1]), 1, 0.997)):
        before, after = (s.run(None, {s.get_inputs()[0].name: turned})[0][0] for s in sessions)
        assert after.argmax() == before.argmax() == label
        assert after[label] == pytest.approx(score, abs=1e-3)
        np.testing.assert_allclose(after, before, atol=1e-5)
