"""ONNX graphs with axes of size 1, reshapes that drop or add some, channels of scale zero, and constants of nodes."""

from __future__ import annotations

import numpy as np
import pytest

from normfuse.base import Reason
from normfuse.lowering.onnx_fold import fold_onnx
from tests.lowering.onnx_models import CONV, IMAGE, array, bn, folds, model, norm, only_refusal, outputs, refusal

RESHAPES: dict[str, tuple[str, list[int], str, bool]] = {
    "drops a batch of one": ("[1,4,3,3]", [4, 3, 3], "Transpose<perm=[1,0,2]>(r)", False),
    "drops everything but the last axes": ("[1,1,3,4]", [3, 4], "Neg(r)", False),
    "to one number": ("[1,1,1,1]", [], "Neg(r)", False),
    "to a vector": ("[1,1,1,5]", [5], "Neg(r)", False),
    "from one channel to many": ("[1,1,4,3]", [1, 4, 3], "Conv(r, v1)", True),
    "keeps the first axes": ("[2,4,3,3]", [2, 4, 9], "Conv(r, v1)", True),
    "splits the channels": ("[2,4,3,3]", [2, 2, 2, 9], "Neg(r)", False),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("case", RESHAPES)
def test_reshape_behind_a_norm(case: str, known: bool):
    """Right or refused, also where sizes are unknown; into a convolution where the channels are its own."""
    shape, target, then, folded = RESHAPES[case]
    channels = int(shape[1:-1].split(",")[1])
    declared = shape if known else "[" + ",".join(f"d{i}" for i in range(shape.count(",") + 1)) + "]"
    rank = len(target)
    out = f"[{','.join('?' * rank)}]" if rank else ""
    text = f"(double{declared} x) => (double{out} y) {{ n = {bn('x')} r = Reshape(n, s) y = {then} }}"
    arrays = {"s": np.array(target, np.int64), **norm("n", channels)}
    if "v1" in then:
        arrays["v1"] = array(5, 4, 1)
    made = model(text, **arrays)
    if not known:
        result = fold_onnx(made)
        assert "cannot be followed" not in str(result.report)
        return
    result = folds(made, left=0 if folded else 1)
    assert "cannot be followed" not in str(result.report)


@pytest.mark.parametrize("target", [[4, 3, 3], [9, 4], [36], [4, 1, 9]])
def test_reshape_before_a_norm_to_a_suffix(target: list[int]):
    channels = target[1] if len(target) > 1 else 1
    if len(target) < 2:
        text = "(double[1,3,5,5] x) => (double[?,?,?] y) { h = Conv(x, w) r = Reshape(h, s) u = Reshape(r, t) y = "
        text, arrays = text + f"{bn('u')} }}", {"t": np.array([1, 36, 1])}
        channels = 36
    else:
        out = ",".join("?" * len(target))
        text = f"(double[1,3,5,5] x) => (double[{out}] y) {{ h = Conv(x, w) r = Reshape(h, s) y = {bn('r')} }}"
        arrays = {}
    made = model(text, w=array(4, 3, 3, 3), s=np.array(target), **arrays, **norm("n", channels))
    result = folds(made, left=int(channels > 1))  # one scale for everything has no axis to lose
    assert "cannot be followed" not in str(result.report)


def written_norm(x: str, axis: int, gain: str = "g", shift: str = "b") -> str:
    return (
        f"m = ReduceMean<axes=[{axis}]>({x}) d = Sub({x}, m) q = Mul(d, d) v = ReduceMean<axes=[{axis}]>(q)"
        f" e = Add(v, eps) s = Sqrt(e) n = Div(d, s) k = Mul(n, {gain}) y = Add(k, {shift})"
    )


@pytest.mark.parametrize("gain", [(1,), (4,), (2, 4, 1, 3), ()])
@pytest.mark.parametrize(("shape", "axis"), [("[2,4,3,1]", 3), ("[2,1,3,4]", 1), ("[1,4,3,3]", 0)])
def test_norm_written_out_over_an_axis_of_size_one(shape: str, axis: int, gain: tuple[int, ...]):
    """A gain that is larger than the axis repeats it: that part is not the norm's."""
    sizes = tuple(map(int, shape[1:-1].split(",")))
    try:
        np.broadcast_shapes(sizes, gain)
    except ValueError:
        gain = (sizes[-1],)
    text = f"(float{shape} x) => (float[?,?,?,?] y) {{ {written_norm('x', axis)} }}"
    arrays = {"g": array(*gain).astype(np.float32), "b": array(*gain).astype(np.float32), "eps": np.float32(1e-3)}
    made = model(text, **{name: np.asarray(value) for name, value in arrays.items()})
    folded = fold_onnx(made)
    (outcome,) = folded.report.norms
    for new, old in zip(outputs(folded.to_proto()), outputs(made), strict=True):
        assert new.shape == old.shape
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)
    assert outcome.status.value == "applied", str(outcome.refusal)


@pytest.mark.parametrize("bias", [1.5, -1.5])
@pytest.mark.parametrize("forwards", [False, True])
@pytest.mark.parametrize("op", ["Relu(h)", "LeakyRelu<alpha=0.3>(h)", "PRelu(h, k)"])
def test_constant_channel_passes_a_rectifier(op: str, forwards: bool, bias: float):
    """As in a torch network: forwards always; backwards where the rectifier returns such a constant."""
    zeros = np.zeros(6)
    gain, shift = np.array([0.0, 1, 2, 3, 4, 5]), np.array([bias, 0, 0, 0, 0, 0])
    if forwards:
        text = f"(double[2,6,6,6] x) => (double[?,?,?,?] y) {{ h = {bn('x')} r = {op} y = Conv(r, w6) }}"
        arrays = {"w6": array(3, 6, 3, 3)}
    else:
        text, arrays = f"{IMAGE} {{ h = Conv(x, w, b) r = {op} y = {bn('r')} }}", dict(CONV)
    if "k" in op.split("(")[1]:
        arrays["k"] = np.full((6, 1, 1), 0.25)
    made = model(text, **arrays, **norm("n", 6, gain=gain, bias=shift, mean=zeros))
    if forwards or bias > 0 or op != "Relu(h)":
        folds(made)
    else:
        found = refusal(made)
        assert found.reason is Reason.OPAQUE_OPERATION
        assert "makes no such value" in found.detail


@pytest.mark.parametrize(("value", "left"), [(0.0, 0), (1.5, 1)])
def test_channel_of_zeros_meets_a_pad(value: float, left: int):
    """A channel that is zero whatever comes in cannot make the constant of a pad behind it."""
    text = f"(double[2,4,6,6] x) => (double[?,?,?,?] y) {{ h = {bn('x')} p = Pad(h, q, c) y = Conv(p, w) }}"
    zeros = np.zeros(4)
    arrays = norm("n", 4, gain=np.array([1.0, 0.0, 2.0, 3.0]), bias=zeros, mean=zeros)
    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    result = folds(model(text, w=array(3, 4, 3, 3), q=pads, c=np.array(value), **arrays), left=left)
    if left:
        assert only_refusal(result).reason is Reason.NONZERO_PADDING


def test_constants_of_nodes_are_not_renamed_in_the_source():
    text = f"{IMAGE} {{ k = Constant<value = double[1] {{2.0}}>() h = Conv(x, w, b) m = Mul(h, k) y = {bn('m')} }}"
    folds(model(text, **CONV, **norm("n", 6)))
