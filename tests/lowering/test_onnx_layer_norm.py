"""A LayerNorm that is written out in ONNX nodes becomes one LayerNormalization of the same value, or stays."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest

from normfuse.base import Reason
from normfuse.lowering.onnx_fold import OnnxFoldResult, count_ops, fold_onnx, write
from normfuse.report import Status
from tests.lowering.onnx_models import array, model, outputs

LAST = "(float[3,4,8] x) => (float[?,?,?] y)"
GAIN = {"g": array(8).astype(np.float32), "b": array(8).astype(np.float32), "eps": np.float32(1e-5)}
TWO = np.float32(2)
CENTRED = "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m)"
DEVIATION = f"{CENTRED} q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) e = Add(v, eps) s = Sqrt(e)"
AXIS = np.array([2], np.int64)
SUMS = "t = ReduceSum<keepdims=1>(x, axis) m = Mul(t, inv) xx = Mul(x, x) u = ReduceSum<keepdims=1>(xx, axis)"
MOMENTS = f"{SUMS} w = Mul(u, inv) mm = Mul(m, m) c = Sub(w, mm) v = Max(c, zero) e = Add(eps, v) s = Sqrt(e)"
NUMBERS = {"axis": AXIS, "inv": np.float32(1 / 8), "zero": np.float32(0)}


def fused(made: onnx.ModelProto, norms: int = 1) -> OnnxFoldResult:
    """Fold, and assert that so many norms became one node each and nothing that was of them is left."""
    before = made.SerializeToString()
    result = fold_onnx(made)
    folded = result.to_proto()
    onnx.checker.check_model(folded, full_check=True)
    assert made.SerializeToString() == before
    assert [o.name for o in folded.graph.output] == [o.name for o in made.graph.output]
    assert folded.graph.input == made.graph.input
    assert count_ops(folded)["LayerNormalization"] == norms == len(result.report.applied)
    assert not {"ReduceMean", "ReduceSum", "Sqrt", "Max"} & set(count_ops(folded))
    for new, old in zip(outputs(folded), outputs(made), strict=True):
        np.testing.assert_allclose(new, old, rtol=2e-5, atol=2e-5)
    return result


def left(made: onnx.ModelProto) -> OnnxFoldResult:
    """Fold, and assert that the model is as it was."""
    result = fold_onnx(made)
    assert count_ops(result.model) == count_ops(made)
    return result


SPELLINGS = {
    "quotient": f"{DEVIATION} n = Div(d, s) p = Mul(n, g) y = Add(p, b)",
    "gain first": f"{DEVIATION} n = Div(d, s) p = Mul(g, n) y = Add(b, p)",
    "power": f"{CENTRED} q = Pow(d, two) v = ReduceMean<axes=[2]>(q) e = Add(eps, v) s = Pow(e, half) n = Div(d, s) "
    "p = Mul(n, g) y = Add(p, b)",
    "reciprocal": f"{DEVIATION} r = Reciprocal(s) n = Mul(d, r) p = Mul(n, g) y = Add(p, b)",
    "one over": f"{DEVIATION} r = Div(one, s) n = Mul(r, d) p = Mul(n, g) y = Add(p, b)",
    "inverse power": f"{CENTRED} q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) e = Add(v, eps) r = Pow(e, minus) "
    "n = Mul(d, r) p = Mul(n, g) y = Add(p, b)",
    "jax": f"{MOMENTS} r = Reciprocal(s) k = Mul(r, g) d = Sub(x, m) p = Mul(d, k) y = Add(p, b)",
    "keras": f"{DEVIATION} r = Reciprocal(s) k = Mul(r, g) p = Mul(x, k) o = Mul(m, k) c = Sub(b, o) y = Add(p, c)",
    "no gain": f"{DEVIATION} n = Div(d, s) y = Add(n, b)",
    "no shift": f"{DEVIATION} n = Div(d, s) y = Mul(n, g)",
    "bare": f"{DEVIATION} y = Div(d, s)",
}
CONSTANTS = {"two": TWO, "half": np.float32(0.5), "minus": np.float32(-0.5), "one": np.float32(1), **NUMBERS}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    text = SPELLINGS[spelling]
    made = model(f"{LAST} {{ {text} }}", **GAIN, **{k: v for k, v in CONSTANTS.items() if k in text})
    result = fused(made)
    assert set(count_ops(result.model)) == {"LayerNormalization"}
    (outcome,) = result.report.norms
    assert (outcome.status, outcome.remains, outcome.layer) == (Status.APPLIED, True, "LayerNormalization")
    assert "made one LayerNormalization" in str(result.report)


def test_statistics_without_their_axis() -> None:
    """As tf2onnx writes them: reduced, then brought back to the rank of the input by Reshape and Expand."""
    text = MOMENTS.replace("keepdims=1", "keepdims=0")
    text = text.replace("e = Add(eps, v)", "v3 = Reshape(v, to) ve = Expand(v3, to) e = Add(eps, ve)")
    text += " r = Reciprocal(s) k = Mul(r, g) m3 = Reshape(m, to) me = Expand(m3, to) d = Sub(x, me)"
    made = model(
        f"{LAST} {{ {text} p = Mul(d, k) y = Add(p, b) }}", **GAIN, **NUMBERS, to=np.array([3, 4, 1], np.int64)
    )
    fused(made)


def test_a_statistic_of_another_place_is_not_one() -> None:
    """The same numbers in another order: (3, 4) read as (4, 3)."""
    text = MOMENTS.replace("keepdims=1", "keepdims=0").replace("[3,4,8]", "[4,4,8]")
    text += " me = Transpose<perm=[1,0]>(m) m3 = Unsqueeze(me, axis) d = Sub(x, m3) y = Div(d, s3)"
    text = text.replace("s = Sqrt(e)", "s = Sqrt(e) s3 = Unsqueeze(s, axis)")
    left(model(f"(float[4,4,8] x) => (float[?,?,?] y) {{ {text} }}", eps=GAIN["eps"], **NUMBERS))


def test_middle_axis_is_transposed_to_the_end_and_back() -> None:
    text = DEVIATION.replace("[-1]", "[1]")
    gain, shift = array(4, 1).astype(np.float32), array(1, 4, 1).astype(np.float32)
    made = model(f"{LAST} {{ {text} n = Div(d, s) p = Mul(n, g) y = Add(p, b) }}", g=gain, b=shift, eps=GAIN["eps"])
    assert count_ops(fused(made).model) == {"LayerNormalization": 1, "Transpose": 2}


def test_several_last_axes() -> None:
    text = DEVIATION.replace("[-1]", "[1,2]")
    gain = array(4, 8).astype(np.float32)
    made = model(f"{LAST} {{ {text} n = Div(d, s) y = Mul(n, g) }}", g=gain, eps=GAIN["eps"])
    assert set(count_ops(fused(made).model)) == {"LayerNormalization"}


def test_several_other_axes_are_refused() -> None:
    text = DEVIATION.replace("[-1]", "[0,1]")
    (outcome,) = left(model(f"{LAST} {{ {text} y = Div(d, s) }}", eps=GAIN["eps"])).report.refused
    assert outcome.refusal is not None
    assert outcome.refusal.reason is Reason.AXIS


def test_a_gain_along_another_axis_stays_behind() -> None:
    made = model(
        f"{LAST} {{ {DEVIATION} n = Div(d, s) y = Mul(n, g) }}", g=array(4, 1).astype(np.float32), eps=GAIN["eps"]
    )
    assert count_ops(fused(made).model) == {"LayerNormalization": 1, "Mul": 1}


def test_norm_that_reads_a_norm() -> None:
    second = DEVIATION
    for name in "mdqves":
        second = second.replace(f"{name} =", f"{name}2 =").replace(f"({name})", f"({name}2)")
        second = second.replace(f"({name},", f"({name}2,").replace(f", {name})", f", {name}2)")
    second = second.replace("(x", "(h").replace("Add(v2, eps)", "Add(v2, eps)")
    made = model(f"{LAST} {{ {DEVIATION} n = Div(d, s) h = Mul(n, g) {second} y = Div(d2, s2) }}", **GAIN)
    assert set(count_ops(fused(made, 2).model)) == {"LayerNormalization"}


def test_a_read_statistic_stays_too() -> None:
    made = model(
        f"(float[3,4,8] x) => (float[?,?,?] y, float[?,?,?] m) {{ {DEVIATION} y = Div(d, s) }}", eps=GAIN["eps"]
    )
    folded = fold_onnx(made)
    assert count_ops(folded.model) == {"LayerNormalization": 1, "ReduceMean": 1}
    for new, old in zip(outputs(folded.to_proto()), outputs(made), strict=True):
        np.testing.assert_allclose(new, old, rtol=2e-5, atol=2e-5)


NOT_A_NORM = {
    "no eps": DEVIATION.replace("e = Add(v, eps) s = Sqrt(e)", "s = Sqrt(v)") + " y = Div(d, s)",
    "variance of other axes": DEVIATION.replace("v = ReduceMean<axes=[-1]>", "v = ReduceMean<axes=[1]>")
    + " y = Div(d, s)",
    "mean of other axes": DEVIATION.replace("m = ReduceMean<axes=[-1]>", "m = ReduceMean<axes=[1]>") + " y = Div(d, s)",
    "no centre": DEVIATION + " y = Div(x, s)",
    "unbiased": f"{CENTRED} q = Mul(d, d) u = ReduceSum(q, axis) v = Mul(u, seventh) e = Add(v, eps) s = Sqrt(e) "
    "y = Div(d, s)",
    "computed eps": DEVIATION.replace("Add(v, eps)", "Add(v, m)") + " y = Div(d, s)",
    "inverted": DEVIATION + " y = Div(s, d)",
}


@pytest.mark.parametrize("name", NOT_A_NORM)
def test_other_formulas_stay(name: str) -> None:
    text = NOT_A_NORM[name]
    numbers = {"axis": AXIS, "seventh": np.float32(1 / 7), "eps": GAIN["eps"]}
    made = model(f"{LAST} {{ {text} }}", **{k: v for k, v in numbers.items() if k in text})
    assert left(made).report.outcomes == ()


def test_double_precision_is_refused() -> None:
    text = LAST.replace("float", "double")
    (outcome,) = left(model(f"{text} {{ {DEVIATION} y = Div(d, s) }}", eps=np.float64(1e-5))).report.refused
    assert outcome.refusal is not None
    assert outcome.refusal.reason is Reason.DTYPE


def test_excluded_norm_stays() -> None:
    made = model(f"{LAST} {{ {DEVIATION} y = Div(d, s) }}", eps=GAIN["eps"])
    (outcome,) = fold_onnx(made, exclude=["y"]).report.refused
    assert outcome.refusal is not None
    assert outcome.refusal.reason is Reason.EXCLUDED


@pytest.mark.parametrize("opset", [13, 16])
def test_older_opset_is_raised_where_nothing_else_changes(opset: int) -> None:
    made = model(f"{LAST} {{ {DEVIATION} y = Div(d, s) }}", opset=opset, eps=GAIN["eps"])
    assert fused(made).model.opset_imports[""] == 17


def test_older_opset_with_an_operator_that_changed_is_refused() -> None:
    text = f"{LAST} {{ {DEVIATION} n = Div(d, s) o = Unsqueeze<axes=[0]>(n) y = Squeeze<axes=[0]>(o) }}"
    (outcome,) = left(model(text, opset=12, eps=GAIN["eps"])).report.refused
    assert outcome.refusal is not None
    assert "opset 17" in outcome.refusal.detail
    assert "version_converter" in outcome.refusal.hint


@pytest.mark.models
def test_magika(tmp_path: Path) -> None:
    """A trained classifier of file types, in which tf2onnx wrote out two LayerNorms of jax, one along a middle axis."""
    found = importlib.util.find_spec("magika")
    if found is None or not found.submodule_search_locations:
        pytest.skip("magika is not installed")
    ort = pytest.importorskip("onnxruntime")
    source = Path(next(iter(found.submodule_search_locations))) / "models" / "standard_v3_3" / "model.onnx"
    result = fold_onnx(source)
    assert [o.status for o in result.report.norms] == [Status.APPLIED] * 2
    assert count_ops(result.model)["LayerNormalization"] == 2
    assert not {"Sqrt", "Reciprocal"} & set(count_ops(result.model))
    text = Path(__file__).read_bytes()
    content = np.frombuffer(text[:1024] + text[-1024:], np.uint8).astype(np.int32)[None]  # its own format: both ends
    files = (source, write(result.model, tmp_path / "fused.onnx"))
    before, after = (
        ort.InferenceSession(str(f), providers=["CPUExecutionProvider"]).run(None, {"bytes": content})[0] for f in files
    )
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert before.argmax() == after.argmax()
