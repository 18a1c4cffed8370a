"""Every layer of normfuse writes to ONNX and gives there what it gives in torch."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import normfuse
from normfuse import layers
from tests.parity import randomize_norms


def act_norm() -> nn.Module:
    norm = layers.ActNorm(4)
    norm(torch.randn(3, 4, 2, 2))
    return norm


def weighted(by: nn.Module) -> nn.Module:
    return register_parametrization(nn.Conv2d(4, 4, 1), "weight", by)


class Everything(nn.Module):
    """Each layer on an input of its own shape: ``(2, 4, 6, 6)``, ``(2, 5, 4)`` or a mask besides."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.ModuleList([
            layers.GhostBatchNorm2d(4, 2), layers.EstimatedBatchNorm2d(4), layers.OnlineNorm(4),
            layers.OnlineNorm(4, control="layer_scaling"), act_norm(), layers.IBN(4), layers.BatchChannelNorm(4, 2),
            layers.AdaptiveDeviation(4, nn.Conv2d(4, 4, 1)), layers.GDN(4), layers.GDN(4, inverse=True),
            layers.LearnedRegionNorm(3), weighted(layers.WeightStandardization()),
            weighted(layers.ScaledWeightStandardization(4)), weighted(layers.RowEquilibration()),
            weighted(layers.WeightCompander()), layers.ConstantScale(0.2),
        ])  # fmt: skip
        self.tokens = nn.ModuleList([layers.PartialRMSNorm(4, 0.5, bias=True), layers.ScaleNorm(4)])
        self.attention, self.region = layers.QKNorm(8), layers.RegionNorm(4)

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        found = [layer(images) for layer in self.images] + [layer(tokens) for layer in self.tokens]
        return [*found, *self.attention(tokens, tokens.flip(1)), self.region(images, mask)]


class Fixed(nn.Module):
    """The layers that are a fixed map, by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(layers.GhostBatchNorm2d(4, 2), layers.EstimatedBatchNorm2d(4), act_norm())

    def forward(self, images: Tensor) -> Tensor:
        return self.norms(images)


def test_layers_write_and_verify(tmp_path: Path) -> None:
    """``export`` runs the file and compares every output with a float64 run of the layers."""
    torch.manual_seed(0)
    model = randomize_norms(Everything()).eval()
    inputs = (torch.randn(2, 4, 6, 6), torch.randn(2, 5, 4), (torch.rand(2, 1, 3, 3) > 0.5).float())
    normfuse.export(model, tmp_path / "layers.onnx", example_inputs=inputs, fold_bn=False)
    file = onnx.load(tmp_path / "layers.onnx")
    assert len(file.graph.output) == 21
    assert {node.domain for node in file.graph.node} <= {""}


def test_fixed_maps_are_small(tmp_path: Path) -> None:
    model = randomize_norms(Fixed()).eval()
    normfuse.export(model, tmp_path / "fixed.onnx", example_inputs=torch.randn(2, 4, 6, 6), fold_bn=False)
    ops = {node.op_type for node in onnx.load(tmp_path / "fixed.onnx").graph.node}
    assert ops <= {"Mul", "Add", "Sub", "BatchNormalization"}
