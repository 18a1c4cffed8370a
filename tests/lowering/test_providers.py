"""Execution providers are granted as asked for, or refused with what to install; GPU ones on doubles."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from normfuse.errors import MissingDependencyError
from normfuse.lowering import onnxruntime, providers


@pytest.fixture
def model() -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def plugin(path: str) -> Any:
    module: Any = types.ModuleType(providers.PLUGIN)
    module.get_ep_name, module.get_library_path = lambda: providers.RTX, lambda: path
    return module


class Options:
    def __init__(self) -> None:
        self.devices: Any = None

    def add_provider_for_devices(self, devices: Any, settings: Any) -> None:
        self.devices = (devices, settings)


def runtime(*names: str) -> Any:
    devices = [types.SimpleNamespace(ep_name=name) for name in names]
    return types.SimpleNamespace(
        register_execution_provider_library=lambda *_args: None, get_ep_devices=lambda: devices
    )


def test_the_cpu_by_both_of_its_names(model: onnx.ModelProto):
    for name in ("cpu", "CPUExecutionProvider"):
        assert "CPUExecutionProvider" in onnxruntime.session(model, providers=[name]).get_providers()


@pytest.mark.parametrize(
    ("name", "full"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_provider_that_is_not_there_is_an_error_with_its_package(model: onnx.ModelProto, name: str, full: str):
    import onnxruntime as package

    if full in package.get_available_providers():
        pytest.skip(f"{full} is there")
    with pytest.raises(
        MissingDependencyError, match=f"{full} is not in this onnxruntime, .*pip install onnxruntime-gpu"
    ):
        onnxruntime.session(model, providers=[name, "cpu"])


def test_the_plugin_is_named_where_it_is_missing(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, providers.PLUGIN, None)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"):
        onnxruntime.session(model, providers=["tensorrt_rtx"])


def test_a_plugin_that_does_not_load(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, providers.PLUGIN, plugin(str(tmp_path / "missing.so")))
    with pytest.raises(MissingDependencyError, match="cannot be loaded, it needs the NVIDIA driver") as caught:
        onnxruntime.session(model, providers=["tensorrt_rtx"])
    assert "\n" not in str(caught.value)


def test_the_plugin_is_given_its_own_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, providers.PLUGIN, plugin("x.so"))
    options = Options()
    providers.add_rtx(runtime("CPUExecutionProvider", providers.RTX), options)
    devices, settings = options.devices
    assert ([device.ep_name for device in devices], settings) == ([providers.RTX], {})
    with pytest.raises(MissingDependencyError, match="finds no GPU"):
        providers.add_rtx(runtime("CPUExecutionProvider"), options)
