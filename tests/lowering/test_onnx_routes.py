"""Where a norm can go in an ONNX graph: backwards, forwards, through what, and where it must stay; in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normfuse.base import Reason
from normfuse.lowering.onnx_fold import count_ops
from tests.lowering.onnx_models import (
    CONV,
    IMAGE,
    array,
    bn,
    folds,
    model,
    norm,
    only_refusal,
    refusal,
    scaling,
)

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
    "bias of computed zeros": (
        f"{IMAGE} {{ s = Shape<start=0, end=1>(w) z = CastLike(zero, x) v = Expand(z, s)"
        f" h = Conv(x, w, v) y = {bn('h')} }}",
        {"w": CONV["w"], "zero": np.float32(0).reshape(())},
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


REFUSED = {
    "extra reader": (Reason.EXTRA_CONSUMER, f"{IMAGE} {{ h = Conv(x, w, b) n = {bn('h')} y = Add(n, h) }}"),
    "read by the outputs": (
        Reason.EXTRA_CONSUMER,
        f"(double[2,4,6,6] x) => (double[?,?,?,?] y, double[?,?,?,?] h) {{ h = Conv(x, w, b) y = {bn('h')} }}",
    ),
    "opaque": (Reason.OPAQUE_OPERATION, f"{IMAGE} {{ h = Conv(x, w, b) r = Sigmoid(h) y = {bn('r')} }}"),
    "shift through relu": (Reason.OPAQUE_OPERATION, f"{IMAGE} {{ h = Conv(x, w, b) r = Relu(h) y = {bn('r')} }}"),
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
    assert found.reason is Reason.OPAQUE_OPERATION
    assert "Sigmoid" in found.detail


def test_refused_when_two_routes_meet() -> None:
    text = f"{IMAGE} {{ h = {bn('x')} a = Relu(h) m = Mul(a, h) y = Conv(m, w) }}"
    assert "two routes" in refusal(model(text, w=array(4, 4, 3, 3), **scaling("n", 4))).detail


def test_refused_when_it_would_take_two_additions() -> None:
    text = f"(double[3,4] x) => (double[3,6] y, double[3,5] z) {{ h = {bn('x')} y = MatMul(h, w) z = MatMul(h, v) }}"
    made = model(text, w=array(4, 6), v=array(4, 5), **norm("n", 4))
    result = folds(made, left=1)
    assert "one elsewhere" in only_refusal(result).detail


PASSES = {  # keep (n, 6, h, w); every one lets any map through, in both directions
    "Identity({v})": {},
    "Dropout({v})": {},
    "Neg({v})": {},
    "Mul({v}, factor)": {"factor": array(6, 1, 1)},
    "Div({v}, number)": {"number": array()},
    "Add(term, {v})": {"term": array(1, 6, 1, 1)},
    "Sub(number, {v})": {"number": array()},
    "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>({v})": {},
    "ReduceMean<axes=[-1]>({v})": {},
    'Pad<mode="edge">({v}, edges)': {"edges": np.array([0, 0, 1, 0, 0, 0, 2, 1])},
    'Resize<mode="nearest">({v}, , twice)': {"twice": np.array([1, 1, 2, 1], np.float32)},
}


@given(st.lists(st.sampled_from(sorted(PASSES)), max_size=5), st.booleans())
@settings(max_examples=40)
def test_any_chain_of_what_passes_folds(chain: list[str], forwards: bool) -> None:
    ops = [
        *([bn("{v}")] if forwards else ["Conv({v}, w, b)"]),
        *chain,
        *(["Conv({v}, w, b)"] if forwards else [bn("{v}")]),
    ]
    names = ["x", *(f"v{i}" for i in range(len(ops) - 1)), "y"]
    body = " ".join(f"{names[i + 1]} = {op.format(v=names[i])}" for i, op in enumerate(ops))
    arrays = {name: value for op in chain for name, value in PASSES[op].items()}
    text = f"(double[2,6,5,5] x) => (double[?,?,?,?] y) {{ {body} }}"
    folds(model(text, w=array(6, 6, 1, 1), b=array(6), **arrays, **norm("n", 6)))
