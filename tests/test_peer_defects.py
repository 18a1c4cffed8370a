"""Where other tools fold wrongly, crash or keep silent on a legal model: normfuse must not.

Each test is named after the defect. What happened elsewhere was measured by running those tools; the models are in
:mod:`tests.zoo` where they serve other tests as well.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse import api
from normfuse.base import Reason
from normfuse.report import Report, Status
from tests.parity import assert_parity, randomize_norms
from tests.zoo import ZOO, layers, sharing
from tests.zoo.trap import image


def folded_exactly(model: nn.Module, inputs: Tensor) -> Report:
    """Fold, compare with the source, and return the report."""
    result = api.apply(model, ["fold-bn"], example_inputs=inputs)
    assert_parity(model, result.model, inputs)
    return result.report


def reasons(report: Report) -> list[Reason | None]:
    return [o.refusal.reason if o.refusal else None for o in report.norms]


# wrong results


def test_fx_shared_conv_with_two_norms_gets_both_folds():
    assert reasons(folded_exactly(ZOO["SharedConvTwoNorms"].build(), image())) == [Reason.SHARED_MODULE] * 2


def test_fx_shared_conv_with_a_plain_call():
    assert reasons(folded_exactly(ZOO["SharedConv"].build(), image())) == [Reason.SHARED_MODULE]


def test_fx_linear_and_norm_on_three_axes():
    """The length equals the width, so the shapes fit and the numbers do not."""
    assert reasons(folded_exactly(ZOO["linear_3d"].build(), image(3, 5, 5))) == [Reason.AXIS]


def test_torchao_conv_with_another_reader():
    assert reasons(folded_exactly(ZOO["SkipAroundNorm"].build(), image())) == [Reason.EXTRA_CONSUMER]


def test_torchao_conv_into_two_norms():
    assert reasons(folded_exactly(ZOO["ConvIntoTwoNorms"].build(), image())) == [Reason.EXTRA_CONSUMER] * 2


def test_torchao_second_of_two_chained_norms_is_dropped():
    """repghostnet: both norms go, and both count."""
    assert reasons(folded_exactly(ZOO["ChainedNorms"].build(), image())) == [None, None]


def test_torchao_brevitas_aimet_tied_weights():
    assert reasons(folded_exactly(ZOO["TiedParameters"].build(), image())) == [Reason.SHARED_PARAMETER]


@pytest.mark.parametrize("name", ["HookOnConv", "WatcherOnConv", "WatcherOnBlock", "HookOnNorm"])
def test_fx_mmengine_brevitas_forward_hook(name: str):
    """A hook on the conv, or on a block around it, would see or change another value."""
    assert reasons(folded_exactly(ZOO[name].build(), image())) == [Reason.HAS_HOOKS]


def test_onnxscript_training_mode_is_folded_as_inference():
    assert reasons(folded_exactly(ZOO["FunctionalTraining"].build(), image())) == [Reason.BATCH_STATISTICS]


class ActiveOnlyInTraining(sharing.ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.bn(self.conv(x)), 0.5, training=self.training)


def test_mmengine_tune_mode_freezes_the_mode_of_dropout():
    """The forward of the user's model is not replaced by a trace: its mode still decides."""
    folded = api.fold_bn(randomize_norms(ActiveOnlyInTraining().double().eval()), example_inputs=image())
    assert "forward" not in vars(folded)
    assert not bool((folded(image()) == 0).any())
    nn.Module.train(folded)
    assert 0.3 < float((folded(image()) == 0).double().mean()) < 0.7


@pytest.mark.parametrize("padding", [0, 1])
def test_norm_before_a_padded_conv_is_folded_as_if_unpadded(padding: int):
    model = randomize_norms(layers.chain(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=padding)).double().eval())
    expected = Reason.NONZERO_PADDING if padding else None
    assert reasons(folded_exactly(model, image())) == [expected]


def test_mmdetection_unknown_scale_in_a_cloned_weight():
    """The scale is applied once, however often the fold runs."""
    model = ZOO["ConvIntoShapeOnly"].build()
    once = api.fold_bn(model, example_inputs=image())
    assert_parity(model, api.fold_bn(once, example_inputs=image()), image())


# crashes on legal models


def test_fx_linear_and_norm_without_affine():
    assert reasons(folded_exactly(ZOO["linear_without_affine"].build(), image(3, 5))) == [None]


def test_brevitas_aimet_conv_and_norm_without_affine():
    assert reasons(folded_exactly(ZOO["without_affine_and_bias"].build(), image())) == [None]


def test_torch_brevitas_inductor_mmengine_grouped_transposed_conv():
    assert reasons(folded_exactly(ZOO["grouped_transposed"].build(), image())) == [None]


def test_mmengine_norm_on_the_input():
    assert reasons(folded_exactly(ZOO["norm_on_input"].build(), image())) == [Reason.NO_PRODUCER]


def test_mmengine_torchao_brevitas_aimet_no_running_statistics():
    assert reasons(folded_exactly(ZOO["without_running_statistics"].build(), image())) == [Reason.BATCH_STATISTICS]


def test_inductor_dotted_names():
    model = randomize_norms(nn.Sequential(nn.Sequential(sharing.ConvBN())).double().eval())
    report = folded_exactly(model, image())
    assert report.applied[0].subject == "0.0.bn"
    assert report.applied[0].partners == ("0.0.conv",)


def test_ultralytics_channels_last():
    assert reasons(folded_exactly(ZOO["channels_last"].build(), ZOO["channels_last"].inputs())) == [None]


def test_weight_norm_breaks_deepcopy():
    """After one call, the computed weight is no leaf and ``copy.deepcopy`` of the model fails."""
    model = ZOO["old_weight_norm"].build()
    model(image())
    result = api.apply(model, api.EXACT_PASSES, example_inputs=image())
    assert_parity(model, result.model, image())
    assert result.report.norms[0].status is Status.APPLIED


# what others miss


def test_norm_with_activation_loses_its_activation():
    """Replacing a BatchNormAct2d, which is a BatchNorm2d, by an identity drops the activation."""
    assert reasons(folded_exactly(ZOO["norm_with_activation"].build(), image())) == [None]


@pytest.mark.parametrize(
    "name",
    ["ConcatOfConvs", "linear_flattened", "before_unpadded_conv", "conv_same", "sync_batch_norm", "frozen_batch_norm",
     "FunctionalLayers", "channel_shuffle", "ForwardIntoBranches"],
)  # fmt: skip
def test_foldable_norms_that_are_left(name: str):
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    assert reasons(folded_exactly(model, inputs)) == [None]


def test_user_model_is_corrupted_or_retyped():
    """brevitas changes the original, fx returns a GraphModule."""
    model = ZOO["ConvIntoShapeOnly"].build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = api.fold_bn(model, example_inputs=image())
    assert type(folded) is type(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


# silence


def test_every_refusal_has_a_reason_and_names_a_layer():
    for trap in ZOO.values():
        for outcome in normfuse.inspect(trap.build(), example_inputs=trap.inputs()).refused:
            assert outcome.refusal is not None
            assert len(outcome.refusal.detail) > 10, trap.name


def test_fold_that_does_nothing_says_so(caplog: pytest.LogCaptureFixture):
    """One warning, with the reason that comes up most."""
    with caplog.at_level(logging.INFO, "normfuse"):
        api.fold_bn(ZOO["ConvIntoTwoNorms"].build(), example_inputs=image())
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert Reason.EXTRA_CONSUMER.value in warning.getMessage()


def test_fold_that_does_something_does_not_warn(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "normfuse"):
        api.fold_bn(ZOO["ConvIntoShapeOnly"].build(), example_inputs=image())
    assert [record.levelno for record in caplog.records] == [logging.INFO]
