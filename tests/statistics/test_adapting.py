"""How a model enters, carries and ends an adaptation: objects, copies, files, devices, and folding afterwards."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import OrderError
from normfuse.statistics import SAR, AdaB2N, SourceFree, alpha_bn, freeze, leave, sar_parameters, unmix_tns
from tests.parity import EXACT, error, outputs
from tests.statistics.networks import images, network, norms_of

KINDS = {"alpha": alpha_bn, "unmix": unmix_tns, "decaying": lambda m: SourceFree(m).model}


@pytest.mark.parametrize("kind", KINDS)
def test_objects_and_keys_stay(kind: str):
    model = network()
    norms, keys, parameters = norms_of(model), list(model.state_dict()), [*model.parameters()]
    adapted = KINDS[kind](model)
    adapted(images(4))
    assert adapted is model
    assert all(one is other for one, other in zip(norms, norms_of(model), strict=True))
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    leave(model)
    assert [type(norm).__name__ for norm in norms] == ["BatchNorm2d", "BatchNorm2d", "BatchNorm1d"]
    assert not [name for norm in norms for name in vars(norm) if "adapting" in name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_on_their_own(kind: str, how: Any):
    model = KINDS[kind](network())
    model(images(4, 1))
    twin = how(model)
    alone = KINDS[kind](network())
    alone(images(4, 1))
    twin(images(4, 2))
    assert error(alone(images(4, 3)), model(images(4, 3))) <= EXACT
    assert error(alone(images(4, 2)), model(images(4, 2))) <= EXACT
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert error(model(images(4)), loaded(images(4))) <= EXACT


def test_components_move_with_the_model():
    model = unmix_tns(network()).float()
    state = norms_of(model)[0].adaptation
    assert state.mean.dtype == torch.float32
    assert model(images(4).float()).dtype == torch.float32
    assert model.half()(images(4).half()).isfinite().all()
    assert norms_of(model)[0].adaptation.mean.dtype == torch.float32


def test_a_frozen_mixture_folds():
    x = images(16)
    model = alpha_bn(network(), 0.3)
    with pytest.raises(OrderError, match=r"normfuse\.statistics\.freeze"):
        normfuse.fold(model, example_inputs=x)
    for part in x.split(4):
        model(part)
    seen = norms_of(model)[0].adaptation.seen
    source = norms_of(network())[0]
    freeze(model)
    assert error(0.7 * source.running_var + 0.3 * seen.variance, norms_of(model)[0].running_var) <= EXACT
    assert error(model[0](x).detach().var((0, 2, 3), correction=0), seen.variance) <= EXACT
    folded = normfuse.fold(model, example_inputs=x)
    assert not norms_of(folded)
    assert error(model(x), outputs(folded, x)[0]) <= EXACT


def test_unmix_tns_cannot_be_frozen_and_stays_as_it_is():
    model = unmix_tns(network())
    with pytest.raises(ValueError, match="its own statistics"):
        freeze(model)
    assert norms_of(model)[0].adaptation is not None
    with pytest.raises(OrderError, match=r"normfuse\.statistics\.leave"):
        normfuse.fold(model, example_inputs=images(2))
    assert len(normfuse.inspect(leave(model), example_inputs=images(2)).applied) == 3


def test_only_chosen_norms_adapt_and_one_that_does_is_left():
    model = alpha_bn(network(), 0.4, include=["1"])
    unmix_tns(model, exclude=["9"])
    kinds = [type(norm).__name__.partition("_")[0] for norm in norms_of(model)]
    assert kinds == ["AlphaNorm", "UnMixNorm", "BatchNorm1d"]
    assert norms_of(model)[0].adaptation.weight == 0.4


def test_a_class_that_does_more_than_normalize_does_it_still():
    timm = pytest.importorskip("timm")
    norm = timm.layers.BatchNormAct2d(3).double().eval()
    plain = nn.BatchNorm2d(3).double().eval()
    x = images(5)
    expected = alpha_bn(nn.Sequential(plain), 0.5)(x).relu()
    assert error(expected, alpha_bn(nn.Sequential(norm), 0.5)(x)) <= EXACT


def test_affine_false_and_frozen_norms():
    frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(3)
    x = images(5)
    for norm in (nn.BatchNorm2d(3, affine=False), frozen):
        adapted = alpha_bn(nn.Sequential(norm).double().eval(), 1.0)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        assert error((x - mean) / torch.sqrt(var + 1e-5), adapted(x)) <= 1e-6 if norm is frozen else EXACT


def test_sar_trains_gains_and_shifts_outside_of_the_last_stage():
    resnet = pytest.importorskip("torchvision").models.resnet18(num_classes=5)
    chosen = {id(p) for p in sar_parameters(resnet)}
    names = [name for name, p in resnet.named_parameters() if id(p) in chosen]
    assert len(names) == 30
    assert not [name for name in names if "layer4" in name or "conv" in name]
    assert [p.requires_grad for p in resnet.parameters()] == [id(p) in chosen for p in resnet.parameters()]
    vit = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    names = [n for n, p in vit.named_parameters() if id(p) in {id(q) for q in sar_parameters(vit)}]
    assert len(names) == 9 * 2 * 2
    assert not [n for n in names if n.startswith("norm") or n.split(".")[1] in ("9", "10", "11")]


def test_sar_on_a_network_without_batch_norm_and_on_unmixed_norms():
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(147), nn.Linear(147, 5)).double()
    adapted = SAR(model, margin=9.0, reset_below=0.0)
    before = model[1].weight.detach().clone()
    assert adapted(images(4)).shape == (4, 5)
    assert not torch.equal(before, model[1].weight)
    assert adapted.finish() is model
    unmixed = SAR(unmix_tns(network()))
    unmixed(images(4))
    assert {type(n).__name__.partition("_")[0] for n in norms_of(unmixed.model)} == {"UnMixNorm"}
    assert type(norms_of(unmixed.finish())[0]) is nn.BatchNorm2d
    plain = SAR(network())
    plain(images(4))
    assert type(norms_of(plain.finish())[0]) is nn.BatchNorm2d


def no_momentum() -> nn.Sequential:
    model = network()
    model[1].momentum = None
    return model


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: alpha_bn(network(), 2.0), "from 0 to 1"),
        (lambda: alpha_bn(nn.Linear(2, 2)), "stores statistics"),
        (lambda: unmix_tns(network(), components=0), "components >= 1"),
        (lambda: unmix_tns(no_momentum()), "momentum"),
        (lambda: AdaB2N(no_momentum(), 2), "momentum"),
        (lambda: AdaB2N(network(), 2, kappa=2), "kappa"),
        (lambda: AdaB2N(network(), 2).penalty(), "no batch"),
        (lambda: AdaB2N(network(), 2).set_tasks(torch.tensor([1])), "task 1 has not begun"),
        (lambda: SourceFree(network(), initial=2), "initial"),
        (lambda: SourceFree(network()).penalty(), "no batch"),
        (lambda: SAR(nn.Linear(2, 2)), "gain or shift"),
        (lambda: alpha_bn(normfuse.tune_mode(network())), "Tune mode"),
    ],
)
def test_wrong_calls(call: Any, text: str):
    with pytest.raises(ValueError, match=text):
        call()


def test_tasks_must_be_those_of_the_batch():
    balance = AdaB2N(network().train(), 2)
    balance.end_task()
    balance.set_tasks(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 tasks were given for a batch of 4"):
        balance.model(images(4))
