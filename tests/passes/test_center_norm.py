"""``center-norm``: which streams become centred, what a run leaves alone, and the files of what came out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import api
from normfuse.base import Reason
from normfuse.layers.rms_norm import RMSNorm
from normfuse.report import Outcome, Status
from normfuse.stream_rules import _shows_whole
from tests.parity import assert_parity, outputs
from tests.passes.residual_streams import (
    IDS,
    PICTURE,
    C,
    Change,
    ChannelsFirst,
    Residual,
    X,
    both,
    check,
    noisy,
    reasons,
    refusals,
)

# what is centred


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x,
        lambda x: x.clone().contiguous(),
        lambda x: x * 0.5,
        lambda x: x / torch.tensor(3.0).double(),
        lambda x: -x,
        lambda x: x - x.flip(1),
        lambda x: sum([x, x.roll(1, 1)]),
        lambda x: x.transpose(1, 2).reshape(2, C, 5, 1).flatten(2).transpose(1, 2),
        lambda x: torch.cat([x[:, :1], x[:, 2:]], dim=1),
        lambda x: torch.stack([x, x * 2], dim=1).mean(1),
        lambda x: x.split([2, 3], dim=1)[1],
        lambda x: x.mean(1),
        lambda x: x[:, 0],
        lambda x: F.interpolate(x.transpose(1, 2), scale_factor=2.0, mode="linear").transpose(1, 2),
        lambda x: F.pad(x, (0, 0, 1, 2)),
        lambda x: x[:, :, [3, 1, 0, 5, 4, 2]],
    ],
)
def test_what_keeps_a_stream_centred(between: Change):
    check(noisy(Residual(between)), X, norms=2)


class Gated(Residual):
    """A gate per token, made from another value than the stream."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        return self.head(self.norm2(y + self.branch(self.norm1(y)) * torch.sigmoid(x[..., :1])))


def test_gate_that_all_channels_share():
    check(noisy(Gated()), X, norms=2)


class Writers(nn.Module):
    """Every kind of writer into one stream: embedding, convolution, linear, attention, addmm, parameter, buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.patches = nn.Embedding(9, C, padding_idx=0), nn.Conv2d(3, C, 4, 4)
        self.up, self.attention = nn.ConvTranspose1d(3, C, 1), nn.MultiheadAttention(C, 2, batch_first=True)
        self.matrix, self.offset = nn.Parameter(torch.randn(C, C)), nn.Parameter(torch.randn(C))
        self.token = nn.Parameter(torch.randn(1, 1, C))
        self.register_buffer("place", torch.randn(1, 13, C))
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C, eps=1e-2, bias=False)
        self.plain = nn.LayerNorm(C, elementwise_affine=False)

    def forward(self, ids: Tensor, picture: Tensor) -> Tensor:
        seen = self.patches(picture).flatten(2).transpose(1, 2)
        more = self.up(picture.flatten(2)[:, :, :4]).transpose(1, 2)
        x = torch.cat([self.token.expand(2, -1, -1), self.words(ids), seen, more], 1) + self.place
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.norm2(x).tanh()
        x = x + torch.addmm(self.offset, y.reshape(-1, C), self.matrix).view(2, 13, C)
        return self.plain(self.plain(x)).tanh()


def test_every_kind_of_writer():
    model = noisy(Writers())
    result = check(model, (IDS, PICTURE), norms=3)
    first = result.report.applied[0]
    assert set(first.partners) == {"words", "patches", "up", "attention.out_proj", "matrix", "token", "place"}
    assert all(not o.partners for o in result.report.applied[1:]), "the writers are named once"
    assert torch.equal(result.model.words.weight[0], model.words.weight[0] - model.words.weight[0].mean())


def test_writers_are_centred_and_readers_are_not_touched():
    model = noisy(Residual())
    result = check(model, X, norms=2)
    for name in ("inp", "branch"):
        layer = result.model.get_submodule(name)
        assert layer.weight.mean(0).abs().max() < 1e-14
        assert layer.bias.mean().abs() < 1e-14
    assert torch.equal(result.model.head.weight, model.head.weight)


def test_shared_layer_whose_calls_are_all_in_the_stream():
    class Twice(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            x = x + self.branch(self.norm1(x).tanh())
            return self.head(self.norm2(x + self.branch(self.norm1(x).tanh())))

    check(noisy(Twice()), X, norms=2)


def test_eps_and_no_affine():
    model = noisy(Residual(norm1=nn.LayerNorm(C, eps=0.3), norm2=nn.LayerNorm(C, elementwise_affine=False)))
    result = check(model, X, norms=2)
    assert (result.model.norm1.eps, result.model.norm2.weight) == (0.3, None)
    assert type(result.model.norm1) is RMSNorm
    assert type(result.model.norm2) is nn.RMSNorm


@pytest.mark.parametrize("bias", [True, False])
def test_norm_with_its_own_forward(bias: bool):
    model = noisy(nn.Sequential(nn.Conv2d(3, C, 3), ChannelsFirst(C, bias=bias), nn.Conv2d(C, 2, 1)))
    result = check(model, PICTURE, norms=1)
    assert isinstance(result.model[1], RMSNorm)
    assert result.model[1].axis == 1


def test_layer_scale_is_folded_first():
    """Then nothing but torch's own RMSNorm is left: fold-affine takes what the norms end with, too."""
    found = refusals(noisy(ScaledChain()))
    assert {name: r.reason for name, r in found.items()} == both(Reason.OPAQUE_OPERATION)
    assert all("fold-affine" in refusal.hint for refusal in found.values())
    result = check(noisy(ScaledChain()), X, norms=2, passes=("fold-affine", "center-norm"))
    assert all(type(m) is nn.RMSNorm and m.weight is None for m in result.model.modules() if isinstance(m, nn.RMSNorm))


class ScaledChain(nn.Module):
    """LayerScale on the branch, and a linear layer right behind each norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.norm1, self.up, self.down = nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, 8), nn.Linear(8, C)
        self.gamma, self.norm2, self.head = nn.Parameter(torch.randn(C)), nn.LayerNorm(C), nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + self.gamma * self.down(self.up(self.norm1(x)).tanh())
        return self.head(self.norm2(x))


def test_norms_that_stay_on_a_centred_stream():
    """An excluded norm stays a LayerNorm of the same value: it does not see the mean."""
    model = noisy(Residual())
    result = api.apply(model, ["center-norm"], example_inputs=X, exclude=["norm1"])
    assert_parity(model, result.model, X)
    assert isinstance(result.model.norm1, nn.LayerNorm)
    assert isinstance(result.model.norm2, nn.RMSNorm)


# tied weights


class Tied(nn.Module):
    """An embedding that is also the head, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm1 = nn.Embedding(9, C), nn.Embedding(4, C), nn.LayerNorm(C)
        self.branch, self.norm2, self.head = nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(4))
        x = x + self.branch(self.norm1(x).tanh())
        return self.head(self.norm2(x))


def test_tied_embedding_gets_a_centred_copy():
    model = noisy(Tied())
    result = check(model, IDS, norms=2)
    assert torch.equal(result.model.head.weight, model.head.weight)
    assert result.model.words.weight is not result.model.head.weight
    (untied,) = [o for o in result.report.applied if not o.norm]
    assert (untied.subject, untied.layer, untied.partners) == ("words.weight", "Embedding", ("head.weight",))
    assert {"op": "untie", "tensor": "words.weight"} in result.model.normfuse_manifest["edits"]


@pytest.mark.parametrize("glob", ["words.weight", "head*"])
def test_user_may_keep_the_tie(glob: str):
    model = noisy(Tied())
    assert reasons(model, IDS, exclude=[glob]) == both(Reason.EXCLUDED)
    result = api.apply(model, ["center-norm"], example_inputs=IDS, exclude=[glob])
    assert result.model.words.weight is result.model.head.weight
    assert not result.report


def test_tie_is_kept_where_no_norm_is_replaced():
    model = noisy(Tied())
    model.norm1.register_forward_hook(lambda *_: None)
    report = api.apply(model, ["center-norm"], example_inputs=IDS).report
    assert not [o for o in report.outcomes if not o.norm]
    assert {o.refusal.reason for o in report.norms if o.refusal} == {Reason.HAS_HOOKS}


def test_tie_that_is_read_by_a_function():
    class ByFunction(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids) + self.branch(self.norm1(self.words(ids)).tanh())
            return F.linear(self.norm2(x), self.head.weight)

    found = refusals(noisy(ByFunction()), IDS)
    assert {name: r.reason for name, r in found.items()} == both(Reason.SHARED_PARAMETER)
    assert "words.weight is also head.weight" in found["norm1"].detail


# what holds for every run


@pytest.mark.parametrize(("model", "inputs"), [(Residual(), X), (Tied(), IDS), (Writers(), (IDS, PICTURE))])
def test_report_names_each_norm_once_and_a_second_run_changes_nothing(model: nn.Module, inputs: Any):
    names = [name for name, module in noisy(model).named_modules() if isinstance(module, nn.LayerNorm)]
    result = api.apply(model, ["center-norm"], example_inputs=inputs)
    assert sorted(o.subject for o in result.report.norms) == sorted(names)
    assert all(o.status is Status.APPLIED for o in result.report.norms)
    again = api.apply(result.model, ["center-norm"], example_inputs=inputs)
    assert not again.report
    for key, value in result.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])


def test_refusal_leaves_the_model_untouched():
    model = noisy(Residual(after=lambda x: x))
    folded = api.apply(model, ["center-norm"], example_inputs=X).model
    for key, value in model.state_dict().items():
        assert torch.equal(value, folded.state_dict()[key])


def test_inspect_says_what_a_run_does():
    def lines(report: normfuse.Report) -> list[tuple[str, ...]]:
        return [outcome.line() for outcome in report.outcomes]

    model = noisy(Tied())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = normfuse.inspect(model, ["center-norm"], example_inputs=IDS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert lines(seen) == lines(api.apply(model, ["center-norm"], example_inputs=IDS).report)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("build", "inputs"), [(Tied, IDS), (Writers, (IDS, PICTURE)), (ScaledChain, X)])
def test_saved_and_loaded(build: Callable[[], nn.Module], inputs: Any, suffix: str, tmp_path: Path):
    model = noisy(build())
    result = api.apply(model, ["fold-affine", "center-norm"], example_inputs=inputs)
    path = tmp_path / f"model{suffix}"
    normfuse.save(result.model, path)
    loaded = normfuse.load(path, model=build().double())
    assert_parity(model, loaded, inputs)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in result.model.modules()]


@pytest.mark.parametrize(("opset", "norm"), [(23, {"RMSNormalization": 2}), (18, {})])
def test_file_has_no_layer_normalization(opset: int, norm: dict[str, int], tmp_path: Path):
    pytest.importorskip("onnxscript")
    from normfuse.lowering import lower

    model = noisy(Residual()).float()
    centred = api.apply(model, ["center-norm"], example_inputs=X.float()).model
    info = lower(centred, tmp_path / "model.onnx", X.float(), opset=opset)
    assert {name: n for name, n in info.nodes.items() if "Norm" in name} == norm
    assert normfuse.verify(model, tmp_path / "model.onnx", X.float())


# parts


def test_rms_norm_layer_on_any_axis():
    layer = RMSNorm(C, 0.1, axis=1).double()
    assert layer.bias is not None
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, C, 3, dtype=torch.float64)
    expected = x / (x.square().mean(1, keepdim=True) + 0.1).sqrt() * layer.weight[:, None] + layer.bias[:, None]
    torch.testing.assert_close(layer(x), expected)
    assert "axis=1" in repr(layer)
    assert list(RMSNorm(C, bias=False).state_dict()) == ["weight"]


def test_rows_of_a_gather():
    positions = torch.arange(24).reshape(2, 3, 4)
    assert _shows_whole(positions, 2, (2, 3, 4), 2)
    assert _shows_whole(positions.permute(1, 2, 0), 2, (2, 3, 4), 0)
    assert _shows_whole(positions.flip(2), 2, (2, 3, 4), 2)
    assert not _shows_whole(positions.flatten(1), 1, (2, 3, 4), 2), "three places side by side"
    assert not _shows_whole(positions[..., :2], 2, (2, 3, 4), 2), "half of the channels"
    assert not _shows_whole(positions.reshape(2, 2, 6)[..., :4], 2, (2, 3, 4), 2), "parts of two places"


def test_outcome_of_the_untied_weight_prints():
    report = normfuse.inspect(noisy(Tied()), ["center-norm"], example_inputs=IDS)
    assert isinstance(report.outcomes[-1], Outcome)
    assert "head.weight <- words.weight" in str(report)
    assert outputs(noisy(Tied()), IDS)[0].shape == (2, 4, 9)
