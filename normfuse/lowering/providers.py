"""Execution providers of ONNX Runtime by name, granted as asked for or refused: never another in their place."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from normfuse.errors import MissingDependencyError

CPU = "CPUExecutionProvider"
RTX = "NvTensorRTRTXExecutionProvider"
NAMES = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt_rtx": RTX,
}
PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
    RTX: "onnxruntime-ep-nv-tensorrt-rtx-cu13",
}
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


def full_names(providers: Sequence[str]) -> list[str]:
    """Return ONNX Runtime's names for providers given by these or by short ones: cpu, cuda, tensorrt, tensorrt_rtx."""
    return [NAMES.get(name, name) for name in providers]


def require_present(providers: Sequence[str], present: Sequence[str], problem: str) -> None:
    """Raise unless every provider is among those present.

    Raises:
        MissingDependencyError: One is not; the text names what has it.
    """
    for name in providers:
        if name not in present:
            advice = f": pip install {PACKAGES[name]}" if name in PACKAGES else ""
            raise MissingDependencyError(f"{name} {problem}, which has {', '.join(present)}{advice}")


def add_rtx(runtime: Any, options: Any) -> None:
    """Let the sessions of these options run on the TensorRT-RTX plugin, on the GPUs it finds.

    Raises:
        MissingDependencyError: The plugin is not installed, cannot be loaded, or finds no GPU.
    """
    try:
        plugin = importlib.import_module(PLUGIN)
    except ImportError as error:
        raise MissingDependencyError(f"{RTX} is a plugin: pip install {PACKAGES[RTX]}") from error
    try:
        runtime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "already" not in text:
            raise MissingDependencyError(f"{RTX} cannot be loaded, it needs the NVIDIA driver: {text}") from error
    devices = [device for device in runtime.get_ep_devices() if device.ep_name == RTX]
    if not devices:
        raise MissingDependencyError(f"{RTX} finds no GPU that it runs on")
    options.add_provider_for_devices(devices, {})
