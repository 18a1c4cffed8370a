"""Engines built for real, ahead of time, where tensorrt_rtx is installed; no GPU is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import normfuse
from normfuse.errors import LoadError, LoweringError, MissingDependencyError
from normfuse.lowering import EngineOptions, Numbers, export, tensorrt
from normfuse.lowering.engine_sidecar import read_sidecar, sha256
from normfuse.lowering.onnx import export_onnx
from normfuse.lowering.profiles import Profile, ShapeRequest
from normfuse.lowering.tensorrt import build_engine
from normfuse.lowering.tensorrt_run import open_engine
from normfuse.verify import verify

pytestmark = pytest.mark.tensorrt
TARGETS = ("sm_86", "sm_89")
SHAPES = ShapeRequest({None: (1, 3, 8, 8)}, {}, {None: (4, 3, 8, 8)})


class Net(nn.Module):
    """A norm that folds and one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)
        self.bn.running_mean, self.bn.running_var = torch.randn(8), torch.rand(8) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ONNX files: folded, with its norms as nodes, and folded with a batch of any size."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("onnx"), Net().eval()
    folded = normfuse.fold(model, example_inputs=image())
    export_onnx(folded, folder / "folded.onnx", image(), runtime="tensorrt")
    export_onnx(model, folder / "unfolded.onnx", image(), runtime="tensorrt", fold_bn=False)
    export_onnx(folded, folder / "dynamic.onnx", image(), runtime="tensorrt", dynamic_axes=["0"])
    return folder


def test_an_engine_its_description_and_its_log_are_written_together(files: Path, tmp_path: Path):
    info = build_engine(files / "folded.onnx", tmp_path / "x.engine", options=EngineOptions(targets=TARGETS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.engine", "x.engine.json", "x.engine.log"]
    sidecar = read_sidecar(tmp_path / "x.engine")
    assert sidecar == info.sidecar
    assert sidecar.tensorrt["package"] == "tensorrt_rtx"
    assert sidecar.target == list(TARGETS)
    assert sidecar.shapes == {"x": [[2, 3, 8, 8]] * 3}
    assert set(sidecar.dtypes.values()) == {"FLOAT"}
    assert sidecar.source_sha256 == sidecar.onnx_sha256 == sha256(files / "folded.onnx")
    sidecar.require_file(tmp_path / "x.engine")
    assert "[VERBOSE]" in (tmp_path / "x.engine.log").read_text()
    assert any("has not run" in note for note in info.notes)


def test_the_layers_say_which_norms_are_left(files: Path, tmp_path: Path):
    folded, unfolded = (
        build_engine(
            files / f"{name}.onnx", tmp_path / f"{name}.engine", options=EngineOptions(targets=TARGETS)
        ).sidecar
        for name in ("folded", "unfolded")
    )

    def left(layers: list[dict[str, Any]]) -> set[str]:
        return {norm for layer in layers for norm in layer["norms"]}

    assert left(folded.norm_layers) == {"norm"}
    assert left(unfolded.norm_layers) == {"norm", "bn"}
    assert (folded.network.get("SCALE"), unfolded.network.get("SCALE")) == (None, 1)  # what BatchNormalization becomes
    assert folded.network["NORMALIZATION"] == 1


def test_a_profile_gives_the_shapes(files: Path, tmp_path: Path):
    profiles = {"x": Profile((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}
    info = build_engine(files / "dynamic.onnx", tmp_path / "x.engine", profiles=profiles)
    assert info.sidecar.shapes == {"x": [[1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8]]}
    assert info.sidecar.outputs == {next(iter(info.sidecar.outputs)): [-1, 4]}
    assert info.sidecar.target == []


@pytest.mark.parametrize("profiles", [{}, {"y": Profile((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}])
def test_a_wrong_profile_is_one_line(files: Path, tmp_path: Path, profiles: dict[str, Profile]):
    with pytest.raises(LoweringError, match=r"the profile does not fit the inputs \(x:-1x3x8x8, -1 is any size\)"):
        build_engine(files / "dynamic.onnx", tmp_path / "x.engine", profiles=profiles)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "kind"), [("fp16", "HALF"), ("mixed", "HALF"), ("int8", "FLOAT")])
def test_export_to_an_engine_in_one_call(tmp_path: Path, precision: Any, kind: str):
    model = Net().eval()
    numbers = Numbers(precision, calibration=[image() for _ in range(2)], qdq="tensorrt")
    options = EngineOptions(targets=TARGETS, shapes=SHAPES, keep_onnx=True)
    result = export(
        model,
        tmp_path / "x.engine",
        example_inputs=image(),
        fold=lambda m: normfuse.apply(m, ["fold-bn"], example_inputs=image()),
        precision=numbers,
        engine=options,
        num_inputs=2,
    )
    assert result.comparison
    assert result.engine is not None
    assert result.engine.path == tmp_path / "x.engine"
    sidecar = read_sidecar(tmp_path / "x.engine")
    assert sidecar.precision == precision
    assert sidecar.dtypes["x"] == kind
    assert [len(layer["norms"]) for layer in sidecar.norm_layers] == [1] * len(sidecar.norm_layers)
    assert verify(model, tmp_path / "x.onnx", image()) or precision == "int8"
    assert sha256(tmp_path / "x.onnx") == sidecar.onnx_sha256


def test_the_public_function_builds_an_engine(tmp_path: Path):
    options = EngineOptions(targets=("sm_120",))
    normfuse.export(Net().eval(), tmp_path / "x.engine", example_inputs=image(), engine=options, verify=False)
    assert read_sidecar(tmp_path / "x.engine").target == ["sm_120"]


# refusals


def test_fp8_is_refused_for_a_gpu_without_it(tmp_path: Path):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    weight = onnx.numpy_helper.from_array(torch.randn(4, 4).numpy(), "w")
    scale = onnx.numpy_helper.from_array(torch.tensor(0.1).numpy(), "s")
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0])
    nodes = [
        node
        for name in ("x", "w")
        for node in (
            helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}q"]),
            helper.make_node("DequantizeLinear", [f"{name}q", "s", "z"], [f"{name}d"]),
        )
    ]
    nodes.append(helper.make_node("MatMul", ["xd", "wd"], ["y"]))
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight, scale, zero])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    assert build_engine(tmp_path / "m.onnx", tmp_path / "x.engine", options=EngineOptions(targets=("sm_89",)))
    with pytest.raises(
        LoweringError, match="fp8_e4m3 is not for sm86: leave these targets out, or use --precision int8"
    ):
        build_engine(tmp_path / "m.onnx", tmp_path / "y.engine", options=EngineOptions(targets=("sm_86",)))
    assert not list(tmp_path.glob("y.*"))


def test_an_unsupported_operator_is_named_and_the_log_is_kept(tmp_path: Path):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Fancy", ["x"], ["y"], "odd", domain="mine")], "g", values[:1], values[1:]
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports), tmp_path / "m.onnx")
    with pytest.raises(LoweringError, match=r"TensorRT cannot take Fancy \(odd\): it has no such operator"):
        build_engine(tmp_path / "m.onnx", tmp_path / "x.engine")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_file_that_is_no_model_is_an_error_with_its_log(tmp_path: Path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(LoweringError, match=r"TensorRT cannot take the file: .*the whole log is in ") as caught:
        build_engine(tmp_path / "m.onnx", tmp_path / "x.engine")
    log = Path(str(caught.value).rpartition("the whole log is in ")[2])
    assert log.read_text()
    log.unlink()


def test_a_target_that_the_package_does_not_know(files: Path, tmp_path: Path):
    with pytest.raises(LoweringError, match="no target sm_12: tensorrt_rtx has sm_75, sm_80, sm_86, sm_89"):
        build_engine(files / "folded.onnx", tmp_path / "x.engine", options=EngineOptions(targets=("sm_12",)))


def test_a_build_that_crashes_is_an_error(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "crash.py"
    script.write_text("import os; os.abort()")
    monkeypatch.setattr(tensorrt, "SCRIPT", script)
    with pytest.raises(LoweringError, match="TensorRT ended with code -6"):
        build_engine(files / "folded.onnx", tmp_path / "x.engine")
    assert [path.name for path in tmp_path.iterdir()] == ["crash.py"]


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensorrt, "installed", lambda: ("tensorrt_rtx",))
    with pytest.raises(MissingDependencyError, match="tensorrt is not installed: pip install tensorrt"):
        tensorrt.choose(EngineOptions(package="tensorrt"))
    monkeypatch.setattr(tensorrt, "installed", lambda: ())
    with pytest.raises(MissingDependencyError, match=r"pip install 'normfuse\[tensorrt\]'"):
        tensorrt.choose(EngineOptions())
    with pytest.raises(ValueError, match="'trt' is not one of tensorrt_rtx, tensorrt"):
        EngineOptions(package="trt")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({}, MissingDependencyError, "runs on an NVIDIA GPU, and none can be used here"),
        (
            {"tensorrt": {"package": "tensorrt_rtx", "version": "0.9"}},
            LoadError,
            r"built by tensorrt_rtx 0\.9, this is",
        ),
        ({"tensorrt": {"package": "tensorrt_lean_x", "version": "1"}}, LoadError, "a package that builds no engines"),
        ({"tensorrt": {"package": "os", "version": "1"}}, LoadError, "a package that builds no engines"),
        ({"engine_sha256": "0"}, LoadError, "or damaged"),
    ],
)
def test_an_engine_that_cannot_run_here(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], kind: Any, text: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build_engine(files / "folded.onnx", tmp_path / "x.engine", options=EngineOptions(targets=("sm_86",)))
    description = tmp_path / "x.engine.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | change))
    with pytest.raises(kind, match=text):
        open_engine(tmp_path / "x.engine")


def test_an_engine_for_another_gpu_is_refused_before_tensorrt_sees_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    build_engine(files / "folded.onnx", tmp_path / "x.engine", options=EngineOptions(targets=("sm_86",)))
    with pytest.raises(LoadError, match=r"built for sm_86, this is sm_90 \(H200\): rebuild it with --target sm_90"):
        verify(Net(), tmp_path / "x.engine", image())


def test_the_build_starts_without_normfuse_and_torch():
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='x'); print({'normfuse', 'torch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code, tensorrt.SCRIPT], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
