"""Methods and hooks put on modules from outside: they are read as what they do, or refused by name."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import normfuse
from normfuse import CaptureError, Reason, Status
from normfuse.capture.leaves import base_layer
from normfuse.patches import patched
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image


def net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    )
    return randomize_norms(model.double().eval())  # type: ignore[return-value]


def bind(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    setattr(module, name, types.MethodType(function, module))


def pads_with_ones(conv: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), weight, bias)


def doubles(conv: Any, x: Tensor) -> Tensor:
    return conv._conv_forward(x, conv.weight, conv.bias) * 2


def skips(block: Any, x: Tensor) -> Tensor:
    return block[1](block[0](x)) + block[0](x).sigmoid()


def as_accelerate(module: nn.Module) -> None:
    """Leave on a module what a library does that moves weights between devices."""
    module._old_forward = module.forward  # type: ignore[assignment]
    module.forward = functools.partial(lambda module, *args: module._old_forward(*args), module)


PATCHES: dict[str, Callable[[nn.Sequential], None]] = {
    "convolution's inner method": lambda m: bind(m[0], "_conv_forward", pads_with_ones),
    "convolution's forward": lambda m: bind(m[0], "forward", doubles),
    "convolution, as accelerate does": lambda m: as_accelerate(m[0]),
    "norm's forward": lambda m: bind(m[1], "forward", lambda bn, x: nn.BatchNorm2d.forward(bn, x) + 1),
    "norm, as accelerate does": lambda m: as_accelerate(m[1]),
    "container's forward": lambda m: bind(m[2], "forward", lambda block, x: block[0](x) + x),
    "model's forward": lambda m: bind(m, "forward", skips),
    "model's call": lambda m: bind(m, "_call_impl", skips),
}


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("traced", [False, True])
def test_a_patched_model_is_folded_as_what_it_does(patch: str, traced: bool):
    model = net()
    PATCHES[patch](model)
    assert_parity(model, normfuse.fold(model, example_inputs=None if traced else image()), image())


def test_a_model_of_which_only_a_patched_method_runs_cannot_be_traced():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    bind(model, "forward", skips)
    with pytest.raises(CaptureError, match=r"replaced on the instance.*example_inputs"):
        normfuse.fold(model)


@pytest.mark.parametrize("patch", ["convolution's inner method", "convolution's forward"])
def test_a_patched_convolution_takes_its_norm(patch: str):
    model = net()
    PATCHES[patch](model)
    report = normfuse.inspect(model, example_inputs=image())
    assert [o.status for o in report.norms] == [Status.APPLIED]


@pytest.mark.parametrize("patch", ["norm's forward", "norm, as accelerate does"])
def test_a_patch_is_not_lost_with_a_norm(patch: str):
    model = net()
    PATCHES[patch](model)
    (outcome,) = normfuse.inspect(model, example_inputs=image()).norms
    assert outcome.refusal is not None
    assert outcome.refusal.reason is Reason.FORWARD_OVERRIDDEN
    assert outcome.refusal.detail == "1.forward was replaced on the instance, which would be lost with the layer"
    del model[1].forward
    assert normfuse.inspect(model, example_inputs=image())


@pytest.mark.parametrize("traced", [False, True])
def test_a_layer_patched_in_its_class_is_read_through(traced: bool, monkeypatch: pytest.MonkeyPatch):
    original = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", functools.wraps(original)(lambda self, x: original(self, x) * 2))
    assert base_layer(nn.Conv2d(1, 1, 1)) is None
    model = net()
    assert_parity(model, normfuse.fold(model, example_inputs=None if traced else image()), image())


def test_what_is_no_patch():
    layer = nn.TransformerEncoderLayer(4, 2)
    assert patched(layer) is None  # it keeps its activation as an attribute
    layer.train = lambda mode=True: layer  # type: ignore[method-assign]
    assert patched(layer) is None
    assert patched(nn.LSTM(2, 2)) is None


REGISTER = {
    "forward": lambda: torch_module.register_module_forward_hook(lambda module, args, output: output * 2),
    "forward, always": lambda: torch_module.register_module_forward_hook(lambda *_: None, always_call=True),
    "before forward": lambda: torch_module.register_module_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "backward": lambda: torch_module.register_module_full_backward_hook(lambda *_: None),
    "before backward": lambda: torch_module.register_module_full_backward_pre_hook(lambda *_: None),
}


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> Iterator[None]:
    handle = REGISTER[request.param]()
    yield
    handle.remove()


@pytest.mark.parametrize("registered", REGISTER, indirect=True)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.usefixtures("registered")
def test_hooks_around_every_module_are_seen(traced: bool):
    model = net()
    result = normfuse.apply(model, ["fold-bn"], example_inputs=None if traced else image())
    refusal = result.report.norms[0].refusal
    assert refusal is not None
    assert refusal.reason is Reason.HAS_HOOKS
    assert "a hook around every module" in refusal.detail
    assert_parity(model, result.model, image())


@pytest.mark.parametrize(
    "register",
    [
        lambda norm: norm.register_forward_hook(lambda *_: None),
        lambda norm: norm.register_full_backward_pre_hook(lambda *_: None),
        lambda norm: norm.register_state_dict_post_hook(lambda *_: None),
        lambda norm: norm.register_load_state_dict_pre_hook(lambda *_: None),
    ],
)
def test_no_hook_is_lost_with_a_norm(register: Callable[[nn.Module], Any]):
    model = net()
    handle = register(model[1])
    (outcome,) = normfuse.inspect(model, example_inputs=image()).norms
    assert outcome.refusal is not None
    assert outcome.refusal.reason is Reason.HAS_HOOKS
    handle.remove()
    assert normfuse.inspect(model, example_inputs=image())


def test_a_hook_on_another_layer_is_not_in_the_way():
    model = net()
    seen: list[torch.Size] = []
    model[2][1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    folded = normfuse.fold(model, example_inputs=image())
    assert isinstance(folded[1], nn.Identity)
    seen.clear()
    folded(image())
    assert len(seen) == 1
