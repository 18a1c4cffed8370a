"""A small valid file of every format that normfuse reads, and how it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import normfuse
from normfuse.cli import calibration_data
from normfuse.cli.arrays import read_arrays
from normfuse.lowering.engine_sidecar import Sidecar, read_sidecar


@dataclass(frozen=True)
class Sample:
    """One format.

    Attributes:
        name: The name of the file.
        write: Writes it into a folder.
        read: Reads it, and returns its tensors by name.
        guarded: Whether every byte of a value is covered by a checksum or digest.
        beside: The file to damage, where it is not the one that is named.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], dict[str, Tensor]]
    guarded: bool = False
    beside: str | None = None


def network() -> nn.Sequential:
    """Return a network of three layers, with values of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    nn.init.normal_(model[1].running_mean)
    return model


def folded() -> nn.Module:
    """Return it folded."""
    return normfuse.fold(network(), example_inputs=torch.ones(1, 3, 5, 5))


def _of_module(path: Path) -> dict[str, Tensor]:
    return dict(normfuse.load(path).state_dict())


def _of_architecture(path: Path) -> dict[str, Tensor]:
    return dict(normfuse.load(path, model=network()).state_dict())


def _of_arrays(path: Path) -> dict[str, Tensor]:
    arrays = read_arrays(path)
    if isinstance(arrays, Tensor):
        return {"": arrays}
    items = arrays.items() if isinstance(arrays, dict) else enumerate(arrays)
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _of_calibration(path: Path) -> dict[str, Tensor]:
    batches = calibration_data.read(path, nn.Identity(), batch_size=2, limit=100)
    return {str(index): batch for index, batch in enumerate(batches) if isinstance(batch, Tensor)}


def _of_onnx(path: Path) -> dict[str, Tensor]:
    from onnx import numpy_helper

    from normfuse.lowering.onnx_fold import fold_onnx

    proto = fold_onnx(path).to_proto()
    return {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in proto.graph.initializer}


def _write_onnx(path: Path, *, external: bool) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    state = {name: value.numpy() for name, value in network().state_dict().items() if value.dim()}
    conv = helper.make_node("Conv", ["x", "0.weight", "0.bias"], ["y"])
    names = [f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    norm = helper.make_node("BatchNormalization", ["y", *names], ["z"])
    shapes = {"x": [1, 3, 5, 5], "z": [1, 4, 3, 3]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    tensors = [numpy_helper.from_array(value, name) for name, value in state.items()]
    graph = helper.make_graph([conv, norm], "network", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path, save_as_external_data=external, location="m.onnx.data", size_threshold=0)


def _write_sidecar(path: Path) -> None:
    path.with_name("m.engine").write_bytes(b"engine")
    shapes = {"x": [[1, 3, 5, 5]] * 3}
    package = {"package": "tensorrt_rtx", "version": "1.7"}
    digests = ("0" * 64, "0" * 64, "0" * 64)
    made = Sidecar(package, ["sm_86"], None, "fp32", shapes, {"x": "FLOAT"}, {"z": [1]}, [], [], {}, *digests, "0.1.0")
    made.write(path)


def _of_sidecar(path: Path) -> dict[str, Tensor]:
    read_sidecar(path.with_name("m.engine"))
    return {}


def _write_exported(path: Path) -> None:
    torch.export.save(torch.export.export(network(), (torch.ones(1, 3, 5, 5),)), path)


def _save_state(path: Path) -> None:
    torch.save(network().state_dict(), path)


def _arrays() -> numpy.ndarray[Any, Any]:
    return numpy.arange(48, dtype=numpy.float32).reshape(4, 3, 2, 2)


SAMPLES = {
    "pickled": Sample("m.pt", lambda path: torch.save(network(), path), _of_module, guarded=True),
    "legacy": Sample(
        "m.pt", lambda path: torch.save(network(), path, _use_new_zipfile_serialization=False), _of_module
    ),
    "state dict": Sample("m.pt", _save_state, _of_architecture, guarded=True),
    "folded": Sample("m.pt", lambda path: normfuse.save(folded(), path), _of_module, guarded=True),
    "folded, with architecture": Sample(
        "m.pt", lambda path: normfuse.save(folded(), path, arch="tests.damaged.samples:network"), _of_architecture, True
    ),
    "safetensors": Sample("m.safetensors", lambda path: normfuse.save(folded(), path), _of_architecture, guarded=True),
    "exported": Sample("m.pt2", _write_exported, _of_module),
    "onnx": Sample("m.onnx", lambda path: _write_onnx(path, external=False), _of_onnx),
    "onnx, external": Sample("m.onnx", lambda path: _write_onnx(path, external=True), _of_onnx),
    "external data": Sample("m.onnx", lambda path: _write_onnx(path, external=True), _of_onnx, beside="m.onnx.data"),
    "sidecar": Sample("m.engine.json", _write_sidecar, _of_sidecar),
    "npz": Sample("x.npz", lambda path: numpy.savez(path, _arrays()), _of_arrays, guarded=True),
    "npy": Sample("x.npy", lambda path: numpy.save(path, _arrays()), _of_arrays),
    "calibration": Sample("x.pt", lambda path: torch.save(torch.from_numpy(_arrays()), path), _of_calibration, True),
}


def write_manifest(path: Path, manifest: Any) -> None:
    """Replace the manifest of a folded file by another JSON value."""
    from normfuse.saving import FOLDED_KEY

    entries = torch.load(path, weights_only=True)
    torch.save({**entries, FOLDED_KEY: json.dumps(manifest)}, path)
