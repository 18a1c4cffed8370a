"""Small ONNX models from text, and the assertions that every fold of one must satisfy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from normfuse.base import Refusal
from normfuse.lowering.onnx_fold import OnnxFoldResult, count_ops, fold_onnx

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


def model(text: str, *, opset: Any = 17, **arrays: np.ndarray) -> onnx.ModelProto:
    graph = onnx.parser.parse_graph(f"g {text}")
    graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    opsets = [onnx.helper.make_opsetid("", opset)]
    made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(made)
    return made


class ConvTranspose(OpRun):
    """In place of the reference implementation, which does not know groups."""

    def _run(self, x, w, b=None, group=1, strides=None, pads=None, **_):
        x, w, b = (None if v is None else torch.tensor(v) for v in (x, w, b))
        return (torch.nn.functional.conv_transpose2d(x, w, b, strides or 1, (pads or [0])[0], groups=group).numpy(),)


def outputs(made: onnx.ModelProto, seed: int = 3) -> list[np.ndarray]:
    random, feeds = np.random.default_rng(seed), {}
    for value in made.graph.input:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [dim.dim_value or 2 for dim in tensor.shape.dim]
        feeds[value.name] = np.asarray(
            random.standard_normal(shape) > 0 if dtype == np.bool_ else random.standard_normal(shape), dtype
        )
    results: Any = ReferenceEvaluator(made, new_ops=[ConvTranspose]).run(None, feeds)
    return list(results)


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


def refusal(made: onnx.ModelProto) -> Refusal:
    """Assert that the only norm is refused and the model is as it was, and return why."""
    result = folds(made, left=1)
    assert count_ops(result.model) == count_ops(made)
    return only_refusal(result)


def only_refusal(result: OnnxFoldResult) -> Refusal:
    """Return why the one norm that was refused was."""
    (outcome,) = result.report.refused
    assert outcome.refusal is not None
    assert outcome.refusal.detail
    return outcome.refusal


IMAGE = "(double[2,4,6,6] x) => (double[?,?,?,?] y)"
CONV = {"w": array(6, 4, 3, 3), "b": array(6)}
TO_CONV = f"{IMAGE} {{ h = Conv(x, w, b) y = {bn('h')} }}"
