"""Routes over values of every shape: axes of size 1 that an operation repeats, and layers that run without a batch.

Every exact pass runs. The result must be right, and where a norm stays, the reason must be a rule's and no accident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse import api
from normfuse.base import Reason
from normfuse.report import Report
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image


def folded(model: nn.Module, *inputs: Tensor, positive: bool = False) -> Report:
    """Run every exact pass, and assert that the function stays and that each operation was understood."""
    randomize_norms(model.double().eval(), positive=positive)
    result = api.apply(model, api.EXACT_PASSES, example_inputs=inputs)
    assert_parity(model, result.model, inputs)
    assert "cannot be followed" not in str(result.report), str(result.report)
    return result.report


class Between(nn.Module):
    """A convolution, a norm, and a function of both the norm's output and what else comes in, before or after it."""

    def __init__(self, function: Callable[..., Tensor], *, before: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.gain, self.one = nn.Parameter(torch.randn(1, 4, 1, 1)), nn.Parameter(torch.randn(1, 1, 1, 1))
        self.function, self.before = function, before

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        x = self.conv(x)
        if self.before:
            return self.last(self.norm(self.function(self, x, *others)))
        return self.last(self.function(self, self.norm(x), *others))


BROADCAST: dict[str, Callable[..., Tensor]] = {
    "noise times a gain": lambda m, x, n: x + n * m.gain,
    "gain times noise": lambda m, x, n: x + m.gain * n,
    "noise through a division": lambda m, x, n: x - n / m.gain,
    "attention times a gain": lambda m, x, n: x * (n.sigmoid() * m.gain),
    "attention of the value": lambda m, x, n: x * (x.mean(1, keepdim=True) * m.gain),
    "one channel spread over all": lambda m, x, n: x[:, :1] * m.gain + n,
    "one channel added to all": lambda m, x, n: x[:, :1] + m.gain,
    "one channel expanded": lambda m, x, n: x[:, :1].expand(-1, 4, -1, -1) * m.gain,
    "one row times a column": lambda m, x, n: x[:, :, :1] * torch.ones(1, 1, 3, 1).double().cumsum(2),
    "one place times a map": lambda m, x, n: F.adaptive_avg_pool2d(x, 1) * n,
    "sums of one channel": lambda m, x, n: (x.sum(1, keepdim=True) + m.one) * m.gain,
    "a vector of channels behind a mean": lambda m, x, n: x.mean((2, 3))[:, :, None, None] + m.gain * n,
    "less axes than the constant": lambda m, x, n: (x.mean((0, 2, 3)) * m.gain.flatten()).reshape(1, 4, 1, 1) + n,
    "more axes from the constant": lambda m, x, n: (x.amax((0, 2, 3)) * m.gain.reshape(1, 4)).reshape(1, 4, 1, 1) + n,
    "padded border": lambda m, x, n: F.pad(x, (1, 1, 1, 1)) * m.gain,
}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("case", BROADCAST)
def test_what_repeats_an_axis_of_size_one(case: str, before: bool):
    folded(Between(BROADCAST[case], before=before), image(2, 3, 6, 6), image(2, 1, 4, 4))


PADS = {
    1: [nn.ZeroPad1d(1), nn.ConstantPad1d(1, 0.5), nn.ReflectionPad1d(1), nn.ReplicationPad1d(2), nn.CircularPad1d(1)],
    2: [nn.ZeroPad2d((1, 0, 2, 0)), nn.ConstantPad2d(1, -2.0), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1)],
    3: [nn.ZeroPad3d(1), nn.ConstantPad3d(1, 1.5), nn.ReflectionPad3d(1), nn.ReplicationPad3d(1)],
}


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("dims", "pad"), [(n, pad) for n, pads in PADS.items() for pad in pads], ids=str)
def test_pads_between_and_behind(dims: int, pad: nn.Module, channels: int):
    """One value per channel moves through, also where the channels are one."""
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    between = nn.Sequential(conv(3, channels, 3), pad, norm(channels))
    assert folded(between, image(2, 3, *[6] * dims)).norms[0].partners == ("0",)
    behind = nn.Sequential(norm(channels), pad, conv(channels, 2, 3))
    assert folded(behind, image(2, channels, *[6] * dims), positive=True).norms[0].partners == ("2",)


@pytest.mark.parametrize("case", ["beside", "times", "behind a sum"])
def test_a_padded_value_beside_others(case: str):
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pad, self.norm = nn.Conv2d(3, 4, 3), nn.ZeroPad2d(1), nn.BatchNorm2d(4)
            self.other, self.gain = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            if case == "beside":
                return self.norm(self.pad(self.conv(x))) + self.other(x)
            if case == "times":
                return self.norm(self.pad(self.conv(x) * self.gain)) * self.other(x)
            return self.norm(self.pad(self.conv(x)) + self.other(x))

    folded(Beside(), image(2, 3, 6, 6))


# without a batch


def chain(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers)


UNBATCHED: dict[str, tuple[nn.Module, tuple[int, ...], bool]] = {
    "channels are positions": (chain(nn.Conv1d(3, 7, 3), nn.BatchNorm1d(5)), (3, 7), False),
    "as many channels as positions": (chain(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)), (3, 7), False),
    "rows of an image": (chain(nn.Conv2d(3, 5, 3), nn.BatchNorm1d(5)), (3, 7, 7), False),
    "a row as channels": (chain(nn.Conv2d(3, 4, (3, 1)), nn.BatchNorm1d(5)), (3, 7, 6), False),
    "transposed": (chain(nn.ConvTranspose1d(3, 5, 3), nn.BatchNorm1d(5)), (3, 3), False),
    "turned to the channels": (
        chain(nn.Conv1d(3, 5, 3), nn.Flatten(0, -1), nn.Unflatten(0, (1, 5, -1)), nn.BatchNorm1d(5)),
        (3, 7),
        True,
    ),
    "into a convolution": (chain(nn.BatchNorm1d(5), nn.Conv1d(3, 4, 3)), (3, 5), False),
    "into a convolution of its size": (chain(nn.BatchNorm1d(5), nn.Conv1d(5, 4, 3)), (5, 5), False),
    "gain of a group norm": (chain(nn.GroupNorm(1, 5), nn.Conv1d(5, 4, 1)), (5, 5), False),
    "tokens": (chain(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)), (3,), True),
    "pooled": (chain(nn.Conv2d(3, 5, 3), nn.AvgPool2d(2), nn.BatchNorm1d(4)), (3, 10, 10), False),
    "padded": (chain(nn.Conv2d(3, 5, 3), nn.ZeroPad2d(1), nn.BatchNorm1d(6)), (3, 6, 6), False),
}


@pytest.mark.parametrize("case", UNBATCHED)
def test_layers_without_a_batch(case: str):
    """The channels of a convolution are the first axis then, and those of the norm are not: by sizes this may fit."""
    model, shape, folds = UNBATCHED[case]
    report = folded(model, image(*shape), positive=True)
    assert bool(report.applied) is folds, str(report)
    if not folds:
        assert {o.refusal.reason for o in report.norms if o.refusal} == {Reason.AXIS}


@pytest.mark.parametrize("size", [3, 5])
def test_branches_without_a_batch_are_not_merged_along_another_axis(size: int):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm1d(size)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.norm(x)

    folded(nn.Sequential(Branches(), nn.ReLU()), image(3, size, 4))


# scales of zero


def with_zeros(norm: Any, shift: float | None) -> Any:
    """Give a norm positive gains but for the first, which is zero; with a shift there of this sign, and no other."""
    randomize_norms(norm, positive=True)
    with torch.no_grad():
        norm.weight.view(-1)[0] = 0
        if shift is not None:
            norm.running_mean.zero_()
            norm.bias.zero_()
            norm.bias[0] = shift
    return norm


MAXIMA = {
    "layer": nn.MaxPool2d(2),
    "padded": nn.MaxPool2d(3, padding=1),
    "adaptive": nn.AdaptiveMaxPool2d(2),
}


@pytest.mark.parametrize("forwards", [False, True])
@pytest.mark.parametrize("case", MAXIMA)
def test_scale_of_zero_passes_a_maximum(case: str, forwards: bool):
    torch.manual_seed(0)
    norm, conv = with_zeros(nn.BatchNorm2d(4), None), nn.Conv2d(4, 4, 3)
    steps = (norm, MAXIMA[case], nn.Conv2d(4, 4, 1)) if forwards else (conv, MAXIMA[case], norm)
    model = nn.Sequential(*steps).double().eval()
    result = api.apply(model, ["fold-bn"], example_inputs=image(2, 4, 8, 8))
    assert_parity(model, result.model, image(2, 4, 8, 8))
    assert result.report.applied, str(result.report)


RECTIFIERS = {
    "relu": (nn.ReLU(), False),
    "leaky": (nn.LeakyReLU(0.3), True),
    "falling": (nn.LeakyReLU(-0.5), False),
    "prelu": (nn.PReLU(4, 0.2), True),
    "prelu of one": (nn.PReLU(1, 0.2), True),
}


@pytest.mark.parametrize("shift", [1.5, -1.5])
@pytest.mark.parametrize("forwards", [False, True])
@pytest.mark.parametrize("case", RECTIFIERS)
def test_constant_channel_passes_a_rectifier(case: str, forwards: bool, shift: float):
    """Forwards always; backwards where the rectifier returns such a constant: a ReLU never a negative one."""
    torch.manual_seed(0)
    rectifier, returns_negative = RECTIFIERS[case]
    norm, conv = with_zeros(nn.BatchNorm2d(4), shift), nn.Conv2d(4, 4, 3)
    steps = (norm, rectifier, conv) if forwards else (conv, rectifier, norm)
    model = nn.Sequential(*steps, nn.Sigmoid()).double().eval()
    result = api.apply(model, ["fold-bn"], example_inputs=image(2, 4, 8, 8))
    assert_parity(model, result.model, image(2, 4, 8, 8))
    assert bool(result.report.applied) is (forwards or shift > 0 or returns_negative), str(result.report)


@pytest.mark.parametrize("slope", ["computed", "random"])
def test_rectifier_of_unknown_slope_takes_no_constant_channel(slope: str):
    class Rectified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = with_zeros(nn.BatchNorm2d(4), -1.5), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            y = F.prelu(y, x.mean((0, 2, 3))) if slope == "computed" else F.rrelu(y)
            return self.conv(y)

    model = Rectified().double().eval()
    result = api.apply(model, ["fold-bn"], example_inputs=image(2, 4, 8, 8))
    assert_parity(model, result.model, image(2, 4, 8, 8))
    assert "whose slope is not constant" in str(result.report)


@pytest.mark.parametrize(("value", "folds"), [(0.0, False), (1.5, True)])
def test_constant_channel_meets_a_pad(value: float, folds: bool):
    """Behind the norm the pad writes its own constant, which a channel of scale zero can only make from the same."""
    torch.manual_seed(0)
    norm = with_zeros(nn.BatchNorm2d(4), 1.5)
    model = nn.Sequential(norm, nn.ConstantPad2d(1, value), nn.Conv2d(4, 4, 3)).double().eval()
    result = api.apply(model, ["fold-bn"], example_inputs=image(2, 4, 6, 6))
    assert_parity(model, result.model, image(2, 4, 6, 6))
    assert bool(result.report.applied) is folds, str(result.report)


# a constant that is added on the way


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + m.gain,
        lambda m, x: m.gain + x,
        lambda m, x: x - m.gain,
        lambda m, x: m.gain - x,
        lambda m, x: x + m.gain[0],
        lambda m, x: x + m.one,
        lambda m, x: x - m.gain.exp(),
        lambda m, x: x.mean((2, 3)).add(m.gain.flatten())[:, :, None, None],
    ],
)
def test_scale_passes_a_constant_that_is_added(function: Callable[..., Tensor]):
    class Added(Between):
        def forward(self, x: Tensor, *others: Tensor) -> Tensor:
            return self.last(self.function(self, self.norm(x)))

    report = folded(Added(function), image(2, 4, 6, 6))
    assert report.norms[0].partners == ("last",), str(report)
