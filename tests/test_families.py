"""Every published norm in one model: each named, with its verdict and its reason; and norms that nobody named."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import normfuse
from normfuse import api, families, layers
from normfuse.families import COMPOUNDS, FAMILIES, WEIGHTS, family_of, page
from normfuse.layers.online_norm import LayerScaling
from normfuse.norm_forms import identify
from normfuse.report import Outcome, Status
from tests.parity import assert_parity, randomize_norms

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "norms.md"
FOLDED, PART, STAYS = "folded", "part", "stays"


class BatchNormSPD(nn.Module):
    """A norm of another geometry: points are positive definite matrices."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(torch.eye(6) + x[..., :6, :6] @ x[..., :6, :6].mT).sum() * x


class PCNorm(nn.Module):
    """Amplitudes of the normalized map, phases of the input."""

    def forward(self, x: Tensor) -> Tensor:
        amplitude = torch.fft.fft2(F.layer_norm(x, x.shape[1:])).abs()
        return torch.fft.ifft2(torch.polar(amplitude, torch.fft.fft2(x).angle())).real


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(6, 18), layers.QKNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = self.norm(q, k)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


class ByHand(nn.Module):
    """A LayerNorm and an RMSNorm written out, with a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.linear = nn.Parameter(torch.ones(6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        x = self.linear(d / torch.sqrt((d * d).mean(-1, keepdim=True) + 1e-5) * self.gain)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def act_norm() -> layers.ActNorm:
    norm = layers.ActNorm(6)
    norm(torch.randn(3, 6, 4, 4))
    return norm


def image_norms() -> dict[str, tuple[nn.Module, str, str]]:
    """Layers over ``(N, 6, H, W)``, with what becomes of them and what the reason says."""
    from timm.layers import evo_norm

    own = "sample"
    return {
        "batch": (nn.BatchNorm2d(6), FOLDED, ""),
        "ghost": (layers.GhostBatchNorm2d(6, 2), FOLDED, ""),
        "estimated": (layers.EstimatedBatchNorm2d(6), FOLDED, ""),
        "l1": (layers.L1BatchNorm2d(6), FOLDED, ""),
        "unified": (layers.UnifiedNorm(6, dim=1), FOLDED, ""),
        "act": (act_norm(), FOLDED, ""),
        "online": (layers.OnlineNorm(6), FOLDED, ""),
        "tracked": (nn.InstanceNorm2d(6, track_running_stats=True), FOLDED, ""),
        "untracked": (nn.BatchNorm2d(6, track_running_stats=False), STAYS, "no running statistics"),
        "power": (layers.PowerNorm(6, dim=1, group_scaling=2), PART, "root mean square, and stays"),
        "instance": (nn.InstanceNorm2d(6), STAYS, own),
        "instance_affine": (nn.InstanceNorm2d(6, affine=True), PART, ""),
        "group": (nn.GroupNorm(2, 6, affine=False), STAYS, own),
        "group_affine": (nn.GroupNorm(2, 6), PART, ""),
        "evo_b": (evo_norm.EvoNorm2dB0(6), PART, ""),
        "evo_s": (evo_norm.EvoNorm2dS0(6, group_size=3), PART, ""),
        "gdn": (layers.GDN(6), STAYS, "GDN, which divides each channel by a sum over the others"),
        "region": (layers.LearnedRegionNorm(3), STAYS, "from the batch"),
        "response": (nn.LocalResponseNorm(3), STAYS, "response normalization"),
        "phase": (PCNorm(), STAYS, "frequency domain"),
        "spd": (BatchNormSPD(), STAYS, "points of a manifold"),
        "scaling": (LayerScaling(), STAYS, "layer scaling, which divides each sample"),
        "selu": (nn.SELU(), "", ""),
    }


def of_transformers(model: str, name: str, size: int) -> nn.Module:
    """Return a norm of ``transformers``; what that package imports warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)(size)


def token_norms() -> dict[str, tuple[nn.Module, str, str]]:
    """Layers over ``(N, T, 6)``."""
    return {
        "layer": (nn.LayerNorm(6, elementwise_affine=False), STAYS, "LayerNorm, eps inside the root"),
        "layer_affine": (nn.LayerNorm(6), PART, ""),
        "l1_layer": (layers.L1LayerNorm(6), PART, ""),
        "rms": (nn.RMSNorm(6, elementwise_affine=False), STAYS, "RMSNorm, eps inside the root"),
        "llama": (of_transformers("llama", "LlamaRMSNorm", 6), PART, ""),
        "gemma": (of_transformers("gemma", "GemmaRMSNorm", 6), PART, ""),
        "t5": (of_transformers("t5", "T5LayerNorm", 6), PART, ""),
        "prms": (layers.PartialRMSNorm(6, 0.5), PART, ""),
        "scale": (layers.ScaleNorm(6), PART, ""),
        "attention": (Attention(), STAYS, "QKNorm, which divides each query and key"),
        "by_hand": (ByHand(), PART, ""),
    }


class Everything(nn.Module):
    """One branch for each norm: a layer, the norm, a layer."""

    def __init__(self) -> None:
        super().__init__()
        images, tokens = image_norms(), token_norms()
        images |= {"ibn": (layers.IBN(6), "", ""), "bcn": (layers.BatchChannelNorm(6, 3), "", "")}
        images |= {"adq": (layers.AdaptiveDeviation(6, nn.Conv2d(6, 6, 1)), "", "")}
        for name, (norm, _, _) in images.items():
            self.add_module(name, nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 2, 1)))
        for name, (norm, _, _) in tokens.items():
            self.add_module(name, nn.Sequential(nn.Linear(3, 6), norm, nn.Linear(6, 2)))
        self.images, self.tokens = list(images), list(tokens)
        self.region_mask = nn.ModuleList([nn.Conv2d(3, 6, 3), layers.RegionNorm(6)])
        self.weights = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 1)),
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1)),
            register_parametrization(nn.Conv2d(6, 6, 1), "weight", layers.WeightStandardization()),
            register_parametrization(nn.Conv2d(6, 6, 1), "weight", layers.ScaledWeightStandardization(6)),
            register_parametrization(nn.Conv2d(6, 6, 1), "weight", layers.RowEquilibration()),
        )

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        found = [self.get_submodule(name)(images) for name in self.images]
        found += [self.get_submodule(name)(tokens) for name in self.tokens]
        conv, norm = self.region_mask
        return [*found, norm(conv(images), mask), self.weights(images)]


@pytest.fixture(scope="module")
def everything() -> tuple[Everything, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Everything()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gdn" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    randomize_norms(model)
    inputs = (torch.randn(4, 3, 8, 8), torch.randn(4, 5, 3), (torch.rand(4, 1, 6, 6) > 0.5).float())
    return model.double().eval(), tuple(value.double() for value in inputs)


@pytest.fixture(scope="module")
def report(everything: tuple[Everything, tuple[Tensor, ...]]) -> normfuse.Report:
    model, inputs = everything
    return normfuse.inspect(model, api.EXACT_PASSES, example_inputs=inputs)


def of(report: normfuse.Report, branch: str) -> list[Outcome]:
    return [o for o in report.norms if o.subject.split(".")[0].split(":")[0] == branch]


def verdict(outcome: Outcome) -> str:
    if outcome.status is not Status.APPLIED:
        return STAYS
    return PART if outcome.remains else FOLDED


def test_verdict_and_reason(report: normfuse.Report):
    for branch, (norm, expected, reason) in (image_norms() | token_norms()).items():
        outcomes = of(report, branch)
        if not expected:
            assert outcomes == [], branch
            continue
        first = outcomes[0]
        holds = isinstance(norm, layers.OnlineNorm | Attention | ByHand)
        assert holds or (first.subject, first.layer) == (f"{branch}.1", type(norm).__name__)
        assert (verdict(first), reason in str(first.refusal or "")) == (expected, True), first


def test_nothing_is_left_out_or_twice(report: normfuse.Report):
    subjects = [o.subject for o in report.norms]
    assert len(subjects) == len(set(subjects))
    assert not report.not_reached
    silent = [o for o in report.norms if o.status is not Status.APPLIED and o.refusal is None]
    assert silent == []
    unknown = [o for o in report.norms if o.refusal and "no rule knows" in o.refusal.detail]
    assert unknown == []


def test_compounds(report: normfuse.Report):
    found = {o.subject: (o.layer, verdict(o)) for o in report.norms}
    assert found["ibn.1.BN"] == ("BatchNorm2d", FOLDED)
    assert found["ibn.1.IN"] == ("InstanceNorm2d", PART)
    assert found["bcn.1.bn"] == ("BatchNorm2d", FOLDED)
    assert found["bcn.1.channel"] == ("ChannelGroupNorm", PART)
    assert found["adq.1.bn"] == ("BatchNorm2d", FOLDED)
    assert found["online.1.core"] == ("OnlineNormCore", FOLDED)
    assert found["by_hand.1:LayerNorm"] == ("LayerNorm, written out", PART)
    assert found["by_hand.1:RMSNorm"] == ("RMSNorm, written out", STAYS)


def test_weights(report: normfuse.Report):
    found = {o.subject: (o.layer, o.status) for o in report.outcomes if o.subject.startswith("weights.")}
    makers = ("WeightNorm", "SpectralNorm", "WeightStandardization", "ScaledWeightStandardization", "RowEquilibration")
    assert found == {f"weights.{i}.weight": (maker, Status.APPLIED) for i, maker in enumerate(makers)}


def test_region_norm_warns_of_its_batch(report: normfuse.Report):
    names = [note.split(" ")[0] for note in report.notes if "from the batch, also in eval mode" in note]
    assert names == ["region.1", "region_mask.1"]


def test_function_stays(everything: tuple[Everything, tuple[Tensor, ...]]):
    """Classes of transformers compute in float32, whatever they are given."""
    model, inputs = everything
    result = normfuse.apply(model, api.EXACT_PASSES, example_inputs=inputs)
    assert_parity(model, result.model, inputs, tolerance=1e-5)


# recognition by what is computed


def forms() -> dict[str, tuple[nn.Module, str]]:
    from timm.layers.norm import LayerNorm2d, RmsNorm

    return {
        "torch": (nn.RMSNorm(8), "RMSNorm, eps inside the root"),
        "timm": (RmsNorm(8), "RMSNorm, eps inside the root"),
        "timm2d": (LayerNorm2d(8), "LayerNorm, eps inside the root"),
        "llama": (of_transformers("llama", "LlamaRMSNorm", 8), "RMSNorm, eps inside the root"),
        "gemma": (of_transformers("gemma", "GemmaRMSNorm", 8), "RMSNorm, eps inside the root, gain 1 + weight"),
        "reference": (layers.PartialRMSNorm(8), "RMSNorm, eps outside the root"),
        "prms": (layers.PartialRMSNorm(8, 0.5), "pRMSNorm over 4 of 8 channels, eps outside the root"),
        "scale": (layers.ScaleNorm(8), "RMSNorm, eps as the least length of a token"),
    }


def test_form_is_what_is_computed():
    for name, (norm, expected) in forms().items():
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        assert str(identify(norm)) == expected, name


class NotALayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("norm", [NotALayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)])
def test_other_layers_have_no_form(norm: nn.Module):
    assert identify(norm) is None


class Kernel(torch.autograd.Function):
    """A LayerNorm that no torch function announces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias)


def fused(module: str, name: str, **attributes: Any) -> nn.Module:
    """Return a layer with the name and attributes of a third-party one, which is not installed."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
            self.normalized_shape, self.eps = (6,), 1e-5
            vars(self).update(attributes)

        def forward(self, x: Tensor) -> Tensor:
            return Kernel.apply(x, self.weight + int(bool(attributes)), self.bias)  # type: ignore[return-value]

    Layer.__module__, Layer.__qualname__, Layer.__name__ = module, name, name
    return Layer()


@pytest.mark.parametrize(
    "norm",
    [
        fused("apex.normalization.fused_layer_norm", "MixedFusedLayerNorm"),
        fused("megatron.core.fusions.fused_layer_norm", "FusedLayerNorm", zero_centered_gamma=True),
        fused("transformer_engine.pytorch.module.layernorm", "LayerNorm"),
    ],
)
def test_fused_kernels_are_known_by_name(norm: nn.Module):
    model, x = nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, 3)).double().eval(), torch.randn(2, 5, 4).double()
    result = normfuse.apply(model, api.EXACT_PASSES, example_inputs=x)
    assert [(o.layer, o.remains) for o in result.report.norms] == [(type(norm).__name__, True)]
    assert_parity(model, result.model, x)
    (outcome,) = normfuse.inspect(model, example_inputs=x).norms
    assert outcome.refusal
    assert "LayerNorm" in outcome.refusal.detail


# names


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("MixedFusedRMSNorm", "RMSNorm"),
        ("Qwen2RMSNorm", "RMSNorm"),
        ("T5LayerNorm", "LayerNorm"),
        ("FusedLayerNorm", "LayerNorm"),
        ("SyncBatchNorm", "BatchNorm"),
        ("BatchNormAct2d", "BatchNorm"),
        ("GhostBN", "Ghost BatchNorm"),
        ("EstBN", "estimated BatchNorm"),
        ("LieBN", "Riemannian BatchNorm"),
        ("EvoNorm2dS2a", "EvoNorm"),
        ("GDN1", "GDN"),
        ("MaskPowerNorm", "PowerNorm"),
        ("FilterResponseNormTlu2d", "response normalization"),
        ("Unheard", None),
    ],
)
def test_family_by_name(name: str, family: str | None):
    found = family_of(type(name, (nn.Module,), {})())
    assert (found.name if found else None) == family


def test_every_family_is_named_once():
    names = [f.name for f in (*FAMILIES, *COMPOUNDS, *WEIGHTS)]
    assert len(names) == len(set(names))
    assert all(name in families.__dict__["page"]() for name in names)


def test_the_page_is_the_generated_one():
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(), "write it again: python -c 'from normfuse.families import page; print(page(), end=\"\")'"
