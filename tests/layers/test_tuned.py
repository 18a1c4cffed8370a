"""Layers in Tune mode: their classes, copies and files, what is trained of them, number formats, and the clamp."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.layers.change_of_class import enter
from normfuse.layers.clamp import Clamp
from normfuse.layers.tuned import FixedNorm, TunedNorm, TunedProduct, TunedReLU6
from tests.gradients import apply_norm, assert_same, assert_tunes, gradients, hard_norms
from tests.parity import EXACT, error
from tests.zoo.trap import image


def network() -> nn.Sequential:
    """Return pairs of every kind of layer, a clamp between two of them, and a norm that is not paired."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 8 * 8, 5),
    )
    return hard_norms(model.double())  # type: ignore[return-value]


INPUTS = (2, 4, 4, 4)


def test_classes():
    model = network()
    kinds = [type(layer) for layer in model]
    normfuse.tune_mode(model)
    found = [
        next((k for k in (TunedProduct, TunedNorm, TunedReLU6, FixedNorm) if isinstance(m, k)), None) for m in model
    ]
    assert found == [TunedProduct, TunedNorm, TunedReLU6, TunedProduct, TunedNorm, None, FixedNorm, None, None]
    assert all(isinstance(layer, kind) for layer, kind in zip(model, kinds, strict=True))
    assert type(model[0]).__name__ == "TunedConv2d"
    assert type(model[6]).__name__ == "FixedBatchNorm2d"
    assert type(model[0]) is type(normfuse.tune_mode(network())[0]), "one class for all layers of a kind"
    assert repr(model[4]).startswith("TunedBatchNorm2d(6,")


def test_the_norm_is_no_part_of_the_product():
    model = normfuse.tune_mode(network())
    assert not list(model[0].children())
    assert len(list(model.modules())) == len(list(network().modules()))
    assert vars(model[0])["_normfuse_tuned"].norm is model[1]


# what is trained

TRAINED: dict[str, Any] = {
    "everything": lambda name: True,
    "all but the weights": lambda name: name not in ("0.weight", "3.weight", "8.weight"),
    "all but the gains": lambda name: name not in ("1.weight", "4.weight", "6.weight"),
    "norms": lambda name: name[0] in "146",
    "shifts": lambda name: name in ("1.bias", "4.bias", "6.bias"),
    "biases": lambda name: name.endswith("bias"),
    "weights": lambda name: name in ("0.weight", "3.weight"),
    "gains": lambda name: name in ("1.weight", "4.weight"),
    "the last layer": lambda name: name.startswith("8."),
    "nothing": lambda name: False,
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("trained", TRAINED)
def test_what_is_trained(trained: str, affine: bool):
    """The gradients asked for are there, that of the input with them, and no others."""
    model = network()
    if not affine:
        model[1], model[4] = (hard_norms(nn.BatchNorm2d(c, affine=False).double()) for c in (8, 6))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED[trained](name))
    assert_tunes(model, image(*INPUTS), recorded=False)
    tuned_model = normfuse.tune_mode(copy.deepcopy(model))
    for m in (model.eval(), tuned_model):
        loss = m(image(*INPUTS)).square().sum()  # the input is not trained here
        if loss.requires_grad:
            loss.backward()
    for (name, one), two in zip(model.named_parameters(), tuned_model.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or error(one.grad, two.grad) <= EXACT or one.grad.abs().max() < 1e-6, name


@pytest.mark.parametrize("shape", [(3, 4), (3, 6, 4)])
@pytest.mark.parametrize("trained", ["weight", "gain", "shift", "nothing"])
def test_linear_over_rows(shape: tuple[int, ...], trained: str):
    """A linear layer writes the last axis, whatever stands before it."""
    torch.manual_seed(0)
    layer, norm = nn.Linear(4, 6).double(), hard_norms(nn.BatchNorm1d(6).double().eval())
    for name, tensor in {"weight": layer.weight, "gain": norm.weight, "shift": norm.bias}.items():
        tensor.requires_grad_(name == trained)
    layer.bias.requires_grad_(False)
    x = image(*shape).requires_grad_()
    expected = norm(layer(x).reshape(-1, 6)).reshape(*shape[:-1], 6)
    apply_norm(layer, norm)
    found = layer(x)
    leaves = [x, *(t for t in (layer.weight, norm.weight, norm.bias) if t.requires_grad)]
    grad = torch.randn_like(expected)
    assert error(expected.detach(), found.detach()) <= EXACT
    for one, two in zip(
        torch.autograd.grad(expected, leaves, grad), torch.autograd.grad(found, leaves, grad), strict=True
    ):
        assert error(one, two) <= EXACT


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_without_gradients(grad: Any):
    model = network().eval()
    tuned_model = normfuse.tune_mode(copy.deepcopy(model))
    with grad():
        assert error(model(image(*INPUTS)), tuned_model(image(*INPUTS))) <= EXACT


def test_empty_batch():
    """As a detector without proposals has it: gradients are zero, not missing."""
    model = network()
    assert_tunes(model, image(*INPUTS)[:0], recorded=False)


# copies and files


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, by_pickle, by_file])
def test_copies(way: Any):
    """A copy has the pairs of its own layers, trains on its own, and can be taken out of Tune mode."""
    model = normfuse.tune_mode(network()).train()
    expected = gradients(model, image(*INPUTS))
    copied = way(model)
    assert [type(m) for m in copied] == [type(m) for m in model]
    assert copied.training
    assert vars(copied[3])["_normfuse_tuned"].norm is copied[4]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert_same(expected, gradients(copied, image(*INPUTS)))
    normfuse.tune_mode(copied, False)
    assert [type(m) for m in copied] == [type(m) for m in network()]
    assert_same(expected, gradients(copied.eval(), image(*INPUTS)))


# number formats


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_dtypes(dtype: torch.dtype, tolerance: float):
    """Conversion after Tune mode was entered; results have the dtype that eval mode gives them."""
    model = network().to(dtype).eval()
    tuned_model = normfuse.tune_mode(network()).to(dtype)
    assert_same(
        gradients(model, image(*INPUTS, dtype=dtype)), gradients(tuned_model, image(*INPUTS, dtype=dtype)), tolerance
    )


@pytest.mark.parametrize("trained", ["everything", "norms", "shifts", "nothing"])
def test_autocast(trained: str):
    model = network().float().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED[trained](name))
    tuned_model = normfuse.tune_mode(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (gradients(m, image(*INPUTS, dtype=torch.float32)) for m in (model, tuned_model))
    assert_same(expected, found, 0.15)


@pytest.mark.parametrize("trained", ["weight", "gain", "shift"])
def test_autocast_of_a_linear_layer_over_rows(trained: str):
    """The result has the dtype of the product, as a norm gives it."""
    layer, norm = nn.Linear(4, 6), hard_norms(nn.BatchNorm1d(6).eval())
    for name, tensor in {"weight": layer.weight, "gain": norm.weight, "shift": norm.bias}.items():
        tensor.requires_grad_(name == trained)
    apply_norm(layer, norm)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(image(3, 6, 4, dtype=torch.float32)).dtype is torch.bfloat16


def test_autocast_leaves_float64_alone():
    model = network().eval()
    tuned_model = normfuse.tune_mode(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert error(model(image(*INPUTS)), tuned_model(image(*INPUTS))) <= EXACT


def test_wrong_dtype_raises_what_the_layer_raises():
    model = network().eval()
    tuned_model = normfuse.tune_mode(copy.deepcopy(model))
    errors = []
    for m in (model, tuned_model):
        with pytest.raises(RuntimeError) as info:
            m(image(*INPUTS, dtype=torch.float32))
        errors.append(str(info.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("which", ["input", "model", "both"])
def test_channels_last(which: str):
    model, inputs = network(), image(*INPUTS)
    if which != "input":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if which != "model":
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    assert_tunes(model, inputs, recorded=False)


# the clamp


@pytest.mark.parametrize("inplace", [False, True])
def test_clamp(inplace: bool):
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 3.0, 5.9, 6.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Clamp.apply(x * 2, -2.5, 6.25, inplace), x)
    assert torch.autograd.gradgradcheck(lambda x: Clamp.apply(x * 2, -2.5, 6.25, inplace), x)


@pytest.mark.parametrize("layer", [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 0.7)])
def test_clamp_on_its_bounds(layer: nn.Hardtanh):
    """Exactly on a bound the gradient is 0, as torch has it; NaN goes through."""
    values = torch.tensor([layer.min_val, layer.max_val, 0.1, -9.0, 9.0, float("nan")], dtype=torch.float64)
    results: list[Tensor] = []
    for one in (copy.deepcopy(layer), tuned_clamp(layer)):
        x = values.clone().requires_grad_()
        y = one(x * 1)
        (grad,) = torch.autograd.grad(y.nan_to_num().sum(), x)
        results.append(torch.stack([y.detach(), grad]))
    assert torch.equal(results[0].nan_to_num(7.0), results[1].nan_to_num(7.0))


def tuned_clamp(layer: nn.Hardtanh) -> nn.Hardtanh:
    copied = copy.deepcopy(layer)
    enter(copied, TunedReLU6)
    return copied


def test_only_clamps_that_layers_read_are_changed():
    """What a sum or a pool reads does not keep its input itself."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.MaxPool2d(2)
    )
    normfuse.tune_mode(model)
    assert isinstance(model[2], TunedReLU6)
    assert not isinstance(model[4], TunedReLU6)


def test_a_norm_restores_its_mode_after_an_exception():
    norm = nn.BatchNorm2d(4)
    enter(norm, FixedNorm)
    with pytest.raises(ValueError, match="expected 4D"):
        norm(torch.randn(4))
    assert norm.training
