"""A trained MobileNetV2 as TensorRT engines: every precision, static and dynamic, no norm among the layers.

The full matrix over four networks is ``benchmarks/engines.py``; this is the least that shows each of its claims.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from benchmarks import real_networks
from normfuse.lowering import EngineOptions, Numbers, onnx_quantize
from normfuse.lowering.engine_sidecar import Sidecar
from normfuse.lowering.onnx import export_onnx
from normfuse.lowering.profiles import Profile
from normfuse.lowering.tensorrt import build_engine

PROBLEM = real_networks.missing(real_networks.MOBILENET + real_networks.PICTURES)
pytestmark = [
    pytest.mark.models,
    pytest.mark.tensorrt,
    pytest.mark.slow,
    pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM),
]
SIDE = 96
NORMS = 52
DEPTHWISE = 17  # of the convolutions in front of them


def pictures() -> Tensor:
    return nn.functional.interpolate(real_networks.batch(), size=(SIDE, SIDE))


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    source = real_networks.mobilenet_v2()
    return source, normfuse.fold(source, example_inputs=pictures()[:1])


@pytest.fixture(scope="module")
def fp32(networks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "m.onnx"
    export_onnx(networks[1], path, pictures()[:1], dynamic_axes=["0"], runtime="tensorrt")
    return path


def built(onnx_file: Path, folder: Path, *, dynamic: bool, targets: tuple[str, ...]) -> Sidecar:
    shape = (3, SIDE, SIDE)
    profile = {"x": Profile((1, *shape), (1, *shape), (8, *shape))} if dynamic else {}
    info = build_engine(onnx_file, folder / "m.engine", options=EngineOptions(targets=targets), profiles=profile)
    return info.sidecar


def check(sidecar: Sidecar, kind: str) -> None:
    assert set(sidecar.dtypes.values()) == {kind}
    assert sidecar.norm_layers == []
    assert sidecar.network["CONVOLUTION"] == NORMS
    assert "SCALE" not in sidecar.network
    assert "NORMALIZATION" not in sidecar.network
    assert len(sidecar.layers) > NORMS


def test_float32_of_any_batch(fp32: Path, tmp_path: Path):
    sidecar = built(fp32, tmp_path, dynamic=True, targets=("sm_86", "sm_89", "sm_120"))
    check(sidecar, "FLOAT")
    assert sidecar.shapes["x"][2][0] == 8


@pytest.mark.parametrize(("precision", "kind"), [("fp16", "HALF"), ("bf16", "BF16")])
def test_narrow_types_of_one_batch(networks: Any, tmp_path: Path, precision: Any, kind: str):
    export_onnx(networks[1], tmp_path / "m.onnx", pictures()[:1], precision=precision, runtime="tensorrt")
    check(built(tmp_path / "m.onnx", tmp_path, dynamic=False, targets=("sm_86", "sm_120")), kind)


@pytest.mark.parametrize(("precision", "targets"), [("int8", ("sm_86", "sm_120")), ("fp8", ("sm_89", "sm_120"))])
def test_quantized_of_any_batch(fp32: Path, tmp_path: Path, precision: Any, targets: tuple[str, ...]):
    path = tmp_path / "m.onnx"
    shutil.copy(fp32, path)
    data = [{"x": picture[None]} for picture in pictures()]
    onnx_quantize.quantize_file(path, data, Numbers(precision, calibration=pictures(), qdq="tensorrt"))
    sidecar = built(path, tmp_path, dynamic=True, targets=targets)
    check(sidecar, "FLOAT")
    assert sidecar.network["DEQUANTIZE"] == 2 * (NORMS - DEPTHWISE if precision == "fp8" else NORMS)


def test_unfolded_the_norms_are_in_the_layers(networks: Any, tmp_path: Path):
    export_onnx(networks[0], tmp_path / "m.onnx", pictures()[:1], fold_bn=False, runtime="tensorrt")
    sidecar = built(tmp_path / "m.onnx", tmp_path, dynamic=False, targets=("sm_86",))
    assert sidecar.network["SCALE"] == NORMS
    assert len({norm for layer in sidecar.norm_layers for norm in layer["norms"]}) == NORMS
