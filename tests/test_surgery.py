"""Edits of a module: tensors keep what they are, structure can be rebuilt from a log, nothing else is built."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from normfuse import api, surgery
from tests.parity import assert_parity
from tests.zoo import ZOO, sharing
from tests.zoo.trap import FOLDED, image

STRUCTURAL = [trap for trap in ZOO.values() if FOLDED in trap.verdicts.values() and trap.name != "Compiled"]


def assign(model: nn.Module, **tensors: torch.Tensor) -> None:
    surgery.assign(model.get_submodule, {name.replace("__", "."): value for name, value in tensors.items()})


def test_assigned_parameter_keeps_type_layout_and_gradient_flag():
    model = nn.Conv2d(4, 4, 3).half().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.weight.requires_grad_(False)
    assign(model, weight=torch.full((4, 4, 3, 3), 1 / 3, dtype=torch.float64))
    assert isinstance(model.weight, nn.Parameter)
    assert model.weight.dtype == torch.float16
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.weight.requires_grad
    assert float(model.weight[0, 0, 0, 0]) == float(torch.tensor(1 / 3).half())


def test_missing_bias_is_created_like_the_weight():
    model = nn.Conv2d(4, 4, 3, bias=False).to(torch.bfloat16)
    assign(model, bias=torch.ones(4))
    assert isinstance(model.bias, nn.Parameter)
    assert model.bias.dtype == torch.bfloat16
    assert "bias" in model.state_dict()


def test_assigned_buffer_stays_a_buffer():
    model = nn.BatchNorm2d(2)
    assign(model, running_mean=torch.ones(2).double().requires_grad_() * 2)
    assert "running_mean" in dict(model.named_buffers())
    assert not model.running_mean.requires_grad


def test_old_tensor_is_replaced_and_not_written():
    model = nn.Linear(2, 2)
    old, before = model.weight, model.weight.detach().clone()
    assign(model, weight=torch.zeros(2, 2))
    assert model.weight is not old
    assert torch.equal(old, before)


def test_replace_reaches_every_name_of_a_module():
    model = ZOO["NormUnderTwoNames"].build()
    surgery.perform(model, {"op": "replace", "path": "alias", "module": surgery.IDENTITY})
    assert isinstance(model.bn, nn.Identity)
    assert model.alias is model.bn


def test_replace_inside_containers():
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(nn.BatchNorm2d(1))])})
    surgery.perform(model, {"op": "replace", "path": "a.0.0", "module": surgery.IDENTITY})
    assert isinstance(model.get_submodule("a.0.0"), nn.Identity)


def test_built_module_has_the_type_of_what_it_replaces():
    model = nn.Sequential(nn.Linear(2, 2).double())
    spec = {"class": "torch.nn.modules.linear.Linear", "kwargs": {"in_features": 2, "out_features": 3}}
    surgery.perform(model, {"op": "replace", "path": "0", "module": spec})
    assert model[0].weight.dtype == torch.float64
    assert not model[0].training


@pytest.mark.parametrize("path", ["builtins.eval", "os.system", "torch.nn.modules.container.Sequential", "nothing"])
def test_only_known_classes_are_built(path: str):
    for edit in (
        {"op": "replace", "path": "0", "module": {"class": path, "kwargs": {}}},
        {"op": "retype", "path": "0", "class": path},
    ):
        with pytest.raises(ValueError, match="cannot build"):
            surgery.perform(nn.Sequential(nn.Identity()), edit)


def test_unknown_edit():
    with pytest.raises(ValueError, match="unknown edit 'explode'"):
        surgery.perform(nn.Sequential(), {"op": "explode"})


@pytest.mark.parametrize("trap", STRUCTURAL, ids=lambda t: t.name)
def test_structure_is_rebuilt_from_the_manifest(trap):
    """What a folded model records, as JSON, and its state_dict give it back on a fresh model."""
    folded = api.fold(trap.build(), example_inputs=trap.inputs())
    edits = json.loads(json.dumps(folded.normfuse_manifest["edits"]))
    fresh = api.unwrap(trap.build())
    surgery.replay(fresh, edits)
    for name, tensor in folded.state_dict().items():
        owner, _, attribute = name.rpartition(".")
        if getattr(fresh.get_submodule(owner), attribute, None) is None:
            fresh.get_submodule(owner).register_parameter(attribute, nn.Parameter(tensor.clone()))
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert_parity(folded, fresh, trap.inputs(), tolerance=trap.tolerance)


def test_copy_of_a_model_that_deepcopy_refuses():
    model = ZOO["old_weight_norm"].build()
    with torch.enable_grad():
        model(image())
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert_parity(model, surgery.copy(model), image())


def test_copy_shares_nothing():
    model = sharing.ConvBN()
    other = surgery.copy(model)
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert pointers.isdisjoint(t.data_ptr() for t in other.state_dict().values())


def test_copy_of_a_lazy_norm():
    assert isinstance(surgery.copy(nn.LazyBatchNorm2d()), nn.LazyBatchNorm2d)


def test_module_names_list_every_name():
    model = ZOO["NormUnderTwoNames"].build()
    assert surgery.module_names(model)[id(model.bn)] == ("bn", "alias")


def test_materialize_makes_a_computed_weight_plain():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))).double()
    source = copy.deepcopy(model)
    surgery.perform(model, {"op": "materialize", "path": "0", "tensor": "weight"})
    assert list(model.state_dict()) == ["0.bias", "0.weight"]
    assert_parity(source, model, image(2, 3))


def test_untie_and_drop():
    model = ZOO["TiedParameters"].build()
    surgery.perform(model, {"op": "untie", "tensor": "other.weight"})
    assert model.other.weight is not model.conv.weight
    assert torch.equal(model.other.weight, model.conv.weight)
    surgery.perform(model, {"op": "drop", "tensor": "conv.bias"})
    assert model.conv.bias is None
