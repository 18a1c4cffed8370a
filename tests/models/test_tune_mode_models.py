"""Tune mode on well-known architectures: how many norms are paired, and the gradients of eval mode for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from tests.gradients import assert_same, gradients, hard_norms, set_mode

pytestmark = pytest.mark.models

MODELS = [
    ("torchvision", "resnet18", 20),
    ("torchvision", "mobilenet_v2", 52),
    ("torchvision", "mobilenet_v3_small", 34),
    ("torchvision", "densenet121", 59),
    ("torchvision", "shufflenet_v2_x0_5", 56),
    ("torchvision", "efficientnet_b0", 49),
    ("timm", "tf_efficientnet_b0", 49),
    ("timm", "mixnet_s", 49),
    ("timm", "repvgg_a0", 44),
]


def architecture(package: str, name: str, **options: Any) -> nn.Module:
    """Return an untrained network in float64; its norms hard."""
    library = pytest.importorskip(package)
    torch.manual_seed(0)
    build = library.create_model if package == "timm" else library.models.get_model
    return hard_norms(build(name, **options).double())


def images(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("package", "name", "count"), MODELS)
def test_architecture(package: str, name: str, count: int):
    """Read without an example; trained in training mode, so that dropout and dropped paths are there on both sides."""
    model = architecture(package, name)
    keys, before = list(model.state_dict()), {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = gradients(set_mode(model, True), images(32))
    report = normfuse.apply(model, ["tune-mode"], inplace=True).report
    assert sum(bool(outcome.partners) for outcome in report.norms) == count
    assert_same(expected, gradients(model.train(), images(32)))
    assert list(model.state_dict()) == keys
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_auxiliary_heads_that_only_training_runs():
    """GoogLeNet: the norms of its two auxiliary heads are paired too, which eval mode never calls."""
    model = architecture("torchvision", "googlenet", aux_logits=True, init_weights=False)
    expected = gradients(set_mode(model, True), images(32))
    assert any(name.startswith("aux1.conv") and value is not None for name, value in expected.items())
    report = normfuse.apply(model, ["tune-mode"], inplace=True).report
    assert len(report.norms) == 59
    assert all(outcome.partners for outcome in report.norms)
    assert_same(expected, gradients(model.train(), images(32)))
