"""Classic ``tensorrt``, which cannot be installed without its vendor's index: its path, on a thin double of its API.

The double has the calls that ``tensorrt`` 10 and 11 share and none of ``tensorrt_rtx``'s own. What is checked is which
calls are made and with what, not what TensorRT makes of them.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from normfuse.errors import MissingDependencyError
from normfuse.lowering import tensorrt
from normfuse.lowering.tensorrt import EngineOptions, build_engine, choose
from normfuse.lowering.tensorrt_build import Log, StageError, build


class Flag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class NoFlag(enum.IntEnum):
    PREFER_AOT_PYTHON_PLUGINS = 3


def double(flags: Any, calls: dict[str, Any], layers: list[dict[str, Any]]) -> Any:
    """Return a module with the API of classic TensorRT that notes what it is asked for."""
    dtype = types.SimpleNamespace(name="HALF")
    tensor = types.SimpleNamespace(name="x", shape=(-1, 3), dtype=dtype)
    result = types.SimpleNamespace(name="y", shape=(-1, 5), dtype=dtype)
    layer = types.SimpleNamespace(type=types.SimpleNamespace(name="CONVOLUTION"))
    network = types.SimpleNamespace(
        num_inputs=1, num_outputs=1, num_layers=1, get_input=lambda _: tensor, get_output=lambda _: result
    )
    network.get_layer = lambda _: layer

    class Config:
        profiling_verbosity = None

        def add_optimization_profile(self, profile: Any) -> int:
            calls["profile"] = profile.shapes
            return 0

        def create_timing_cache(self, old: bytes) -> Any:
            calls["old cache"] = old
            return object()

        def set_timing_cache(self, _cache: Any, ignore_mismatch: bool) -> bool:
            return not ignore_mismatch

        def get_timing_cache(self) -> Any:
            return types.SimpleNamespace(serialize=lambda: b"new cache")

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, *shapes: Any) -> None:
            self.shapes[name] = shapes

    class Builder:
        def __init__(self, _logger: Any) -> None:
            pass

        def create_network(self, value: int) -> Any:
            calls["flags"] = value
            return network

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, _network: Any, config: Config) -> bytes:
            calls["verbosity"] = config.profiling_verbosity
            return b"engine"

    class ILogger:
        pass

    inspector = types.SimpleNamespace(get_engine_information=lambda _format: json.dumps({"Layers": layers}))
    engine = types.SimpleNamespace(create_engine_inspector=lambda: inspector)
    parser = types.SimpleNamespace(parse_from_file=lambda path: calls.update(parsed=path) or True, num_errors=0)
    module: Any = types.ModuleType("tensorrt")
    vars(module).update(
        __version__="11.4",
        Builder=Builder,
        ILogger=ILogger,
        NetworkDefinitionCreationFlag=flags,
        OnnxParser=lambda _network, _logger: parser,
        ProfilingVerbosity=types.SimpleNamespace(DETAILED="detailed"),
        LayerInformationFormat=types.SimpleNamespace(JSON="json"),
        Runtime=lambda _logger: types.SimpleNamespace(deserialize_cuda_engine=lambda _blob: engine),
    )
    return module


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "old.cache").write_bytes(b"old cache")
    files = {key: str(tmp_path / key) for key in ("onnx", "engine", "log", "result", "new_timing_cache")}
    shapes = {"x": [[1, 3], [2, 3], [4, 3]]}
    return files | {"package": "tensorrt", "targets": [], "shapes": shapes, "timing_cache": str(tmp_path / "old.cache")}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")


@pytest.mark.parametrize(("flags", "value"), [(Flag, 2), (NoFlag, 0)])
@pytest.mark.usefixtures("gpu")
def test_one_build(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, flags: Any, value: int):
    calls: dict[str, Any] = {}
    layers = [{"Name": "conv", "LayerType": "CaskConvolution", "Metadata": "[ONNX Layer: node_b][ONNX Layer: node_a]"}]
    monkeypatch.setitem(sys.modules, "tensorrt", double(flags, calls, layers))
    answer = build(job, Log(job["log"]))
    assert calls["flags"] == value
    assert calls["parsed"] == job["onnx"]
    assert calls["verbosity"] == "detailed"
    assert calls["profile"] == {"x": ((1, 3), (2, 3), (4, 3))}
    assert calls["old cache"] == b"old cache"
    assert Path(job["new_timing_cache"]).read_bytes() == b"new cache"
    assert Path(job["engine"]).read_bytes() == b"engine"
    assert answer["version"] == "11.4"
    assert answer["device"] == {"name": "H200", "sm": "sm_90"}
    assert answer["layers"] == [{"name": "conv", "type": "CaskConvolution", "onnx": ["node_a", "node_b"]}]
    assert answer["network"] == {"CONVOLUTION": 1}


@pytest.mark.usefixtures("gpu")
def test_targets_that_are_not_here(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", double(Flag, {}, []))
    with pytest.raises(StageError) as caught:
        build(job | {"targets": ["sm_86"]}, Log(job["log"]))
    assert caught.value.stage == "target"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package ``tensorrt`` that a process of its own can import."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "tensorrt.py").write_text("__version__ = '11.4'\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("installed")
def test_no_driver_is_said_in_one_line(tmp_path: Path):
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(MissingDependencyError, match=r"tensorrt: no NVIDIA driver or GPU here: .*tensorrt_rtx with"):
        build_engine(tmp_path / "m.onnx", tmp_path / "x.engine", options=EngineOptions(package="tensorrt"))
    assert not list(tmp_path.glob("x.*"))


def test_a_package_that_does_not_load_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "tensorrt.py").write_text("raise OSError('libnvinfer.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(MissingDependencyError, match=r"tensorrt cannot be imported \(libnvinfer.so: cannot open"):
        build_engine(tmp_path / "m.onnx", tmp_path / "x.engine", options=EngineOptions(package="tensorrt"))


def test_which_package_builds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensorrt, "installed", lambda: ("tensorrt_rtx", "tensorrt"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose(EngineOptions()) == "tensorrt"
    assert choose(EngineOptions(targets=("sm_86",))) == "tensorrt_rtx"
    assert choose(EngineOptions(package="tensorrt_rtx")) == "tensorrt_rtx"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose(EngineOptions()) == "tensorrt_rtx"
    monkeypatch.setattr(tensorrt, "installed", lambda: ("tensorrt",))
    assert choose(EngineOptions()) == "tensorrt"
