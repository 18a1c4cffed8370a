"""Numbers of a file: mixed, quantized, and what is refused before anything is written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import LoweringError, VerificationError
from normfuse.lowering import ExportResult, Numbers, export
from normfuse.lowering.onnx import export_onnx
from normfuse.lowering.precision import check_ranges

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


class Net(nn.Module):
    """A convolution, a norm that stays, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.conv(x)).mean((2, 3))))


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def data() -> list[Tensor]:
    return [image() for _ in range(4)]


def types(path: Path) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    """A float32 file, from which quantized ones are made without tracing again."""
    torch.manual_seed(0)
    model, path = Net(), tmp_path_factory.mktemp("plain") / "net.onnx"
    export_onnx(model, path, image())
    return model, path


@pytest.fixture
def quantized(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Quantize the float32 file with given settings; returns the result of the export."""
    from normfuse.lowering import onnx as module

    def save(_program: Any, target: Path) -> None:
        target.write_bytes(plain[1].read_bytes())

    class Program:
        model: Any = type("Model", (), {"metadata_props": {}})()

    monkeypatch.setattr(module, "_export", lambda *_args, **_kwargs: Program())
    monkeypatch.setattr(module.onnx_functions, "define", lambda _model: None)
    monkeypatch.setattr(module, "_save", save)

    def write(**settings: Any) -> tuple[ExportResult, onnx.GraphProto]:
        numbers = Numbers(**settings)
        result = export(plain[0], tmp_path / "q.onnx", example_inputs=image(), precision=numbers, num_inputs=2)
        return result, onnx.load(tmp_path / "q.onnx").graph

    return write


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {value: node for node in graph.node for value in node.output}


def test_mixed_keeps_norms_and_what_is_listed_in_fp32(tmp_path: Path):
    model = Net()
    numbers = Numbers("mixed", keep_fp32=("head.2",))
    result = export(model, tmp_path / "net.onnx", example_inputs=image(), precision=numbers, num_inputs=2)
    found = types(tmp_path / "net.onnx")
    kept = {name for name, kind in found.items() if kind == FLOAT}
    assert kept == {"norm.weight", "norm.bias", "head.2.weight", "head.2.bias"}
    assert {name for name, kind in found.items() if kind == FLOAT16} >= {"conv.weight", "head.0.weight"}
    assert result.info.nodes["Cast"] == 4  # into and out of each kept module
    assert result.comparison
    assert result.comparison.dtype == "float16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.norm._forward_hooks


def test_mixed_is_judged_by_what_it_costs_the_source_itself(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].weight.mul_(2000.0)  # squares of what the norm reads are beyond fp16, the values are not
    numbers = Numbers("mixed")
    assert export(model, tmp_path / "net.onnx", example_inputs=image(), precision=numbers, num_inputs=2).comparison


def test_a_glob_without_a_module_is_an_error():
    with pytest.raises(LoweringError, match="no module is called tail"):
        check_ranges(Net(), Numbers("mixed", keep_fp32=("tail",)), [image()])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"precision": "fp16", "keep_fp32": ("norm",)}, "precision mixed, not by fp16"),
        ({"precision": "int8"}, "needs calibration data"),
        ({"precision": "fp8", "calibration": torch.ones(1)}, "fp8 is for TensorRT"),
    ],
)
def test_settings_that_contradict_each_other(settings: Any, text: str):
    with pytest.raises(LoweringError, match=text):
        Numbers(**settings)


def test_an_unknown_precision_is_an_error_of_the_caller():
    with pytest.raises(ValueError, match="'half' is not one of fp32"):
        Numbers("half")  # type: ignore[arg-type]


def test_values_beyond_fp16_are_refused_by_layer_before_anything_is_written(tmp_path: Path):
    model = Net()
    with torch.no_grad():
        model.conv.weight.fill_(1e3)
    bright = torch.full((1, 3, 8, 8), 5.0)
    text = r"values beyond the range of fp16 \(conv\): conv \(Conv2d\) reaches 1\.35e\+05; use bf16 or fp32, or mixed"
    with pytest.raises(LoweringError, match=text):
        normfuse.export(model, tmp_path / "net.onnx", example_inputs=bright, precision="fp16")
    assert list(tmp_path.iterdir()) == []
    loss = check_ranges(model, Numbers("mixed"), [bright])
    assert any("values beyond the range of mixed" in note for note in loss.notes)
    assert not check_ranges(model, Numbers("bf16"), [bright]).notes


def test_weights_that_a_kept_layer_holds_may_leave_the_range():
    model = Net()
    with torch.no_grad():
        model.head[2].weight[0, 0] = 1e5
    with pytest.raises(LoweringError, match=r"head\.2 reaches 1e\+05; use keep_fp32 head\.2 \(mixed\), bf16 or fp32"):
        check_ranges(model, Numbers("mixed"), [image()])
    check_ranges(model, Numbers("mixed", keep_fp32=("head.*",)), [image()])


def test_weights_that_lose_digits_are_reported():
    model = Net()
    with torch.no_grad():
        model.conv.weight.mul_(1e-6)
    loss = check_ranges(model, Numbers("fp16"), [image()])
    assert any(note.startswith("weights lose digits in fp16: conv ") for note in loss.notes)
    assert {one["name"] for one in loss.to_dict()["weights"]} == {"conv", "head.0", "head.2"}
    assert loss.to_dict()["activations"]


def test_quantized_for_onnx_runtime(quantized: Any):
    result, graph = quantized(precision="int8", calibration=data())
    assert result.comparison
    assert 0.99 < result.comparison.cosine < 1.0
    made_by = producers(graph)
    kinds = {t.name: t.data_type for t in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {kinds[node.input[2]] for node in quantizers} == {onnx.TensorProto.UINT8}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert [made_by[value].op_type for value in node.input] == ["DequantizeLinear"] * 3  # value, weight, bias


def test_quantized_for_tensorrt(quantized: Any):
    result, graph = quantized(precision="int8", calibration=data(), qdq="tensorrt")
    assert result.comparison
    made_by = producers(graph)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not tensors[node.input[2]].any()  # symmetric
        if node.op_type in ("Conv", "Gemm"):
            assert [made_by[value].op_type for value in node.input[:2]] == ["DequantizeLinear"] * 2
            assert node.input[2] in tensors  # the bias as it was
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in tensors]
    assert Counter(tensors[n.input[1]].size for n in weights) == {8: 2, 5: 1}  # one scale per output channel


def test_weights_outside_the_file_are_quantized_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("normfuse.lowering.onnx.EXTERNAL_DATA_BYTES", 0)  # as if they were over 2 GB
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64))
    numbers = Numbers("int8", calibration=data())
    result = export(model, tmp_path / "q.onnx", example_inputs=image(), precision=numbers, num_inputs=2)
    assert result.comparison
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.onnx", "q.onnx.data"]
    assert (tmp_path / "q.onnx.data").stat().st_size >= 192 * 64
    kept = [t for t in onnx.load(tmp_path / "q.onnx", load_external_data=False).graph.initializer if t.raw_data]
    assert sum(len(t.raw_data) for t in kept) < 192 * 64


def test_fp8_for_tensorrt(quantized: Any):
    result, graph = quantized(precision="fp8", calibration=data(), qdq="tensorrt")
    assert result.comparison
    kinds = {t.data_type for t in graph.initializer}
    assert onnx.TensorProto.FLOAT8E4M3FN in kinds


def test_a_quantized_file_that_points_elsewhere_is_not_kept(quantized: Any, tmp_path: Path):
    with pytest.raises(VerificationError, match=r"cosine 0\.9999\d+ to the float64 run, at least 1 is asked for"):
        quantized(precision="int8", calibration=data(), min_cosine=1.0)
    assert list(tmp_path.iterdir()) == []


def test_calibration_data_of_another_shape_is_an_error(quantized: Any, tmp_path: Path):
    with pytest.raises(LoweringError, match="int8: the calibration failed"):
        quantized(precision="int8", calibration=[torch.randn(1, 3, 8, 8)])
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_anything_to_multiply_is_an_error(tmp_path: Path):
    numbers = Numbers("int8", calibration=data())
    with pytest.raises(LoweringError, match="no Conv, ConvTranspose, Gemm, MatMul to quantize"):
        export_onnx(nn.Sigmoid(), tmp_path / "net.onnx", image(), precision=numbers)


def test_group_norm_is_one_node_for_tensorrt(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    info = export_onnx(model, tmp_path / "net.onnx", image(), runtime="tensorrt")
    assert info.opset == 21
    assert dict(info.nodes) == {"Conv": 1, "GroupNormalization": 1}
