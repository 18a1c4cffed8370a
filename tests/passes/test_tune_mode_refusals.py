"""The pass ``tune-mode``: what it does not pair, why not, and that this keeps its arithmetic on fixed statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normfuse
from normfuse.base import Reason
from normfuse.layers.tuned import FixedNorm, TunedNorm, TunedProduct
from normfuse.report import Status
from tests.gradients import assert_same, assert_tunes, gradients, hard_norms, paired
from tests.zoo import ZOO, layers
from tests.zoo.sharing import ConvBN
from tests.zoo.trap import image


def reason(model: nn.Module, inputs: Any = None, norm: str | None = None) -> Reason | None:
    """Return why one norm of a model, the first by default, is not paired."""
    report = normfuse.inspect(model, ["tune-mode"], example_inputs=inputs)
    found = next(o for o in report.norms if norm in (None, o.subject))
    assert bool(found.partners) == (found.refusal is None)
    return found.refusal.reason if found.refusal else None


# what is not paired keeps its arithmetic, on fixed statistics


class TrainingWithoutNorm(ConvBN):
    """The norm is left out in training."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.training else self.bn(self.conv(x))


class DropPath(nn.Module):
    """Leaves out whole samples, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x[:, :1, :1, :1], 0.5)) * 2 if self.training else x


class Between(ConvBN):
    """A layer between the convolution and its norm."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.between = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.between(self.conv(x))).sigmoid()


class NormTwice(ConvBN):
    """The norm's own output goes through it once more."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.bn(self.conv(x)))


class ConvTwice(ConvBN):
    """Only the second call of the convolution is normalized."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.conv(x)))


class PositiveGain(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight.abs(), self.bias, eps=self.eps)


class OtherEps(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=0.5)


class OwnStatistics(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, None, None, self.weight, self.bias, training=True)


class Doubles(nn.BatchNorm2d):
    """A forward of its own that cannot be traced."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (2 if input.sum() < 1e9 else 1)


def with_norm(norm: nn.Module) -> nn.Module:
    model = ConvBN()
    model.bn = norm  # type: ignore[assignment]
    return model


def hooked(name: str) -> nn.Module:
    model = ConvBN()
    model.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
    return model


def parametrized() -> nn.Module:
    model = ConvBN()
    parametrizations.weight_norm(model.conv)
    return model


REFUSED = {
    "read by two norms": (ZOO["ConvIntoTwoNorms"].build, Reason.EXTRA_CONSUMER),
    "two norms on one convolution": (ZOO["SharedConvTwoNorms"].build, Reason.SHARED_MODULE),
    "on the input": (lambda: layers.chain(nn.BatchNorm2d(4)), Reason.NO_PRODUCER),
    "called twice": (ConvTwice, Reason.SHARED_MODULE),
    "norm twice": (NormTwice, Reason.UNSUPPORTED_LAYER),
    "without norm in training": (TrainingWithoutNorm, Reason.SHARED_MODULE),
    "DropPath": (lambda: Between(DropPath()), Reason.OPAQUE_OPERATION),
    "Dropout2d": (lambda: Between(nn.Dropout2d(0.5)), Reason.OPAQUE_OPERATION),
    "activation": (lambda: Between(nn.ReLU()), Reason.OPAQUE_OPERATION),
    "padded average": (lambda: Between(nn.AvgPool2d(3, 1, 1)), Reason.NONZERO_PADDING),
    "hook on conv": (lambda: hooked("conv"), Reason.HAS_HOOKS),
    "hook on norm": (lambda: hooked("bn"), Reason.HAS_HOOKS),
    "parametrized": (parametrized, Reason.PARAMETRIZED),
    "gain made positive": (lambda: with_norm(PositiveGain(4)), Reason.FORWARD_OVERRIDDEN),
    "other eps": (lambda: with_norm(OtherEps(4)), Reason.FORWARD_OVERRIDDEN),
    "own statistics": (lambda: with_norm(OwnStatistics(4)), Reason.FORWARD_OVERRIDDEN),
    "forward of its own": (lambda: with_norm(Doubles(4)), Reason.EXTRA_CONSUMER),
    "written by hand": (ZOO["norm_with_own_forward"].build, Reason.FORWARD_OVERRIDDEN),
    "halves": (ZOO["ChunkedChannels"].build, Reason.OPAQUE_OPERATION),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    build, expected = REFUSED[name]
    model = hard_norms(build().double())
    assert_tunes(model, image())
    assert reason(model, image()) is expected
    if name not in ("forward of its own", "halves"):  # what a trace cannot know
        assert reason(model, None) is expected


def test_a_norm_that_is_not_paired_keeps_its_class_and_its_statistics():
    model = normfuse.tune_mode(ZOO["ConvIntoTwoNorms"].build()).train()
    assert isinstance(model.bn, FixedNorm)
    assert isinstance(model.bn, nn.BatchNorm2d)
    before = copy.deepcopy(model.state_dict())
    model(image())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_control_flow():
    """The run that the example makes is followed; without one, each part that can be read is."""

    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = ConvBN(), ConvBN()

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) if x.sum() > 0 else self.right(x)

    model = hard_norms(Forks().double())
    assert paired(model) == {"left.bn": ("left.conv",), "right.bn": ("right.conv",)}
    assert paired(model, image().abs()) == {"left.bn": ("left.conv",)}
    for example in (None, image().abs(), -image().abs()):
        tuned = normfuse.tune_mode(copy.deepcopy(model), example_inputs=example).train()
        for inputs in (image().abs(), -image().abs()):
            assert_same(gradients(model.eval(), inputs), gradients(tuned, inputs))
        assert all(torch.equal(value, tuned.state_dict()[key]) for key, value in model.state_dict().items())


class TakesTheLongWay(Between):
    """Cannot be traced: which way it goes depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


class HasAuxiliary(ConvBN):
    """Cannot be traced, and calls the convolution once more in training."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)) if x.sum() < 1e9 else x
        return y + self.conv(x) if self.training else y


def test_what_only_training_does_is_seen_in_a_model_that_cannot_be_traced():
    """It is run on the example in training mode as well."""
    for build, expected in (
        (lambda: TakesTheLongWay(DropPath()), Reason.OPAQUE_OPERATION),
        (HasAuxiliary, Reason.SHARED_MODULE),
    ):
        model = hard_norms(build().double())
        assert reason(model, image()) is expected
        assert_tunes(model, image())


def test_report_has_each_norm_once_with_the_reason():
    model = nn.Sequential(
        ZOO["ConcatOfConvs"].build(), nn.BatchNorm2d(7), nn.Conv2d(7, 4, 1), nn.GroupNorm(2, 4)
    ).double()
    report = normfuse.inspect(model, ["tune-mode"])
    assert [(o.subject, o.status, o.remains) for o in report.norms] == [
        ("0.bn", Status.APPLIED, False),
        ("1", Status.APPLIED, True),
        ("3", Status.UNMATCHED, False),
    ]
    assert report.norms[1].refusal.reason is Reason.OPAQUE_OPERATION
    assert "1 of 3 norms applied by the layer before" in report.summary()
    assert "1 on fixed statistics where they are (1 opaque operation)" in report.summary()
    assert not any(isinstance(m, TunedProduct | TunedNorm) for m in model.modules()), "inspect changes nothing"
    assert isinstance(normfuse.apply(model, ["tune-mode"]).model[0].conv, TunedProduct)


def test_lazy_layers_without_values():
    assert reason(layers.chain(nn.Conv2d(4, 4, 1), nn.LazyBatchNorm2d())) is Reason.UNINITIALIZED


def test_no_running_statistics():
    assert reason(ZOO["without_running_statistics"].build()) is Reason.BATCH_STATISTICS


class CallsTheFunction(ConvBN):
    """A function takes the parameters of the convolution, which is not called."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.adds = bias

    def forward(self, x: Tensor) -> Tensor:
        bias = self.conv.bias if self.adds else None
        return self.bn(F.conv2d(x, self.conv.weight, bias, self.conv.stride, self.conv.padding)).sigmoid()


@pytest.mark.parametrize("inputs", [image(), None], ids=["recorded", "traced"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_is_not_called_is_not_paired(bias: bool, inputs: Tensor | None):
    model = hard_norms(CallsTheFunction(bias).double())
    assert reason(model, inputs) is Reason.UNSUPPORTED_LAYER
    expected = model.eval()(image())
    assert torch.equal(normfuse.tune_mode(model, example_inputs=inputs).eval()(image()), expected)
