"""Trained networks from installed packages, and how many norms of well-known architectures fold."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from benchmarks import real_networks
from normfuse import Reason, Report, Status
from tests.parity import assert_parity, outputs, randomize_norms

pytestmark = pytest.mark.models

TRAINED_ERROR = 1e-9  # relative to the largest output, in float64


def needs(packages: tuple[str, ...]) -> pytest.MarkDecorator:
    problem = real_networks.missing(packages)
    return pytest.mark.skipif(bool(problem), reason=problem)


def folded_count(report: Report) -> str:
    return f"{sum(outcome.status is Status.APPLIED for outcome in report.norms)} of {len(report.norms)}"


@functools.cache
def pictures() -> Tensor:
    return real_networks.batch()


TRAINED = [
    pytest.param(real_networks.efficientnet_lite0, "49 of 49", id="lite0", marks=needs(real_networks.LITE0)),
    pytest.param(real_networks.mobilenet_v2, "52 of 52", id="mobilenet_v2", marks=needs(real_networks.MOBILENET)),
]


@needs(real_networks.PICTURES)
@pytest.mark.parametrize(("build", "count"), TRAINED)
class TestTrainedOnImages:
    def test_every_norm_folds_without_an_example(self, build, count):
        assert folded_count(normfuse.inspect(build())) == count

    def test_same_function_in_double(self, build, count):
        source, images = build().double(), pictures()[:1].double()
        result = normfuse.apply(source, normfuse.api.EXACT_PASSES, example_inputs=images)
        assert folded_count(result.report) == count
        assert not any(isinstance(module, nn.BatchNorm2d) for module in result.model.modules())
        assert_parity(source, result.model, images, tolerance=TRAINED_ERROR)

    def test_float32_verifies_on_pictures(self, build, count):
        source = build()
        folded = normfuse.fold(source, example_inputs=pictures()[:1])
        comparison = normfuse.verify(source, folded, pictures())
        assert comparison, comparison
        assert comparison.judge == "float64"
        assert comparison.top1 == (5, 5)


@needs(real_networks.LITE0)
@needs(real_networks.PICTURES)
def test_lite0_still_sees_what_the_pictures_show():
    folded = normfuse.fold(real_networks.efficientnet_lite0(), example_inputs=pictures()[:1])
    (logits,) = outputs(folded, pictures())
    assert logits.argmax(1).tolist() == list(real_networks.PICTURE_CLASSES.values())


@needs(real_networks.MOBILENET)
@needs(real_networks.PICTURES)
def test_mobilenet_keeps_the_embedding():
    source = real_networks.mobilenet_v2()
    folded = normfuse.fold(source, example_inputs=pictures()[:1])
    (before,), (after,) = outputs(source, pictures()), outputs(folded, pictures())
    assert torch.cosine_similarity(before, after).min() > 1 - 1e-6
    between = [torch.cosine_similarity(vectors[:1], vectors[1:]) for vectors in (before, after)]
    torch.testing.assert_close(*between, rtol=0, atol=1e-5)
    assert between[1].max() < 0.9, "five different pictures"


@needs(real_networks.CREPE)
class TestCrepe:
    """Pad, convolution, ReLU, norm, max-pool, six times; then a linear layer.

    Backwards a norm meets the ReLU, which lets a positive scale pass but no shift. Forwards the max-pool lets it pass,
    every gain being positive. Behind it, norms 1 to 5 meet a pad with zeros that their shift would have to change;
    nothing is between norm 6 and the linear layer but a permutation and a reshape.
    """

    frames = torch.randn(3, real_networks.FRAME, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    @pytest.fixture
    def source(self) -> nn.Module:
        return real_networks.crepe().double()

    def test_the_outcome_of_each_norm(self, source):
        report = normfuse.inspect(source, normfuse.api.EXACT_PASSES, example_inputs=self.frames)
        assert [o.subject for o in report.norms] == [f"conv{n}_BN" for n in range(1, 7)]
        *refused, last = report.norms
        assert (last.status, last.partners) == (Status.APPLIED, ("classifier",))
        for outcome in refused:
            assert outcome.status is Status.REFUSED
            assert outcome.refusal is not None
            assert outcome.refusal.reason is Reason.NONZERO_PADDING
            assert "relu" in outcome.refusal.detail, "why it cannot go backwards is said too"

    @pytest.mark.parametrize("number", range(1, 6))
    def test_the_reasons_are_right(self, source, number):
        """Without a shift such a norm folds backwards; with a negative gain it is the max-pool that stops it."""
        name = f"conv{number}_BN"
        norm = source.get_submodule(name)
        assert (norm.weight > 0).all()
        assert (norm.bias != norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()).any()
        with torch.no_grad():
            norm.bias.zero_()
            norm.running_mean.zero_()
        report = normfuse.inspect(source, example_inputs=self.frames)
        assert {o.subject: o.partners for o in report.norms}[name] == (f"conv{number}",)
        with torch.no_grad():
            norm.bias.fill_(0.5)
            norm.weight[0] *= -1
        report = normfuse.inspect(source, example_inputs=self.frames)
        refusal = {o.subject: o.refusal for o in report.norms}[name]
        assert refusal is not None
        assert refusal.reason is Reason.SIGN

    def test_same_function_in_double(self, source):
        folded = normfuse.fold(source, example_inputs=self.frames)
        left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
        assert left == [f"conv{n}_BN" for n in range(1, 6)]
        assert_parity(source, folded, self.frames)

    def test_a_sine_keeps_its_pitch(self):
        source, frame = real_networks.crepe(), real_networks.sine(440)
        folded = normfuse.fold(source, example_inputs=frame)
        assert normfuse.verify(source, folded, frame)
        for model in (source, folded):
            (pitches,) = outputs(model, frame)
            assert real_networks.hertz(pitches) == pytest.approx(441.5, abs=0.05)


def architecture(package: str, name: str, **options: Any) -> nn.Module:
    """Return an untrained network in float64, its norms randomised."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    module = importlib.import_module(package)
    build = module.create_model if package == "timm" else module.models.get_model
    return randomize_norms(build(name, **options), positive=True).double().eval()


@pytest.mark.parametrize(
    ("package", "name", "count"),
    [
        ("torchvision", "resnet50", "53 of 53"),
        ("timm", "efficientnet_b0", "49 of 49"),
        ("torchvision", "densenet121", "59 of 121"),
    ],
)
def test_architecture(package: str, name: str, count: str):
    source = architecture(package, name)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    result = normfuse.apply(source, ["fold-bn"], example_inputs=images)
    assert folded_count(result.report) == count
    assert_parity(source, result.model, images)


def test_detector():
    """Judged part by part: the boxes are sorted by score, and equal scores have no order."""
    options = {"weights_backbone": None, "min_size": 64, "max_size": 64}
    source = architecture("torchvision", "fasterrcnn_resnet50_fpn_v2", **options)
    images = [torch.rand(3, 64, 64, dtype=torch.float64)]
    result = normfuse.apply(source, ["fold-bn"], example_inputs=(images,))
    assert folded_count(result.report) == "65 of 65"
    for part, values in (("backbone", images[0][None]), ("roi_heads.box_head", torch.randn(2, 256, 7, 7).double())):
        assert_parity(source.get_submodule(part), result.model.get_submodule(part), values)
