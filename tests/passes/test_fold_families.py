"""Folding the norms of the literature: what is fixed moves into the weights, what depends on the input stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import Reason, api
from normfuse.layers import (
    IBN,
    ActNorm,
    AdaptiveDeviation,
    BatchChannelNorm,
    EstimatedBatchNorm2d,
    GhostBatchNorm2d,
    OnlineNorm,
    PartialRMSNorm,
    ScaleNorm,
    UnifiedNorm,
)
from normfuse.layers.online_norm import LayerScaling
from normfuse.report import Outcome, Status
from tests.parity import assert_parity, randomize_norms

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def random(model: nn.Module) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return randomize_norms(model.double().eval())


def act_norm(channels: int) -> ActNorm:
    norm = ActNorm(channels)
    norm(torch.randn(3, channels, 4, 4))
    return norm


def behind(norm: nn.Module) -> nn.Sequential:
    """The norm reads a convolution."""
    return random(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 4, 1)))


def before(norm: nn.Module) -> nn.Sequential:
    """Only the convolution after the norm can take its map."""
    return random(nn.Sequential(nn.Conv2d(3, 6, 3), nn.SELU(), norm, nn.Conv2d(6, 4, 1)))


def folded(model: nn.Module, x: Tensor = X) -> tuple[Any, tuple[Outcome, ...]]:
    result = normfuse.apply(model, api.EXACT_PASSES, example_inputs=x)
    assert_parity(model, result.model, x)
    return result.model, result.report.norms


FIXED = [lambda: GhostBatchNorm2d(6, 2), lambda: EstimatedBatchNorm2d(6), lambda: act_norm(6)]
FIXED += [lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True)]


@pytest.mark.parametrize("make", FIXED)
@pytest.mark.parametrize("place", [behind, before])
def test_fixed_maps_fold_both_ways(make: Any, place: Any):
    model, norms = folded(place(make()))
    assert [o.status for o in norms] == [Status.APPLIED]
    assert isinstance(model[1 if place is behind else 2], nn.Identity)


@pytest.mark.parametrize("make", FIXED)
def test_folded_file_loads_again(make: Any, tmp_path: Path):
    source = behind(make())
    model, _ = folded(source)
    normfuse.save(model, tmp_path / "folded.pt")
    assert_parity(source, normfuse.load(tmp_path / "folded.pt"), X)


@pytest.mark.parametrize("make", [FIXED[0], FIXED[1]])
def test_training_mode_inside_a_model_in_eval_mode(make: Any):
    model = behind(make())
    model[1].train()
    (outcome,) = normfuse.inspect(model, example_inputs=X).norms
    assert outcome.refusal
    assert outcome.refusal.reason is Reason.BATCH_STATISTICS


# ActNorm


def test_act_norm_is_fixed_in_training_mode_too():
    model = behind(act_norm(6))
    model[1].train()
    assert normfuse.inspect(model, example_inputs=X).norms[0].status is Status.APPLIED


def test_act_norm_before_its_first_batch():
    (outcome,) = normfuse.inspect(nn.Sequential(nn.Conv2d(3, 6, 3), ActNorm(6)).eval()).norms
    assert outcome.refusal
    assert outcome.refusal.reason is Reason.UNINITIALIZED


class Flow(nn.Module):
    def __init__(self, *, read: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(3, 6, 1), act_norm(6), read

    def forward(self, x: Tensor) -> Any:
        if self.read:
            return self.norm(self.conv(x)) * self.norm.weight.abs().log().sum()
        return self.norm(self.conv(x), return_log_det=True)


@pytest.mark.parametrize(("read", "reason"), [(False, Reason.EXTRA_CONSUMER), (True, Reason.SHARED_PARAMETER)])
def test_act_norm_whose_log_determinant_is_used(read: bool, reason: Reason):
    _, (outcome,) = folded(random(Flow(read=read)))
    assert outcome.refusal
    assert outcome.refusal.reason is reason


# written out by hand


class EstBN(nn.Module):
    """Estimated BatchNorm as its authors wrote it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.running_mean.view(1, -1, 1, 1)
        out = out / torch.sqrt(self.running_var + 1e-5).view(1, -1, 1, 1)
        return self.weight.view(1, -1, 1, 1) * out + self.bias.view(1, -1, 1, 1)


class FlowActNorm(nn.Module):
    """ActNorm as flows write it, with signs in every place."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.logs, self.loc = nn.Parameter(torch.randn(1, features, 1, 1)), nn.Parameter(torch.randn(1, features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return -(1.5 - (2 + (x - 0.5 + self.loc)) * torch.exp(self.logs) / 3).float().double()


class ClampedActNorm(FlowActNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class ResidualActNorm(FlowActNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class InverseActNorm(FlowActNorm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.logs) / x


@pytest.mark.parametrize("make", [EstBN, FlowActNorm])
@pytest.mark.parametrize("place", [behind, before])
def test_constants_written_out_fold_as_what_they_are(make: Any, place: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t)  # keep float64 through a cast that is there to be read
    model, (outcome,) = folded(place(make(6)))
    assert (outcome.status, outcome.layer) == (Status.APPLIED, make.__name__)
    assert isinstance(model[1 if place is behind else 2], nn.Identity)


@pytest.mark.parametrize("make", [ClampedActNorm, ResidualActNorm, InverseActNorm])
def test_what_is_no_constant_map_is_left(make: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t)
    model, (outcome,) = folded(behind(make(6)))
    assert outcome.status is Status.UNMATCHED
    assert isinstance(model[1], make)


# in parts


@pytest.mark.parametrize("control", ["clamp", "layer_scaling", None])
def test_online_norm_folds_and_its_control_stays(control: Any):
    model, norms = folded(behind(OnlineNorm(6, control=control)))
    assert (norms[0].subject, norms[0].status) == ("1.core", Status.APPLIED)
    assert isinstance(model[1].core, nn.Identity)
    kind = {"clamp": nn.Hardtanh, "layer_scaling": LayerScaling, None: nn.Identity}[control]
    assert isinstance(model[1].control, kind)


def test_online_norm_does_not_move_across_its_control():
    _, norms = folded(before(OnlineNorm(6, control="clamp")))
    assert [o.status for o in norms] == [Status.REFUSED]
    assert "Hardtanh" in str(norms[0].refusal)


def test_half_of_ibn_folds_into_half_of_the_rows():
    source = behind(IBN(6))
    model, norms = folded(source)
    assert {o.subject: o.status for o in norms}["1.BN"] is Status.APPLIED
    assert isinstance(model[1].BN, nn.Identity)
    assert torch.equal(model[0].weight[:3], source[0].weight[:3])
    assert not torch.equal(model[0].weight[3:], source[0].weight[3:])


@pytest.mark.parametrize("estimate", [True, False])
def test_batch_stage_of_batch_channel_norm_folds(estimate: bool):
    model, norms = folded(behind(BatchChannelNorm(6, 3, estimate=estimate)))
    assert (norms[0].subject, norms[0].status) == ("1.bn", Status.APPLIED)
    assert isinstance(model[1].bn, nn.Identity)
    assert norms[1].subject == "1.channel"


def test_batch_norm_of_adaptive_deviation_folds_into_its_block():
    model, (outcome,) = folded(before(AdaptiveDeviation(6, nn.Conv2d(6, 6, 1))))
    assert outcome.partners == ("2.block",)
    assert isinstance(model[2].bn, nn.Identity)


@pytest.mark.parametrize("norm", [PartialRMSNorm(6), PartialRMSNorm(6, 0.5, bias=True), ScaleNorm(6)])
def test_gain_moves_and_statistics_stay(norm: nn.Module):
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    model, (outcome,) = folded(random(nn.Sequential(nn.Linear(3, 6), norm, nn.Linear(6, 4))), x)
    assert (outcome.status, outcome.remains) == (Status.APPLIED, True)
    assert type(model[1]) is type(norm)


def test_gain_of_one_plus_weight_moves():
    class GemmaNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps, self.weight = 1e-6, nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)

    x = torch.randn(2, 5, 3, dtype=torch.float64)
    model, (outcome,) = folded(random(nn.Sequential(nn.Linear(3, 6), GemmaNorm(), nn.Linear(6, 4))), x)
    assert (outcome.status, outcome.remains) == (Status.APPLIED, True)
    assert not model[1].weight.any()


@pytest.mark.parametrize("kind", ["B0", "B1", "B2", "S0", "S1", "S2"])
def test_evo_norm_keeps_its_activation(kind: str):
    from timm.layers import evo_norm

    groups = {"group_size": 3} if kind.startswith("S") else {}
    norm = getattr(evo_norm, f"EvoNorm2d{kind}")(6, **groups)
    model, (outcome,) = folded(random(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 4, 1))))
    assert (outcome.status, outcome.remains, outcome.layer) == (Status.APPLIED, True, type(norm).__name__)
    assert [type(m) for m in model] == [nn.Conv2d, type(norm), nn.Conv2d]


def test_no_map_moves_across_selu():
    model = random(nn.Sequential(nn.Conv2d(3, 6, 3), nn.SELU(), nn.Conv2d(6, 4, 1)))
    assert normfuse.inspect(model, api.EXACT_PASSES, example_inputs=X).outcomes == ()
    source = random(nn.Sequential(nn.SELU(), nn.BatchNorm2d(3), nn.SELU(), nn.Conv2d(3, 4, 1)))
    _, (outcome,) = folded(source)
    assert outcome.status is Status.REFUSED
    assert "SELU" in str(outcome.refusal)


# swaps


class Token(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), norm, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("norm", [PartialRMSNorm(6, bias=True), PartialRMSNorm(6, 0.5), ScaleNorm(6)])
def test_token_norms_take_part_in_swaps(norm: nn.Module):
    """Fitted to what they compute, and then folded away."""
    model, x = random(Token(norm)), torch.randn(32, 5, 3, dtype=torch.float64)
    swapped = normfuse.swap_norms(model, "unified", [x])
    assert isinstance(swapped.norm, UnifiedNorm)
    before, after = norm(model.first(x)).detach(), swapped.norm(model.first(x)).detach()
    spread = float((before - before.mean((0, 1))).square().mean())
    assert float((before - after).square().mean()) < 0.7 * spread
    folded_model = normfuse.fold(swapped, example_inputs=x)
    assert isinstance(folded_model.norm, nn.Identity)
    assert_parity(swapped, folded_model, x, tolerance=1e-9)
