"""``center-norm``: every reason it refuses for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.base import Reason
from tests.passes.residual_streams import (
    BOTH,
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

# refusals


def post_norm() -> nn.Module:
    class Post(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(self.inp(x))
            return self.head(self.norm2(x + self.branch(x).tanh()))

    return Post()


def test_post_norm():
    found = refusals(noisy(post_norm()))
    assert {name: r.reason for name, r in found.items()} == {"norm2": Reason.POST_NORM}
    assert found["norm2"].detail.startswith("norm1 (LayerNorm) writes to the stream")


def test_batch_norm_in_the_stream_folds_first():
    class Batch(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.inp(x).transpose(1, 2)).transpose(1, 2)
            return self.head(self.norm2(x + self.branch(self.norm1(x).tanh())))

    model = noisy(Batch(bn=nn.BatchNorm1d(C)))
    found = refusals(model)
    assert [found[name].reason for name in BOTH] == [Reason.POST_NORM] * 2
    assert "fold-bn" in found["norm1"].hint
    check(model, X, norms=2, passes=("fold-bn", "center-norm"))


def test_other_readers():
    assert reasons(noisy(Residual(after=lambda x: x))) == both(Reason.EXTRA_CONSUMER)
    assert reasons(noisy(Residual(after=lambda x: x.sin()))) == both(Reason.EXTRA_CONSUMER)

    class ByLayer(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            return self.head(x) + self.head(self.norm2(x + self.branch(self.norm1(x))))

    found = refusals(noisy(ByLayer()))
    assert {name: r.reason for name, r in found.items()} == both(Reason.EXTRA_CONSUMER)
    assert "head (Linear)" in found["norm1"].detail


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: x.relu(), Reason.EXTRA_CONSUMER),
        (lambda x: x + 1.0, Reason.AXIS),
        (lambda x: x * torch.linspace(1, 2, C).double(), Reason.OPAQUE_OPERATION),
        (lambda x: x * x, Reason.OPAQUE_OPERATION),
        (lambda x: 1.0 / x, Reason.EXTRA_CONSUMER),
        (lambda x: torch.cat([x, x], -1)[..., :C], Reason.AXIS),
        (lambda x: torch.cat([x[..., 3:], x[..., :3]], -1), Reason.AXIS),
        (lambda x: x.mean(-1, keepdim=True).expand(-1, -1, C), Reason.AXIS),
        (lambda x: x[:, :, : C // 2].repeat(1, 1, 2), Reason.AXIS),
    ],
)
def test_operations_that_do_not_keep_it_centred(between: Change, reason: Reason):
    """The first norm is in front of the operation, the second behind it."""
    found = reasons(noisy(Residual(between)))
    assert (found["norm1"], set(found)) == (reason, set(BOTH))
    nonlinear = reason is Reason.EXTRA_CONSUMER
    assert found["norm2"] is (Reason.OPAQUE_OPERATION if nonlinear else reason)


def test_norm_over_several_places_is_another_mean():
    """Patch merging: the channels of two places side by side have one mean, centring takes out two."""
    model = nn.Sequential(nn.Linear(C, C), nn.Unflatten(1, (2, 2)), nn.Flatten(2), nn.LayerNorm(2 * C))
    assert reasons(noisy(model), X[:, :4]) == {"3": Reason.AXIS}


def test_norm_over_several_axes():
    assert reasons(noisy(nn.Sequential(nn.Linear(C, C), nn.LayerNorm((5, C))))) == {"1": Reason.AXIS}


def test_writer_along_another_axis_and_in_groups():
    mixer = nn.Sequential(nn.Linear(C, C), nn.Flatten(0, 0), nn.LayerNorm(C))
    assert reasons(noisy(mixer)) == {}
    token = nn.Sequential(ChannelsLast(nn.Linear(5, 5)), nn.LayerNorm(C))
    assert reasons(noisy(token)) == {"1": Reason.AXIS}
    groups = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), ChannelsFirst(3))
    found = refusals(noisy(groups), PICTURE)["1"]
    assert found.reason is Reason.AXIS
    assert "3 groups" in found.detail


class ChannelsLast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


def test_input_of_the_model_and_unknown_producer():
    assert reasons(noisy(nn.Sequential(nn.LayerNorm(C)))) == {"0": Reason.NO_PRODUCER}
    tanh = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.LayerNorm(C))
    found = refusals(noisy(tanh))["2"]
    assert (found.reason, found.detail[:8]) == (Reason.OPAQUE_OPERATION, "1 (Tanh)")


def test_layer_that_also_writes_elsewhere():
    class Elsewhere(Residual):
        def forward(self, x: Tensor) -> Any:
            other = self.branch(x).sin()
            x = self.inp(x)
            return self.head(self.norm2(x + self.branch(self.norm1(x)))), other

    assert reasons(noisy(Elsewhere())) == both(Reason.EXTRA_CONSUMER)


def test_weight_that_is_also_read_by_a_function():
    class AlsoRead(Residual):
        def forward(self, x: Tensor) -> Any:
            y = self.inp(x)
            return self.head(self.norm2(y + self.branch(self.norm1(y)))), self.inp.weight.sum() + x

    assert reasons(noisy(AlsoRead())) == both(Reason.SHARED_PARAMETER)


def test_parametrized_writer():
    model = Residual(inp=nn.utils.parametrizations.weight_norm(nn.Linear(C, C)))
    assert reasons(noisy(model)) == both(Reason.PARAMETRIZED)
    check(model, X, norms=2, passes=("materialize", "center-norm"))


def test_buffer_that_is_not_saved():
    class Placed(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("place", torch.randn(5, C), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x) + self.place
            return self.head(self.norm2(x + self.branch(self.norm1(x))))

    assert reasons(noisy(Placed())) == both(Reason.PARAMETRIZED)


@pytest.mark.parametrize("name", ["norm1", "inp", "drop", "block"])
def test_hooks(name: str):
    class Block(nn.Module):
        def __init__(self, drop: nn.Module) -> None:
            super().__init__()
            self.drop = drop

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x) * 2.0

    drop = nn.Dropout()
    model = Residual(drop=drop, block=Block(drop))
    model.between = model.block
    noisy(model)
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    assert reasons(model) == both(Reason.HAS_HOOKS)


def test_without_inputs():
    assert reasons(noisy(Residual()), None) == both(Reason.RANK_UNKNOWN)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) if x.sum() > 0 else self.block(-x)

    found = reasons(noisy(Branches()), None)
    assert found == {"block.norm1": Reason.PARTIAL_CAPTURE, "block.norm2": Reason.PARTIAL_CAPTURE}


def test_excluded_writer():
    assert reasons(noisy(Residual()), exclude=["branch"]) == both(Reason.EXCLUDED)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight(value: float):
    model = noisy(Residual())
    with torch.no_grad():
        model.inp.weight[0, 0] = value
    report = normfuse.inspect(model, ["center-norm"], example_inputs=X)
    assert {o.refusal.reason for o in report.norms if o.refusal} == {Reason.NONFINITE}


def test_out_of_range():
    model = noisy(Residual()).to(torch.float16)
    with torch.no_grad():
        model.inp.weight[:, 0] = -6e4
        model.inp.weight[0, 0] = 6e4
    report = normfuse.inspect(model, ["center-norm"], example_inputs=X.half() * 1e-3)
    assert {o.refusal.reason for o in report.norms if o.refusal} == {Reason.RANGE}


def test_integer_weight():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("place", torch.arange(C))
            self.inp, self.norm = nn.Linear(C, C), nn.LayerNorm(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inp(x) + self.place)

    assert reasons(noisy(Whole())) == {"norm": Reason.DTYPE}


class NotOnlyNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).relu()


class ByHand(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return (x - x.mean(-1, keepdim=True)) * self.weight


@pytest.mark.parametrize("norm", [NotOnlyNorm, ByHand])
def test_norm_that_is_no_layer_norm(norm: type[nn.LayerNorm]):
    assert reasons(noisy(nn.Sequential(nn.Linear(C, C), norm(C)))) == {"1": Reason.FORWARD_OVERRIDDEN}


def test_norm_without_a_layer():
    class Function(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp = nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(self.inp(x), (C,))

    assert reasons(noisy(Function())) == {":layer_norm": Reason.FORWARD_OVERRIDDEN}


def test_encoder_layer_reads_its_norms():
    """torch's encoder layer hands the parameters of its norms to a kernel of its own; the last norm is replaced."""
    layer = nn.TransformerEncoderLayer(C, 2, 8, norm_first=True, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(C), enable_nested_tensor=False)
    model = noisy(nn.Sequential(nn.Linear(C, C), encoder))
    found = reasons(model)
    assert set(found.values()) == {Reason.FORWARD_OVERRIDDEN}
    assert set(found) == {f"1.layers.{i}.norm{j}" for i in (0, 1) for j in (1, 2)}


def test_parameters_of_a_norm_that_something_else_reads():
    class AlsoRead(Residual):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.norm1.weight + x[0, 0]

    assert reasons(noisy(AlsoRead())) == {"norm1": Reason.SHARED_PARAMETER}
    model = noisy(Residual())
    model.norm2.weight = model.norm1.weight
    assert reasons(model) == both(Reason.SHARED_PARAMETER)


def test_parametrized_norm():
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = noisy(Residual())
    nn.utils.parametrize.register_parametrization(model.norm1, "weight", Double())
    assert reasons(model) == {"norm1": Reason.PARAMETRIZED}
