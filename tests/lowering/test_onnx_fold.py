"""Folding an ONNX file: modes, dtypes, sharing, subgraphs, files; every norm reported once, nothing else touched."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from normfuse.base import Reason
from normfuse.errors import LoadError
from normfuse.lowering.onnx_fold import count_ops, fold_onnx, write
from normfuse.report import Status
from tests.lowering.onnx_models import (
    CONV,
    IMAGE,
    TO_CONV,
    array,
    bn,
    folds,
    model,
    norm,
    only_refusal,
    outputs,
    refusal,
)


def test_unknown_rank_is_refused() -> None:
    made = model(TO_CONV, **CONV, **norm("n", 6))
    made = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (double x) => (double y) {{ h = MatMul(x, w) y = {bn("h")} }}'
    )
    made.graph.input[0].type.tensor_type.ClearField("shape")
    made.graph.output[0].type.tensor_type.ClearField("shape")
    arrays = {"w": array(4, 6), **norm("n", 6)}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    found = only_refusal(fold_onnx(made))
    assert found.reason is Reason.RANK_UNKNOWN
    assert found.hint


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
    found = only_refusal(result)
    assert found.reason is Reason.BATCH_STATISTICS
    kept = result.to_proto().graph.node[1]
    assert (kept.input, kept.output, kept.attribute) == (node.input, node.output, node.attribute)


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
    found = only_refusal(fold_onnx(half))
    assert found.reason is Reason.RANGE


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
    found = only_refusal(result)
    assert found.reason is Reason.PARAMETRIZED
    assert "remove it from the graph inputs" in found.hint


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
    assert {value.name for value in folded.graph.value_info} <= {"w", "b"}


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
    assert only_refusal(result).reason is Reason.OPAQUE_OPERATION
    assert "outside the subgraph" in only_refusal(result).detail


def test_norms_inside_functions_are_refused() -> None:
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "own": 1]> g (double[2,3] x) => (double[2,3] y) { y = own.f(x, n, n) }'
        '<domain: "own", opset_import: ["": 17]> f (x, g, b) => (y) { y = BatchNormalization(x, g, b, b, g) }'
    )
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3), "n"))
    found = only_refusal(fold_onnx(made))
    assert found.reason is Reason.SHARED_MODULE
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
    text = f"{IMAGE} {{ h = Conv(x, w, b) n = {bn('h')} y = Conv(n, v) }}"
    made, path = model(text, **CONV, **norm("n", 6), v=array(3, 6, 3, 3)), tmp_path / "source" / "m.onnx"
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


def test_missing_external_data(tmp_path: Path) -> None:
    made, path = model(TO_CONV, **CONV, **norm("n", 6)), tmp_path / "m.onnx"
    onnx.save_model(made, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(LoadError, match=r"m\.onnx\.data"):
        fold_onnx(path)


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
