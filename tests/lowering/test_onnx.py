"""Writing ONNX: what is in the file, what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from normfuse import deploy
from normfuse.errors import LoweringError, MissingDependencyError, VerificationError
from normfuse.lowering import ExportResult, export, lower
from normfuse.lowering import onnx as lowering_onnx
from normfuse.lowering.onnx import export_onnx
from normfuse.pipeline import Result
from normfuse.report import Report
from normfuse.verify import verify


class Net(nn.Module):
    """Conv+BatchNorm, an optional input and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 5)
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.bias)

    def forward(self, image: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        y = self.head(self.act(self.bn(self.conv(image))).mean((2, 3)))
        return {"out": y, "aux": [y * 2 if scale is None else y * scale]}


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6)


def folded(model: nn.Module, wrong: float = 0.0) -> Result[Any]:
    twin: Any = copy.deepcopy(model).eval()
    twin.conv, twin.bn = fuse_conv_bn_eval(twin.conv, twin.bn), nn.Identity()
    twin.conv.bias.data += wrong
    deploy.guard(twin, {"pairs": [{"subject": "bn", "producer": ["conv"], "action": "applied"}]})
    return Result(twin, Report(()))


def shape_of(path: Path) -> list[str | int]:
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in dims]


@pytest.mark.parametrize("fold_bn", [True, False])
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm3d(4)], ids=["alone", "with a norm"])
def test_a_volume_convolution_without_bias_runs(norm: Any, fold_bn: bool, tmp_path: Path):
    """The exporter gives it a bias that no runtime takes."""
    model, x = nn.Sequential(nn.Conv3d(2, 4, 3, bias=False), norm(), nn.ReLU()).eval(), torch.randn(2, 2, 5, 5, 5)
    export_onnx(model, tmp_path / "net.onnx", x, fold_bn=fold_bn)
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert all(len(tensor.dims) != 2 for tensor in graph.initializer)
    assert verify(model, tmp_path / "net.onnx", x)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("relu", [False, True])
def test_zeros_around_a_max_pool_stay_zeros(relu: bool, precision: Any, tmp_path: Path):
    """ONNX Runtime moves them into the pool, which pads with minus infinity, where it can tell that they are zeros."""
    layers = [nn.Conv2d(3, 4, 3), *[nn.ReLU()] * relu, nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    nn.init.constant_(model[0].bias, -9.0)  # type: ignore[arg-type]
    assert export(model, tmp_path / "net.onnx", example_inputs=x, precision=precision).comparison
    graph = onnx.load(tmp_path / "net.onnx").graph
    pad = next(node for node in graph.node if node.op_type == "Pad")
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert len(pad.input) == 3
    assert (float(values[pad.input[2]]) == 0) == relu
    assert len(values) == len({name for node in graph.node for name in node.input} & values.keys())


@pytest.mark.parametrize("pad", [nn.ReflectionPad2d(1), nn.ConstantPad2d(1, -2.0)], ids=["reflected", "not zero"])
def test_other_paddings_before_a_max_pool_stay_as_they_are(pad: nn.Module, tmp_path: Path):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), pad, nn.MaxPool2d(3, 2)).eval(), torch.randn(2, 3, 8, 8)
    nn.init.constant_(model[0].bias, -9.0)  # type: ignore[arg-type]
    assert export(model, tmp_path / "net.onnx", example_inputs=x).comparison
    assert not any("smallest" in tensor.name for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer)


def test_the_file_is_described_and_computes_the_same(tmp_path: Path):
    model = Net()
    info = export_onnx(model, tmp_path / "net.onnx", image())
    assert info.path == tmp_path / "net.onnx"
    assert info.size_bytes == info.path.stat().st_size
    assert info.inputs == ("image",)
    assert info.nodes["Conv"] == 1
    assert "BatchNormalization" not in info.nodes
    assert info.opset == onnx.load(info.path).opset_import[0].version
    assert verify(model, info.path, image())


def test_inputs_are_named_as_in_forward_and_taken_by_name(tmp_path: Path):
    model = Net()
    info = export_onnx(model, tmp_path / "net.onnx", {"scale": torch.ones(2, 5), "image": image()})
    assert sorted(info.inputs) == ["image", "scale"]
    assert verify(model, info.path, {"image": image(), "scale": torch.randn(2, 5)})
    assert verify(model, info.path, (image(), torch.randn(2, 5)))


def test_batch_normalization_can_be_kept(tmp_path: Path):
    model = Net()
    info = export_onnx(model, tmp_path / "net.onnx", image(), fold_bn=False)
    assert info.nodes["BatchNormalization"] == 1
    assert not info.nodes.keys() & {"Constant", "Expand", "CastLike", "Shape"}  # what an unevaluated trace is full of
    assert info.notes == ()
    assert verify(model, info.path, image())


def test_a_norm_that_remains_is_noted(tmp_path: Path):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))
    info = export_onnx(model, tmp_path / "net.onnx", image())
    assert info.notes == ("1 BatchNormalization nodes remain",)


@pytest.mark.parametrize(("precision", "kind"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
@pytest.mark.parametrize("fold_bn", [True, False])
def test_precision_is_in_the_file(tmp_path: Path, precision: Any, kind: str, fold_bn: bool):
    model = Net()
    info = export_onnx(model, tmp_path / "net.onnx", image(), precision=precision, fold_bn=fold_bn)
    graph = onnx.load(info.path).graph
    floats = {t.data_type for t in graph.initializer} & {onnx.TensorProto.FLOAT, getattr(onnx.TensorProto, kind)}
    assert floats == {getattr(onnx.TensorProto, kind)}
    assert graph.input[0].type.tensor_type.elem_type == getattr(onnx.TensorProto, kind)
    assert model.conv.weight.dtype is torch.float32
    found = verify(model, info.path, image())
    assert found
    assert found.dtype == {"fp16": "float16", "bf16": "bfloat16"}[precision]


def test_weights_beyond_the_range_of_fp16_are_refused_by_name(tmp_path: Path):
    model = Net()
    model.conv.weight.data[0] = 1e5
    with pytest.raises(LoweringError, match=r"1 layers exceed the range of fp16: conv reaches 1e\+05"):
        export_onnx(model, tmp_path / "net.onnx", image(), precision="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [18, 22])
def test_the_opset_is_the_one_asked_for(tmp_path: Path, opset: int):
    assert export_onnx(Net(), tmp_path / "net.onnx", image(), opset=opset).opset == opset


@pytest.mark.parametrize("opset", [12, 99])
def test_an_opset_that_is_not_reached_is_an_error(tmp_path: Path, opset: int):
    with pytest.raises(LoweringError, match=f"opset {opset} is not possible"):
        export_onnx(Net(), tmp_path / "net.onnx", image(), opset=opset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (["image:0"], ["batch", 3, 6, 6]),
        (["0", "image:2=height"], ["batch", 3, "height", 6]),
        ({"image": [0, 3]}, ["batch", 3, 6, "image_3"]),
        ({"image": {0: "n"}}, ["n", 3, 6, 6]),
        (None, [2, 3, 6, 6]),
    ],
)
def test_dynamic_axes(tmp_path: Path, axes: Any, shape: list[str | int]):
    model = Net()
    info = export_onnx(model, tmp_path / "net.onnx", image(), dynamic_axes=axes)
    assert shape_of(info.path) == shape
    assert bool(verify(model, info.path, torch.randn(5, 3, 6, 6))) == (axes is not None)


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        (["scale:0"], "'scale': the inputs of forward are image"),
        (["image:4"], "it has 4 axes"),
        (["image"], "not of the form"),
        (["image:0=a b"], "not of the form"),
        (["image:1"], "axis 1 of 'image' cannot be dynamic: the model fixes its size to 3"),
    ],
)
def test_dynamic_axes_that_cannot_be_are_refused(tmp_path: Path, axes: list[str], text: str):
    with pytest.raises(LoweringError) as caught:
        export_onnx(Net(), tmp_path / "net.onnx", image(), dynamic_axes=axes)
    assert text in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_not_changed_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model = Net().train()
    model.bn.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, tmp_path / "net.onnx", image(), opset=18)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_file_holds_the_version_and_the_manifest(tmp_path: Path):
    twin = folded(Net()).model
    info = export_onnx(twin, tmp_path / "net.onnx", image())
    metadata = {entry.key: entry.value for entry in onnx.load(info.path).metadata_props}
    assert metadata["normfuse.version"]
    assert json.loads(metadata["normfuse.manifest"]) == deploy.manifest_of(twin)


def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lowering_onnx, "EXTERNAL_DATA_BYTES", 100)
    model = Net()
    info = export_onnx(model, tmp_path / "net.onnx", image())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert info.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert verify(model, info.path, image())


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0] if x.sum() > 0 else x


class NoOperator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(
    ("model", "text"), [(DataDependent(), "control flow depends on data"), (NoOperator(), "bessel_j0")]
)
def test_what_the_exporter_cannot_write_is_one_line(tmp_path: Path, model: nn.Module, text: str):
    old = tmp_path / "net.onnx"
    old.write_text("an earlier file")
    with pytest.raises(LoweringError) as caught:
        export_onnx(model, old, image())
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert old.read_text() == "an earlier file"


def test_a_missing_folder_is_an_error(tmp_path: Path):
    with pytest.raises(LoweringError, match="there is no folder"):
        export_onnx(Net(), tmp_path / "no" / "net.onnx", image())


def test_a_node_in_training_mode_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = lowering_onnx._save

    def tampered(program: Any, target: Path) -> None:
        save(program, target)
        model = onnx.load(target)
        node = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
        node.output.extend(["mean_out", "var_out"])
        onnx.save(model, target)

    monkeypatch.setattr(lowering_onnx, "_save", tampered)
    with pytest.raises(LoweringError, match="batch statistics"):
        export_onnx(Net(), tmp_path / "net.onnx", image(), fold_bn=False)
    assert list(tmp_path.iterdir()) == []


def test_the_backend_follows_the_extension(tmp_path: Path):
    assert lower(Net(), tmp_path / "NET.ONNX", image()).path.is_file()
    with pytest.raises(LoweringError, match=r"should end in \.onnx or \.engine"):
        lower(Net(), tmp_path / "net.txt", image())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package} is not installed: pip install 'normfuse\[onnx\]'"):
        lower(Net(), tmp_path / "net.onnx", image())


def test_export_folds_writes_and_verifies(tmp_path: Path):
    model = Net()
    result = export(model, tmp_path / "net.onnx", example_inputs=image(), fold=folded, num_inputs=3)
    assert isinstance(result, ExportResult)
    assert isinstance(result.report, Report)
    assert result.info.path == tmp_path / "net.onnx"
    assert result.comparison is not None
    assert result.comparison.inputs == 3
    assert isinstance(model.bn, nn.BatchNorm2d)


def test_export_runs_a_longer_batch_where_it_is_dynamic(tmp_path: Path):
    result = export(Net(), tmp_path / "net.onnx", example_inputs=image(), dynamic_axes=["0"], num_inputs=2)
    assert result.comparison is not None
    assert result.comparison.inputs == 3
    assert result.comparison.top1 == (14, 14)  # two outputs of 2 + 2 + 3 rows


def test_export_without_folding_or_verifying(tmp_path: Path):
    result = export(Net(), tmp_path / "net.onnx", example_inputs=image(), fold=folded, fold_bn=False, verify=False)
    assert (result.report, result.comparison) == (None, None)
    assert result.info.nodes["BatchNormalization"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_file_is_not_kept_and_the_layer_is_named(tmp_path: Path, precision: Any):
    old = tmp_path / "net.onnx"
    old.write_text("an earlier file")
    with pytest.raises(VerificationError) as caught:
        export(Net(), old, example_inputs=image(), fold=lambda m: folded(m, wrong=0.1), precision=precision)
    assert caught.value.comparison is not None
    assert caught.value.comparison.diverges_at == "bn"
    assert old.read_text() == "an earlier file"
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
