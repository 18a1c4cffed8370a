"""What holds for every model and every run: nothing is lost from the report, nothing of the user's is changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import api, norms
from normfuse.capture import capture, unwrap
from normfuse.errors import DeployedModelError
from normfuse.report import Report, Status
from tests.parity import assert_parity
from tests.zoo import ZOO, Trap, layers, sharing
from tests.zoo.trap import image

every_trap = pytest.mark.parametrize("trap", ZOO.values(), ids=ZOO)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert list(before) == list(after)
    for key, old in before.items():
        new = after[key]
        assert (old.dtype, old.shape, old.stride()) == (new.dtype, new.shape, new.stride()), key
        assert torch.equal(old, new), key


def verdicts(report: Report) -> dict[str, Any]:
    return {o.subject: o.refusal.reason if o.refusal and o.status is Status.REFUSED else o.status for o in report.norms}


@every_trap
def test_fold_bn_on_every_trap(trap: Trap):
    """The verdict on each norm is the expected one, and the function of the model stays what it was."""
    model, inputs = trap.build(), trap.inputs()
    result = api.apply(model, ["fold-bn"], example_inputs=inputs)
    assert verdicts(result.report) == dict(trap.verdicts)
    assert_parity(unwrap(model), result.model, inputs, tolerance=trap.tolerance)


@every_trap
def test_fold_on_every_trap(trap: Trap):
    """Every exact pass together keeps the function, and each norm is in the report once."""
    model, inputs = trap.build(), trap.inputs()
    result = api.apply(model, api.EXACT_PASSES, example_inputs=inputs)
    assert_parity(unwrap(model), result.model, inputs, tolerance=trap.tolerance)
    assert set(verdicts(result.report)) == set(trap.verdicts)
    assert len(result.report.norms) == len(trap.verdicts)


@every_trap
def test_fold_without_inputs_on_every_trap(trap: Trap):
    """What a symbolic capture folds is right too, and it changes nothing of the source."""
    model, inputs = trap.build(), trap.inputs()
    before = state_of(model)
    try:
        result = api.apply(model, api.EXACT_PASSES)
    except normfuse.CaptureError:
        assert normfuse.fold(model, example_inputs=inputs) is not model  # recording reads what no tracer takes
        return
    assert_same_bits(before, state_of(model))
    assert set(verdicts(result.report)) >= {name for name in trap.verdicts if ":" not in name}
    assert_parity(unwrap(model), result.model, inputs, tolerance=trap.tolerance)


@every_trap
def test_source_is_not_changed(trap: Trap):
    model, inputs = trap.build(), trap.inputs()
    before, modes = state_of(model), [m.training for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    normfuse.inspect(model, api.EXACT_PASSES, example_inputs=inputs)
    api.fold(model, example_inputs=inputs)
    assert_same_bits(before, state_of(model))
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes


@every_trap
def test_inspect_says_what_a_run_does(trap: Trap):
    model, inputs = trap.build(), trap.inputs()
    said = normfuse.inspect(model, ["fold-bn"], example_inputs=inputs)
    assert said == api.apply(model, ["fold-bn"], example_inputs=inputs).report


@every_trap
def test_second_run_changes_nothing(trap: Trap):
    model, inputs = trap.build(), trap.inputs()
    once = api.fold_bn(model, example_inputs=inputs)
    twice = api.apply(once, ["fold-bn"], example_inputs=inputs)
    assert not twice.report.applied
    assert_same_bits(state_of(once), state_of(twice.model))


@every_trap
def test_folded_model_can_be_copied_and_stored(trap: Trap):
    model, inputs = trap.build(), trap.inputs()
    folded = api.fold_bn(model, example_inputs=inputs)
    assert_parity(folded, copy.deepcopy(folded), inputs, tolerance=trap.tolerance)
    if not any(nn.utils.parametrize.is_parametrized(module) for module in folded.modules()):  # torch pickles none
        assert_parity(folded, pickle.loads(pickle.dumps(folded)), inputs, tolerance=trap.tolerance)


@every_trap
def test_folded_model_refuses_training(trap: Trap):
    folded = api.fold_bn(trap.build(), example_inputs=trap.inputs())
    assert folded.eval() is folded
    if Status.APPLIED not in trap.verdicts.values():
        return
    for model in (folded, copy.deepcopy(folded), nn.Sequential(folded)):
        with pytest.raises(DeployedModelError, match="folded"):
            model.train()


@pytest.mark.parametrize(
    "trap", [t for t in ZOO.values() if Status.APPLIED in t.verdicts.values()], ids=lambda t: t.name
)
def test_keys_that_survive_keep_their_names(trap: Trap):
    """Only keys of norms may go, and only biases may come."""
    model = unwrap(trap.build())
    before, after = set(model.state_dict()), set(api.fold_bn(model, example_inputs=trap.inputs()).state_dict())
    gone = {key for key in before - after if norms_own(key, model)}
    assert before - after == gone
    assert all(key.endswith("bias") for key in after - before)


def norms_own(key: str, model: nn.Module) -> bool:
    return norms.is_norm(model.get_submodule(key.rpartition(".")[0]))


class Mixed(sharing.ConvBN):
    """A module that changes itself when its mode is set, as some frozen backbones do."""

    def train(self, mode: bool = True) -> Mixed:
        super().train(mode)
        self.bn.eval()
        return self


def test_modes_of_every_module_are_kept():
    model = nn.Sequential(Mixed(), sharing.ConvBN()).double().train()
    model[1].conv.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    folded = api.fold_bn(model, example_inputs=image())
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert not any(m.training for m in folded.modules())


def test_training_model_is_folded_in_its_eval_form_and_says_so():
    model = sharing.ConvBN().double().train()
    result = api.apply(model, ["fold-bn"], example_inputs=image())
    assert "training mode" in " ".join(result.report.notes)
    assert_parity(model, result.model, image())


def test_norm_in_training_mode_inside_an_eval_model_is_refused_and_stays():
    model = ZOO["ChainedNorms"].build()
    model.bn2.train()
    before = model(image())
    model.bn2.load_state_dict(ZOO["ChainedNorms"].build().bn2.state_dict())
    result = api.apply(model, ["fold-bn"], example_inputs=image())
    assert verdicts(result.report) == {"bn": Status.APPLIED, "bn2": normfuse.Reason.BATCH_STATISTICS}
    assert result.model.bn2.training
    torch.testing.assert_close(result.model(image()), before, rtol=1e-10, atol=1e-10)


def test_dropout_left_active_stops_a_shift():
    model = layers.chain(nn.Conv2d(4, 4, 3), nn.Dropout(), nn.BatchNorm2d(4)).double().eval()
    model[1].train()
    report = normfuse.inspect(model, example_inputs=image())
    assert verdicts(report) == {"2": normfuse.Reason.OPAQUE_OPERATION}


def test_in_place_edits_the_model_itself():
    model = ZOO["ConvIntoShapeOnly"].build()
    source = copy.deepcopy(model)
    assert api.fold_bn(model, example_inputs=image(), inplace=True) is model
    assert isinstance(model.bn, nn.Identity)
    assert_parity(source, model, image())


def test_parameters_stay_what_they_are():
    """Device, dtype, memory format and whether a gradient is wanted."""
    model = ZOO["channels_last"].build()
    model[0].weight.requires_grad_(False)
    folded = api.fold_bn(model, example_inputs=ZOO["channels_last"].inputs())
    weight = folded[0].weight
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_buffer_that_absorbs_stays_a_plain_buffer():
    model = ZOO["PositionEmbedding"].build()
    position = model.position.detach()
    del model.position
    model.register_buffer("position", position)
    inputs = ZOO["PositionEmbedding"].inputs()
    folded = api.fold_bn(model, example_inputs=inputs)
    assert isinstance(folded.bn, nn.Identity)
    assert "position" in dict(folded.named_buffers())
    assert folded.position.grad_fn is None
    assert_parity(model, copy.deepcopy(folded), inputs)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exclude": ["bn2"]}, {"bn": Status.APPLIED, "bn2": normfuse.Reason.EXCLUDED}),
        ({"include": ["bn"]}, {"bn": Status.APPLIED, "bn2": normfuse.Reason.EXCLUDED}),
        ({"exclude": ["conv"]}, {"bn": normfuse.Reason.EXCLUDED, "bn2": Status.APPLIED}),
        ({"exclude": ["*"]}, {"bn": normfuse.Reason.EXCLUDED, "bn2": normfuse.Reason.EXCLUDED}),
    ],
)
def test_layers_left_out_by_the_user_are_not_touched(options: dict[str, list[str]], expected: dict[str, Any]):
    """An excluded conv keeps its weights: then the second norm goes into the first."""
    result = api.apply(ZOO["ChainedNorms"].build(), ["fold-bn"], example_inputs=image(), **options)
    assert verdicts(result.report) == expected
    assert_parity(ZOO["ChainedNorms"].build(), result.model, image())


def test_report_lists_norms_in_order_of_execution():
    model = ZOO["BranchOnInput"].build()
    assert [norm.name for norm in norms.find_norms(capture(model, image()))] == ["bn", "bn2"]
    assert [o.subject for o in normfuse.inspect(model, example_inputs=image()).norms] == ["bn", "bn2"]


def test_unknown_pass_is_a_value_error():
    with pytest.raises(ValueError, match="fold-bn"):
        api.apply(nn.Sequential(), ["fold-nb"], example_inputs=image())
