"""L1 norms in ONNX files: as functions of the model, and inlined as plain nodes; ONNX Runtime gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import lowering
from normfuse.layers import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d, L1LayerNorm, L1RMSNorm
from normfuse.lowering import onnxruntime as backend
from normfuse.lowering.onnx import export_onnx
from normfuse.lowering.onnx_functions import DOMAIN, FUNCTIONS
from tests.parity import error, outputs

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "layer": (lambda: L1LayerNorm(6), (2, 3, 6)),
    "layer, gaussian": (lambda: L1LayerNorm(6, eps=0.1, gaussian=True), (2, 3, 6)),
    "layer, two axes": (lambda: L1LayerNorm((3, 6)), (2, 3, 6)),
    "layer, no shift": (lambda: L1LayerNorm(6, bias=False), (4, 6)),
    "layer, no gain": (lambda: L1LayerNorm(6, elementwise_affine=False), (4, 6)),
    "rms": (lambda: L1RMSNorm(6), (2, 3, 6)),
    "rms, shift": (lambda: L1RMSNorm(6, bias=True, gaussian=True), (2, 3, 6)),
    "rms, no gain": (lambda: L1RMSNorm(6, elementwise_affine=False), (4, 6)),
    "batch 1d": (lambda: L1BatchNorm1d(6, eps=0.1), (4, 6)),
    "batch 1d, length": (lambda: L1BatchNorm1d(3, gaussian=True), (4, 3, 6)),
    "batch 2d": (lambda: L1BatchNorm2d(3), (2, 3, 4, 5)),
    "batch 3d, no gain": (lambda: L1BatchNorm3d(3, affine=False), (2, 3, 2, 4, 5)),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, value in enumerate((*model.parameters(), *model.buffers())):
            if value.is_floating_point():
                value.copy_(randn(*value.shape, seed=i).abs() if i > 1 else randn(*value.shape, seed=i))
    return model.eval()


def written(model: nn.Module, x: Tensor, path: Path, **options: Any) -> tuple[onnx.ModelProto, lowering.OnnxInfo]:
    info = export_onnx(model, path, x, **options)
    return onnx.load(path), info


def run(path: Path, x: Tensor) -> Tensor:
    session = backend.session(path)
    return backend.run(session, {session.get_inputs()[0].name: x})[0]


class All(nn.Module):
    """Every case on an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([randomised(make()) for make, _ in CASES.values()])

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(norm(x) for norm, x in zip(self.norms, inputs, strict=True))


@pytest.mark.parametrize("functions", [True, False])
def test_every_form_gives_the_same_numbers(functions: bool, tmp_path: Path):
    model, inputs = All().eval(), tuple(randn(*shape) for _, shape in CASES.values())
    path = tmp_path / "m.onnx"
    export_onnx(model, path, inputs, norm_functions=functions)
    file, session = onnx.load(path), backend.session(path)
    kinds = [n.op_type for n in file.graph.node if n.domain == DOMAIN]
    expected = ["L1BatchNorm" if "Batch" in type(norm).__name__ else type(norm).__name__ for norm in model.norms]
    assert sorted(kinds) == (sorted(expected) if functions else [])
    assert sorted(f.name for f in file.functions) == sorted(set(kinds))
    if functions:
        assert [n.op_type for n in file.graph.node if n.domain != DOMAIN] == ["Add"]  # the shift of an L1RMSNorm
    found = backend.run(session, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True)))
    for name, one, other in zip(CASES, outputs(model, inputs), found, strict=True):
        assert error(one, other) < 1e-6, name


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), L1BatchNorm2d(4), nn.GELU(), nn.Flatten(2), L1LayerNorm(16), nn.Linear(16, 8)]
    return randomised(nn.Sequential(*layers, L1RMSNorm(8), nn.Linear(8, 8), L1LayerNorm(8), nn.Linear(8, 2)))


@pytest.mark.parametrize(("opset", "fold_bn"), [(None, False), (18, True), (23, True)])
def test_any_opset_holds_each_body_once(opset: int | None, fold_bn: bool, tmp_path: Path):
    model, x = network(), randn(2, 3, 6, 6)
    file, info = written(model, x, tmp_path / "m.onnx", norm_functions=True, opset=opset, fold_bn=fold_bn)
    assert sorted(f.name for f in file.functions) == sorted(FUNCTIONS)
    assert {entry.version for f in file.functions for entry in f.opset_import} == {info.opset}
    assert [n.op_type for n in file.graph.node if n.domain == DOMAIN].count("L1LayerNorm") == 2
    assert error(outputs(model, x)[0], run(tmp_path / "m.onnx", x)) < 1e-5


def test_any_size_of_batch(tmp_path: Path):
    model, path = network(), tmp_path / "m.onnx"
    export_onnx(model, path, randn(2, 3, 6, 6), norm_functions=True, dynamic_axes={"input": [0]})
    x = randn(5, 3, 6, 6, seed=3)
    assert error(outputs(model, x)[0], run(path, x)) < 1e-5


@pytest.mark.parametrize(("precision", "functions"), [("fp16", True), ("fp16", False), ("bf16", True)])
def test_statistics_stay_in_single_precision(precision: Any, functions: bool, tmp_path: Path):
    """Sums of these inputs overflow float16: the export verifies what it wrote."""
    model = randomised(nn.Sequential(L1LayerNorm(300), nn.Linear(300, 4)))
    x = randn(4, 300) * 500 + 2000
    options = {"precision": precision, "norm_functions": functions}
    result = lowering.export(model, tmp_path / "m.onnx", example_inputs=x, **options)
    assert result.comparison
    assert bool(onnx.load(tmp_path / "m.onnx").functions) is functions


def test_folded_and_verified(tmp_path: Path):
    """The BatchNorm goes, and gains leave the norms that stay."""
    model, x = network(), randn(2, 3, 6, 6)
    normfuse.export(model, tmp_path / "m.onnx", example_inputs=x, norm_functions=True)
    file = onnx.load(tmp_path / "m.onnx")
    assert sorted(f.name for f in file.functions) == ["L1LayerNorm", "L1RMSNorm"]
    assert error(outputs(model, x)[0], run(tmp_path / "m.onnx", x)) < 1e-4


def test_model_is_left_as_it_was(tmp_path: Path):
    model, x = network(), randn(2, 3, 6, 6)
    before = outputs(model, x)[0]
    export_onnx(model, tmp_path / "m.onnx", x, norm_functions=True)
    assert torch.equal(outputs(model, x)[0], before)
    assert not any("forward" in vars(module) for module in model.modules())


class Louder(L1LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_subclass_with_another_forward_is_written_as_it_is(tmp_path: Path):
    model, x = randomised(Louder(6)), randn(3, 6)
    file, _ = written(model, x, tmp_path / "m.onnx", norm_functions=True)
    assert not file.functions
    assert error(outputs(model, x)[0], run(tmp_path / "m.onnx", x)) < 1e-6
