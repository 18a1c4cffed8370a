"""Files in E4M3: their scales, and their values against the same rounding in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from normfuse.errors import LoweringError
from normfuse.lowering import ExportResult, Numbers, export
from normfuse.lowering.onnx import export_onnx
from normfuse.lowering.onnxruntime import run, session

LARGEST = 448.0
Written = tuple["Net", list[Tensor], Path, ExportResult]


class Net(nn.Module):
    """Two convolutions, one of them depthwise, and attention over the pixels: (N, 3, 6, 6) to (N, 5).

    ``rounded`` is applied to whatever is multiplied, with whether it is a weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.query, self.key, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.rounded: Callable[[Tensor, bool], Tensor] = lambda x, _is_weight: x

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.rounded(x, False), self.rounded(self.conv.weight, True), self.conv.bias)
        x = torch.relu(self.depthwise(torch.relu(x))).flatten(2).mT
        query, key = self.linear(self.query, x), self.linear(self.key, x)
        weights = (self.rounded(query, False) @ self.rounded(key.mT, False)).softmax(-1)
        return self.linear(self.head, (self.rounded(weights, False) @ self.rounded(x, False)).mean(1))

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(self.rounded(x, False), self.rounded(layer.weight, True), layer.bias)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    torch.manual_seed(0)
    model, data = Net().eval(), [torch.randn(2, 3, 6, 6) for _ in range(4)]
    with torch.no_grad():
        model.conv.weight[:, 0, 0, 0] *= 10.0  # each channel has one weight far beyond the others
        model.key.weight.mul_(0.05)  # nearly uniform attention: its mean is many times its deviation
    numbers = Numbers("fp8", calibration=data, qdq="tensorrt")
    path = tmp_path_factory.mktemp("fp8") / "q.onnx"
    return model, data, path, export(model, path, example_inputs=data[0], precision=numbers)


def e4m3(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale


def emulate(model: Net, data: list[Tensor]) -> tuple[list[float], list[Tensor]]:
    """Return the scale of each value, in the order in which they are computed, and the outputs rounded by them."""
    seen: list[list[float]] = []

    def record(x: Tensor, is_weight: bool) -> Tensor:
        seen[-1].extend([] if is_weight else [float(x.abs().max()) / LARGEST])
        return x

    def quantize(x: Tensor, is_weight: bool) -> Tensor:
        rows = x.abs().flatten(1).amax(1).reshape(-1, *[1] * (x.dim() - 1)) / LARGEST
        return e4m3(x, rows if is_weight else torch.tensor(next(scales)))

    model.rounded, outputs = record, []
    for x in data:
        seen.append([])
        model(x)
    largest = [max(each) for each in zip(*seen, strict=True)]
    model.rounded = quantize
    for x in data:
        scales = iter(largest)
        outputs.append(model(x))
    model.rounded = lambda x, _is_weight: x
    return largest, outputs


def test_onnx_runtime_rounds_and_saturates_as_torch_does():
    scale, grid = torch.tensor(0.37), torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, ties, -ties, torch.tensor([448.0, 464.0, 480.0, 1e6, -1e6]), 50 * torch.randn(10_000)]) * scale
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    held = [numpy_helper.from_array(scale.numpy(), "s"), helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0])]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], held)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    assert torch.equal(run(session(file, optimization="disabled"), x)[0], e4m3(x, scale))


@torch.no_grad()
def test_the_file_computes_what_torch_does_in_float8(written: Written):
    model, data, path, result = written
    scales, expected = emulate(model, data)
    found = [run(session(path, optimization="disabled"), x)[0] for x in data]
    largest = max(float(y.abs().max()) for y in expected)
    for y, wanted in zip(found, expected, strict=True):
        assert float((y - wanted).abs().max()) < 1e-3 * largest  # a tie may round the other way
    graph = onnx.load(path).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).astype("float32")) for t in graph.initializer}
    kept = {float(tensors[node.input[1]]) for node in graph.node if node.op_type == "QuantizeLinear"}
    assert sorted(kept) == pytest.approx(sorted(set(scales)), rel=1e-5)
    assert result.comparison
    assert result.comparison.cosine > 0.995


def test_every_output_of_a_layer_has_a_scale_that_uses_the_whole_range(written: Written):
    graph = onnx.load(written[2]).graph
    tensors = {t.name: t for t in graph.initializer}
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in tensors]
    for node in weights:
        assert tensors[node.input[0]].data_type == TensorProto.FLOAT8E4M3FN
        values = numpy_helper.to_array(tensors[node.input[0]]).astype("float32")
        axis = next(one.i for one in node.attribute if one.name == "axis")
        assert set(abs(values).max(tuple({*range(values.ndim)} - {axis}))) == {LARGEST}
    assert len(weights) == 4


def test_convolutions_in_groups_stay_in_float32(written: Written):
    graph = onnx.load(written[2]).graph
    made_by = {value: node.op_type for node in graph.node for value in node.output}
    read = {
        node.input[1]: [made_by.get(name) for name in node.input[:2]] for node in graph.node if node.op_type == "Conv"
    }
    assert read.pop("depthwise.weight") == ["Relu", None]
    assert list(read.values()) == [["DequantizeLinear", "DequantizeLinear"]]


def test_weights_outside_the_file_are_quantized_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("normfuse.lowering.onnx.EXTERNAL_DATA_BYTES", 0)  # as if they were over 2 GB
    model, data = nn.Linear(192, 64), [torch.randn(2, 192) for _ in range(3)]
    numbers = Numbers("fp8", calibration=data, qdq="tensorrt")
    result = export(model, tmp_path / "q.onnx", example_inputs=data[0], precision=numbers)
    assert result.comparison
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.onnx", "q.onnx.data"]
    assert 192 * 64 <= (tmp_path / "q.onnx.data").stat().st_size < 192 * 64 * 2


def test_an_opset_without_e4m3_is_refused(tmp_path: Path):
    numbers = Numbers("fp8", calibration=[torch.randn(1, 4)], qdq="tensorrt")
    with pytest.raises(LoweringError, match="fp8 needs opset 19 or later, not 18"):
        export_onnx(nn.Linear(4, 4), tmp_path / "q.onnx", torch.randn(1, 4), precision=numbers, opset=18)
    assert not list(tmp_path.iterdir())
