"""Sessions of ONNX Runtime: granted providers, tensors in and out, and errors that say what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from normfuse.errors import LoadError, LoweringError, MissingDependencyError
from normfuse.lowering import graphs, onnxruntime
from normfuse.lowering.onnxruntime import run, runner, session
from normfuse.verify import verify

ADD = """
<ir_version: 10, opset_import: ["": 20]>
add (float[N, 3] x, float[N, 3] y) => (float[N, 3] sum, float[N, 3] difference, bool[N, 3] less)
{ sum = Add(x, y)  difference = Sub(x, y)  less = Less(x, y) }
"""


@pytest.fixture
def add(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(ADD), tmp_path / "add.onnx")
    return tmp_path / "add.onnx"


def expected(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x + y, x - y, x < y


def test_inputs_by_position_and_by_name(add: Path):
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    opened = session(add, threads=1)
    for inputs in ((x, y), {"y": y, "x": x}, {"first": x, "second": y}):
        outputs = run(opened, inputs)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected(x, y), strict=True))


@pytest.mark.parametrize("optimization", ["all", "basic", "disabled"])
def test_a_runner_can_be_called_again(add: Path, optimization: onnxruntime.Optimization):
    x = torch.randn(4, 3)
    call = runner(session(add, optimization=optimization), (x, x))
    assert torch.equal(call()[0], call()[0])
    assert torch.equal(call()[0], x + x)


def test_optimization_is_what_was_asked_for(add: Path):
    runtime = onnxruntime.require()
    levels = {name: session(add, optimization=name).get_session_options() for name in ("all", "disabled")}
    assert levels["all"].graph_optimization_level == runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert levels["disabled"].graph_optimization_level == runtime.GraphOptimizationLevel.ORT_DISABLE_ALL


def test_floating_point_inputs_are_cast_and_others_are_not(add: Path):
    opened = session(add)
    x = torch.randn(1, 3, dtype=torch.float64)
    assert torch.equal(run(opened, (x, x.half()))[0], x.float() + x.half().float())
    with pytest.raises(LoweringError, match="ONNX Runtime failed"):
        run(opened, (x.long(), x))


def test_layouts_other_than_contiguous_are_taken(add: Path):
    x = torch.randn(3, 2).T
    assert torch.equal(run(session(add), (x, x))[0], x + x)


def test_a_wrong_number_of_inputs_names_those_of_the_file(add: Path):
    with pytest.raises(LoweringError, match=r"takes 2 inputs \(x, y\), 1 given"):
        run(session(add), torch.ones(1, 3))


def test_a_provider_that_is_not_there_is_an_error(add: Path):
    with pytest.raises(MissingDependencyError, match="NoSuchProvider is not in this onnxruntime, which has"):
        session(add, providers=["NoSuchProvider", "CPUExecutionProvider"])


def test_a_provider_that_is_not_granted_is_an_error(add: Path, monkeypatch: pytest.MonkeyPatch):
    runtime = onnxruntime.require()
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["Other", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "_open", lambda *_: runtime.InferenceSession(add))
    with pytest.raises(MissingDependencyError, match="Other was not granted"):
        session(add, providers=["Other"])


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256))])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"bad\.onnx"):
        session(path)
    with pytest.raises(LoadError, match=r"bad\.onnx"):
        verify(torch.nn.Identity(), path, torch.ones(1))


def test_a_truncated_file_is_refused(add: Path):
    add.write_bytes(add.read_bytes()[:-20])
    with pytest.raises(LoadError):
        verify(torch.nn.Identity(), add, torch.ones(1))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(LoadError, match="there is no file"):
        session(tmp_path / "none.onnx")
    with pytest.raises(LoadError, match="there is no such file"):
        verify(torch.nn.Identity(), tmp_path / "none.onnx", torch.ones(1))


def test_a_missing_package_is_named_with_the_command(add: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'normfuse\[onnx\]'"):
        session(add)


def test_a_file_with_other_outputs_than_the_source_fails(add: Path):
    class Sum(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    found = verify(Sum(), add, (torch.ones(1, 3), torch.ones(1, 3)))
    assert not found
    assert "returns 3 outputs, expected 1 outputs" in found.failure


NESTED = """
<ir_version: 10, opset_import: ["": 22]>
nested (bfloat16[2] x, bool c) => (bfloat16[2] y)
{
  y = If (c) <
    then_branch = then () => (bfloat16[2] a) { v = Constant <value = bfloat16[2] {0, 0}> ()  a = Add(x, v) },
    else_branch = else () => (bfloat16[2] b) { f = Cast <to = 1> (w)  g = Cast <to = 16> (f)  b = Add(x, g) }
  >
}
"""


def nested() -> onnx.ModelProto:
    model = onnx.parser.parse_model(NESTED)
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [2], [1.0, 2.0])
    model.graph.initializer.append(weight)
    for node in graphs.nodes(model):
        if node.op_type == "Constant":  # the parser reads no bfloat16
            node.attribute[0].t.CopyFrom(onnx.helper.make_tensor("v", onnx.TensorProto.BFLOAT16, [2], [3.0, 4.0]))
    return model


def test_bfloat16_is_widened_in_subgraphs_constants_and_casts():
    model = nested()
    assert graphs.uses_bfloat16(model)
    assert graphs.main_dtype(model) is torch.bfloat16
    wide = graphs.widen_bfloat16(model)
    assert not graphs.uses_bfloat16(wide)
    onnx.checker.check_model(wide, full_check=True)
    opened = session(wide)
    x = torch.tensor([10.0, 20.0])
    for condition in (True, False):
        (y,) = run(opened, {"x": x, "c": torch.tensor(condition)})
        assert torch.equal(y, x + (3.0 if condition else 1.0) + torch.tensor([0.0, 1.0]))


def test_questions_reach_subgraphs():
    model = nested()
    assert graphs.op_counts(model) == {"If": 1, "Constant": 1, "Add": 2, "Cast": 2}
    assert len(list(graphs.constants(model))) == 2
