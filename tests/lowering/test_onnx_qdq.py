"""Calibrated layers as Q/DQ nodes: what is written, that ONNX Runtime reads the same integers, and what is refused."""

from __future__ import annotations

import collections
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.errors import LoweringError, VerificationError
from normfuse.lowering import onnx_qdq
from normfuse.quantization.calibrated import CalibratedLayer
from normfuse.rerun import Samples
from tests.cli.conftest import small_model
from tests.parity import error
from tests.quantization.operands import image
from tests.transformers_small import Decoder, ViT, built, images, words

onnx = pytest.importorskip("onnx")
backend = pytest.importorskip("normfuse.lowering.onnxruntime")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Inverted(nn.Module):
    """The block of MobileNetV2: expand, depthwise, project, and a shortcut; with norms and ReLU6."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        inner = 3 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)),
        )
        self.shortcut = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Inverted(8, 1), Inverted(8, 2), Inverted(8, 1))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


def spread_norms(model: nn.Module) -> nn.Module:
    """Give the channels of every norm ranges that differ by six octaves, as in trained MobileNets."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.num_features
            octaves = torch.rand(size, generator=generator)
            with torch.no_grad():
                module.running_var.copy_(torch.exp2(-6 * octaves))
                module.weight.copy_(torch.exp2(-4 * torch.rand(size, generator=generator)))
    return model.eval()


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (7, 6)),
    "tokens": (nn.Linear(6, 5, bias=False), (2, 7, 6)),
    "conv": (nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "grouped": (nn.Conv2d(6, 9, (3, 2), groups=3, dilation=(2, 1), bias=False), (2, 6, 9, 9)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 9, 9)),
    "same": (nn.Conv1d(6, 5, 4, padding="same"), (2, 6, 9)),
    "circular": (nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"), (2, 6, 9, 9)),
}


class All(nn.Module):
    """Every layer on an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: layer for name, (layer, _) in LAYERS.items()})

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers.values(), xs, strict=True)]


def spread(shape: tuple[int, ...], axis: int) -> Tensor:
    """Return values whose channels, six of them, differ in range by five octaves."""
    ranges = torch.exp2(-torch.arange(6.0)).reshape([-1 if d == axis else 1 for d in range(len(shape))])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * ranges


def exported(model: nn.Module, data: Tensor, path: Path, **options: Any) -> tuple[Any, Any]:
    """Return the quantized model and the file that was written and verified."""
    quantized = normfuse.quantize(model, calibration=[data], **options)
    normfuse.export(quantized, path, example_inputs=data)
    return quantized, onnx.load(path)


def counts(proto: Any) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in proto.graph.node)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_every_kind_of_layer(tmp_path: Path, bits: int):
    data = [spread(shape, 1 if "conv" in type(m).__name__.lower() else -1 % len(shape)) for m, shape in LAYERS.values()]
    quantized = normfuse.quantize(All(), calibration=[(data,)], bits=bits, groups=5)
    path = tmp_path / "m.onnx"
    normfuse.export(quantized, path, example_inputs=(data,))
    proto = onnx.load(path)
    found, layers = counts(proto), dict(quantized.layers)
    assert found["QuantizeLinear"] == len(LAYERS)
    assert found["DequantizeLinear"] == 2 * len(LAYERS)
    assert found["Mul"] == sum(layer.input_groups > 1 for layer in layers.values()) >= 2
    weights = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert sorted(sorted(t.dims) for t in weights) == sorted(sorted(m.weight.shape) for m, _ in LAYERS.values())
    steps = onnx_qdq.layer_steps(quantized, path, (data,))
    assert set(steps) == {f"layers.{name}" for name in LAYERS}
    assert max(steps.values()) < 1e-3
    beyond = [3 * x for x in data]  # of the calibrated ranges
    for expected, y in zip(quantized(beyond), backend.run(backend.session(path), (beyond,)), strict=True):
        assert error(expected, y) < 1e-5


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(built(ViT), images(4)), (built(Decoder), words())],
    ids=["transformer", "decoder"],
)
def test_network(tmp_path: Path, model: nn.Module, inputs: Tensor):
    quantized, proto = exported(model, inputs, tmp_path / "m.onnx")
    layers = [m for m in quantized.modules() if isinstance(m, CalibratedLayer)]
    assert counts(proto)["QuantizeLinear"] == len(layers)
    steps = onnx_qdq.layer_steps(quantized, tmp_path / "m.onnx", inputs)
    assert len(steps) == len(layers)
    assert max(steps.values()) < 1e-3
    assert_within_one_step(quantized, tmp_path / "m.onnx", inputs)


def assert_within_one_step(quantized: nn.Module, path: Path, inputs: Tensor) -> None:
    """Assert that the outputs of the whole are within one quantization step of the integer model's."""
    y = quantized(inputs).detach()
    (found,) = backend.run(backend.session(path), inputs)
    assert float((found - y).abs().max()) <= float(y.abs().max()) / 127


def test_mobilenet_of_unequal_ranges(tmp_path: Path):
    torch.manual_seed(0)
    model, data = spread_norms(MobileNet()), torch.randn(4, 3, 32, 32)
    quantized, _ = exported(model, data, tmp_path / "m.onnx", groups=6)
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, CalibratedLayer)}
    assert len(layers) == 11
    assert max(m.input_groups for m in layers.values()) > 3
    assert max(onnx_qdq.layer_steps(quantized, tmp_path / "m.onnx", data).values()) < 1e-3
    assert_within_one_step(quantized, tmp_path / "m.onnx", data)


SMALL = image(4, 3, 8, 8, dtype=torch.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A quantized model and its file, for batches of any size."""
    torch.manual_seed(0)
    quantized, path = normfuse.quantize(small_model(), calibration=[SMALL]), tmp_path_factory.mktemp("qdq") / "m.onnx"
    normfuse.export(quantized, path, example_inputs=SMALL, dynamic_axes=["input:0"])
    return quantized, path


def test_batch_of_any_size(small: tuple[Any, Path]):
    quantized, path = small
    for size in (1, 3):
        (y,) = backend.run(backend.session(path), SMALL[:size])
        assert error(quantized(SMALL[:size]), y) < 0.02


def test_a_shared_layer_is_written_at_both_calls(tmp_path: Path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.relu(self.layer(x)))

    data = torch.randn(5, 4)
    quantized, proto = exported(Twice(), data, tmp_path / "m.onnx")
    assert counts(proto)["QuantizeLinear"] == 2
    assert onnx_qdq.layer_steps(quantized, tmp_path / "m.onnx", data) == {}


@pytest.mark.parametrize("damage", ["weight_scale", "qdq_weight"])
def test_a_wrong_file_is_found(small: tuple[Any, Path], tmp_path: Path, damage: str):
    quantized, proto = small[0], onnx.load(small[1])
    (tensor,) = [t for t in proto.graph.initializer if t.name == f"3.{damage}"]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0] = values[0] * 2 if damage == "weight_scale" else -values[0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    comparison = onnx_qdq.compare(quantized, tmp_path / "wrong.onnx", Samples((SMALL,)))
    assert not comparison
    assert comparison.failure.startswith("3 is off by")


def test_a_whole_that_differs_is_found(small: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch):
    other = copy.deepcopy(small[0])
    with torch.no_grad():
        other[8].bias.neg_()
        other[8].weight_scale.neg_()
    monkeypatch.setattr(onnx_qdq, "layer_steps", lambda *_: {})
    assert onnx_qdq.compare(small[0], small[1], Samples((SMALL,)))
    assert "cosine" in onnx_qdq.compare(other, small[1], Samples((SMALL,))).failure


def test_refusals(small: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "m.onnx"
    with pytest.raises(LoweringError, match="its own integers"):
        normfuse.export(small[0], target, example_inputs=SMALL, precision="fp16")
    with pytest.raises(LoweringError, match="quantizes afresh"):
        normfuse.export(normfuse.quantize(small_model()), target, example_inputs=SMALL)
    monkeypatch.setattr(onnx_qdq, "layer_steps", lambda *_: {"0": 1.5})
    with pytest.raises(VerificationError, match=r"1\.5 quantization steps"):
        normfuse.export(small[0], target, example_inputs=SMALL)
    assert not target.exists()
