"""Tune mode and what libraries do to a model that is in it: the result is eval mode's, or an error that says so."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, prune
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops.misc import FrozenBatchNorm2d

import normfuse
from normfuse.layers.change_of_class import TunedLayer
from normfuse.layers.normalized_value import NormalizedValue
from tests.gradients import assert_same, gradients, hard_norms, set_mode
from tests.parity import EXACT, error
from tests.zoo.trap import image


class Net(nn.Module):
    """Two pairs, one of them inside a block; an activation in place behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.inplace = True
        self.conv, self.bn = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)), inplace=self.inplace)
        return self.head(self.block(y).mean((2, 3)))


def network() -> Net:
    torch.manual_seed(0)
    return hard_norms(Net().double())  # type: ignore[return-value]


def tuned() -> Net:
    return normfuse.tune_mode(network()).train()


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_is_eval_mode(change: Callable[[Any], Any], training: bool = True) -> nn.Module:
    """Assert that a change of a tuned model gives what it gives of the model itself, whose norms are in eval mode."""
    plain, model = network(), tuned().train(training)
    expected = change(set_mode(plain, training)) or plain
    found = change(model) or model
    before = statistics(found)
    assert_same(gradients(expected, image()), gradients(found, image()))
    assert_same(before, statistics(found))
    return found


# layers that are put in the place of others


class Adapter(nn.Module):
    """LoRA as peft has it: the layer, and beside it a product of low rank."""

    def __init__(self, base: nn.Conv2d, merged: bool) -> None:
        super().__init__()
        self.base, self.merged = base, merged
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False).double()
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        if not self.merged:
            return self.base(x) + self.up(self.down(x))
        delta = torch.einsum("or,rikl->oikl", self.up.weight[:, :, 0, 0], self.down.weight)
        return F.conv2d(x, self.base.weight + delta, self.base.bias, padding=self.base.padding)


def adapt(model: Net, merged: bool) -> None:
    torch.manual_seed(1)
    model.conv, model.block[0] = Adapter(model.conv, merged), Adapter(model.block[0], merged)  # type: ignore[assignment]


def freeze(model: nn.Module) -> None:
    """Do what torchvision's detectors and detectron2 do."""
    for name, child in model.named_children():
        freeze(child)
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps).double()
            frozen.load_state_dict(child.state_dict())
            setattr(model, name, frozen)


def with_group_norm(model: Net) -> None:
    model.bn = nn.GroupNorm(2, 6).double()  # type: ignore[assignment]


def without_norm(model: Net) -> None:
    model.bn = nn.Identity()  # type: ignore[assignment]
    model.block[1] = nn.Identity()


def without_first_norm_of_sequential(model: Net) -> None:
    del model.block[1]


def with_another_conv(model: Net) -> None:
    torch.manual_seed(2)
    model.conv = nn.Conv2d(4, 6, 3, padding=1).double()


def with_norm_of_a_copy(model: Net) -> None:
    model.bn = copy.deepcopy(model.bn)
    set_mode(model.bn, False)


def with_conv_of_a_copy(model: Net) -> None:
    model.conv = copy.deepcopy(model.conv)


def with_a_layer_inserted(model: Net) -> None:
    model.block.insert(0, nn.Tanh())


REPLACED = {
    "adapter": functools.partial(adapt, merged=False),
    "merged adapter": functools.partial(adapt, merged=True),
    "frozen norms": freeze,
    "another kind of norm": with_group_norm,
    "no norm": without_norm,
    "a child deleted": without_first_norm_of_sequential,
    "another convolution": with_another_conv,
    "copy of the norm": with_norm_of_a_copy,
    "copy of the convolution": with_conv_of_a_copy,
    "a layer inserted": with_a_layer_inserted,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", REPLACED)
def test_replaced_layers(name: str, training: bool):
    assert_is_eval_mode(REPLACED[name], training)


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_layers_whose_old_ones_are_held(name: str):
    """It is where a layer is that counts, not whether it is still alive."""

    def change(model: Net) -> None:
        model.kept = [list(model.modules())]  # type: ignore[assignment]
        REPLACED[name](model)

    assert_is_eval_mode(change)


def test_synchronized_norms_are_refused_in_training():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tuned())
    before = statistics(model)
    with pytest.raises(normfuse.TuneModeError, match=r"bn was replaced by a SyncBatchNorm .*: call tune_mode again"):
        model(image())
    assert_same(before, statistics(model))
    assert error(network().eval()(image()).detach(), model.eval()(image()).detach()) <= EXACT
    normfuse.tune_mode(model)
    assert_same(gradients(set_mode(network(), True), image()), gradients(model.train(), image()))
    assert_same(before, statistics(model))


def test_a_new_norm_that_shall_learn_statistics():
    """The advice works as it is given."""
    model = tuned()
    model.bn = nn.BatchNorm2d(6).double()
    with pytest.raises(normfuse.TuneModeError, match=r"with exclude=\['bn'\] to leave it so"):
        model(image())
    normfuse.tune_mode(model, exclude=["bn"])
    model(image())
    assert model.bn.num_batches_tracked == 1


# fusers


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_fused_layers(kind: str):
    layers = (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)) if kind == "conv" else (nn.Linear(4, 6), nn.BatchNorm1d(6))
    inputs = image() if kind == "conv" else image(3, 4)
    plain = hard_norms(nn.Sequential(*layers).double()).eval()
    model = normfuse.tune_mode(copy.deepcopy(plain), example_inputs=inputs)
    fuse: Any = fusion.fuse_conv_bn_eval if kind == "conv" else fusion.fuse_linear_bn_eval
    fused = fuse(model[0], model[1])  # type: ignore[index]
    assert type(fused) is type(layers[0])
    assert error(plain(inputs).detach(), fused(inputs).detach()) <= 1e-6  # zero gains are not folded exactly
    assert error(fuse(plain[0], plain[1])(inputs).detach(), fused(inputs).detach()) <= EXACT  # type: ignore[index]
    assert error(plain(inputs).detach(), model(inputs).detach()) <= EXACT, "the pair itself goes on"


def test_weights_fused_in_place():
    """As detectors' own fusers do it: the weight is overwritten, the norm taken away."""

    def change(model: Net) -> None:
        norm = model.bn
        weight, bias = fusion.fuse_conv_bn_weights(
            model.conv.weight, model.conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        model.conv.weight, model.conv.bias = weight, bias
        model.bn = nn.Identity()  # type: ignore[assignment]

    assert_is_eval_mode(change)


def test_quantizers_fusers_name_what_they_do_not_know():
    with pytest.raises((AssertionError, KeyError, NotImplementedError), match="TunedConv2d"):
        torch.ao.quantization.fuse_modules(tuned().eval(), [["conv", "bn"]])


# copies


def cloned(module: nn.Module) -> nn.Module:
    """Return a copy as libraries for meta-learning make it, whose parameters are results of others."""
    clone = type(module).__new__(type(module))
    clone.__dict__ = vars(module).copy()
    clone._parameters = {key: None if p is None else p.clone() for key, p in module._parameters.items()}  # type: ignore[assignment]
    clone._buffers = {key: None if b is None else b.clone() for key, b in module._buffers.items()}
    clone._modules = {key: None if m is None else cloned(m) for key, m in module._modules.items()}
    return clone


def test_clones_that_take_the_dict():
    """An inner step on a clone, and gradients through it."""
    results = []
    for model in (set_mode(network(), True), tuned()):
        clone, parameters = cloned(model), list(model.parameters())
        inner = torch.autograd.grad(clone(image()).square().sum(), list(clone.parameters()), create_graph=True)
        for (name, parameter), grad in zip(list(clone.named_parameters()), inner, strict=True):
            owner, _, key = name.rpartition(".")
            clone.get_submodule(owner)._parameters[key] = parameter - 0.1 * grad  # type: ignore[assignment]
        y = clone(image())
        grads = torch.autograd.grad(y.square().sum(), parameters)
        results.append(dict(enumerate([y.detach(), *grads])))
        assert_same(statistics(network()), statistics(model))
        assert_same(statistics(network()), statistics(clone))
    assert_same(results[0], results[1])


@pytest.mark.parametrize("name", ["conv", "bn", "block"])
def test_a_clone_in_the_place_of_one_part(name: str):
    assert_is_eval_mode(lambda model: setattr(model, name, cloned(getattr(model, name))))


@pytest.mark.parametrize("name", ["conv", "bn", "block.0", "block.1"])
@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_one_layer(name: str, way: Callable[[nn.Module], nn.Module]):
    """It does what the layer does in eval mode; a convolution has its own class again, a norm keeps its statistics."""
    layer, expected = way(tuned().get_submodule(name)), network().get_submodule(name).eval()
    inputs = image(2, next(iter(expected.parameters())).shape["conv" in name or name == "block.0"], 5, 5)
    assert_same(gradients(expected, inputs), gradients(layer.train(), inputs))
    assert_same(statistics(expected), statistics(layer))
    assert type(normfuse.tune_mode(layer, False)) is type(expected)


def test_averaged_models_are_paired_among_themselves():
    averaged = AveragedModel(tuned())
    averaged.update_parameters(tuned())
    inner: Any = averaged.module
    assert isinstance(inner.conv(image()), NormalizedValue)
    assert_same(gradients(set_mode(network(), True), image()), gradients(inner, image()))


# statistics


@pytest.mark.parametrize(
    "wipe",
    [
        lambda model: update_bn([image()], AveragedModel(model)),
        lambda model: update_bn([image()], model),
        lambda model: model.bn.reset_running_stats(),
        lambda model: model.block[1].reset_parameters(),
    ],
)
def test_statistics_are_not_wiped(wipe: Callable[[Any], object]):
    model = tuned()
    with pytest.raises(normfuse.TuneModeError, match=r"call tune_mode\(model, False\) first"):
        wipe(model)
    assert_same(statistics(network()), statistics(model))


def test_batch_statistics_on_demand():
    """As TENT and its kind set norms up, which then normalize by each batch in eval mode too."""

    def change(model: Net) -> None:
        for norm in (model.bn, model.block[1]):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None

    assert_is_eval_mode(change)


# instances that are patched


def hook_like_accelerate(layer: nn.Module) -> None:
    """Put a forward on the instance that calls the one it had."""
    layer._old_forward = layer.forward  # type: ignore[assignment]
    layer.forward = functools.partial(lambda module, *args: module._old_forward(*args), layer)  # type: ignore[assignment]


def replace_forward(layer: nn.Module) -> None:
    """Put the forward of the layer's torch class on the instance."""
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm2d
    layer.forward = types.MethodType(kind.forward, layer)  # type: ignore[method-assign]


def replace_conv_forward(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        layer._conv_forward = lambda x, weight, bias: F.conv2d(x, weight * 2, bias, padding=layer.padding)  # type: ignore[method-assign]


PATCHES = [hook_like_accelerate, replace_forward, replace_conv_forward]


@pytest.mark.parametrize("name", ["conv", "bn", "block.0", "block.1"])
@pytest.mark.parametrize("patch", PATCHES)
def test_patched_afterwards(patch: Callable[[nn.Module], None], name: str):
    """Then taken out of Tune mode, where the patch may call what the layer was."""
    model = assert_is_eval_mode(lambda model: patch(model.get_submodule(name)))
    expected = set_mode(network(), True)
    patch(expected.get_submodule(name))
    set_mode(normfuse.tune_mode(model, False), True)
    assert not any(isinstance(module, TunedLayer) for module in model.modules())
    assert_same(gradients(expected, image()), gradients(model, image()))


@pytest.mark.parametrize("name", ["conv", "bn", "block.0", "block.1"])
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("example", [None, image()])
def test_patched_before(example: Tensor | None, patch: Callable[[nn.Module], None], name: str):
    expected, model = network(), network()
    for one in (expected, model):
        patch(one.get_submodule(name))
    normfuse.tune_mode(model, example_inputs=example).train()
    assert_same(gradients(set_mode(expected, True), image()), gradients(model, image()))
    assert_same(statistics(network()), statistics(model))


# parametrizations, pruning, hooks


def normed_weight(model: Net) -> None:
    parametrizations.weight_norm(model.conv)
    parametrizations.spectral_norm(model.block[0])
    model.block[0].eval()  # in which it does not iterate


def pruned(model: Net) -> None:
    prune.l1_unstructured(model.conv, "weight", amount=0.5)
    prune.ln_structured(model.block[0], "weight", amount=1, n=2, dim=0)


def pruned_for_good(model: Net) -> None:
    pruned(model)
    prune.remove(model.conv, "weight")
    prune.remove(model.block[0], "weight")


def old_weight_norm(model: Net) -> None:
    nn.utils.weight_norm(model.conv)


REPARAMETRIZED = [pruned, pruned_for_good, old_weight_norm]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("change", REPARAMETRIZED)
def test_computed_weights(change: Callable[[Net], None]):
    assert_is_eval_mode(change)


def test_parametrized_afterwards():
    model = tuned()
    normed_weight(model)
    expected = network()
    normed_weight(expected)
    assert_same(gradients(set_mode(expected, True), image()), gradients(set_mode(model, True), image()))
    folded = normfuse.fold_bn(model)
    assert error(expected.eval()(image()).detach(), folded(image()).detach()) <= EXACT
    normfuse.tune_mode(model, False)
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in expected.modules()]
    nn.utils.parametrize.remove_parametrizations(model.conv, "weight")
    assert type(model.conv) is nn.Conv2d
    assert error(expected.eval()(image()).detach(), model.eval()(image()).detach()) <= EXACT


def test_a_class_that_a_library_puts_on_top():
    """As FSDP does: one class of the library's for all layers of a kind."""

    class Sharded(nn.Module):
        pass

    model = tuned()
    made = type("FSDPTunedConv2d", (Sharded, type(model.conv)), {"marker": 1})
    model.conv.__class__ = model.block[0].__class__ = made  # type: ignore[assignment]
    assert_same(gradients(set_mode(network(), True), image()), gradients(model, image()))
    normfuse.tune_mode(model, False)
    for layer in (model.conv, model.block[0]):
        assert type(layer).__name__ == "FSDPConv2d"
        assert type(layer).__mro__[1:3] == (Sharded, nn.Conv2d)
        assert type(layer).marker == 1  # type: ignore[attr-defined]
    assert_same(gradients(set_mode(network(), True), image()), gradients(set_mode(model, True), image()))


HOOKS: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "forward": lambda layer, seen: layer.register_forward_hook(lambda m, args, y: seen.append(y.detach().clone())),
    "forward pre": lambda layer, seen: layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach())),
    "full backward": lambda layer, seen: layer.register_full_backward_hook(lambda m, gx, gy: seen.extend(gy)),
    "full backward pre": lambda layer, seen: layer.register_full_backward_pre_hook(lambda m, gy: seen.extend(gy)),
}


@pytest.mark.parametrize("name", ["conv", "bn", "block.0", "block.1"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_see_what_they_see_in_eval_mode(kind: str, name: str):
    """With an activation in place behind the norm, where torch itself allows that behind the hook."""
    records: list[Tensor] = []
    for model in (set_mode(network(), True), tuned()):
        model.inplace = model.block[2].inplace = "backward" not in kind or name in ("conv", "block.0")  # type: ignore[union-attr]
        seen: list[Tensor] = []
        handle = HOOKS[kind](model.get_submodule(name), seen)
        model(image().requires_grad_()).square().sum().backward()
        handle.remove()
        model(image())
        records.extend(seen)
    one, two = records
    assert error(one, two) <= EXACT


def test_a_hook_on_every_module():
    """Such as profilers register."""
    records = []
    for model in (set_mode(network(), True), tuned()):
        seen: list[Tensor] = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, y, seen=seen: seen.append(y.sum()))
        model(image())
        handle.remove()
        records.append(torch.stack(seen).detach())
    assert error(records[0], records[1]) <= EXACT


# tracing


def test_symbolic_trace():
    """The graph calls the layers themselves, so it is the model's as long as the pairs are."""
    expected, model = gradients(set_mode(network(), True), image()), tuned()
    traced = torch.fx.symbolic_trace(model)
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"][:2] == ["conv", "bn"]
    assert_same(expected, gradients(traced, image()))
    del model
    assert_same(expected, gradients(traced, image()))


def test_feature_extraction():
    """What follows the norm comes out as in eval mode; what stands before it raises when it is read."""
    results = []
    for model in (network(), tuned()):
        extracted = create_feature_extractor(model, {"bn": "y", "block.2": "z"}, suppress_diff_warning=True)
        features = set_mode(extracted, True)(image())
        results.append({key: value.detach() for key, value in features.items()})
    assert_same(results[0], results[1])
    value = create_feature_extractor(tuned(), ["conv"], suppress_diff_warning=True)(image())["conv"]
    with pytest.raises(normfuse.TuneModeError, match=r"the value of conv has bn applied already .* mean reads it"):
        value.mean()


# folding, and Tune mode inside Tune mode


@pytest.mark.parametrize("name", ["adapter", "merged adapter", "frozen norms", "no norm", "a child deleted"])
def test_folded_after_a_layer_was_replaced(name: str):
    expected, model = network(), tuned()
    for one in (expected, model):
        REPLACED[name](one)
    folded = normfuse.fold_bn(model, example_inputs=image())
    assert error(expected.eval()(image()).detach(), folded(image()).detach()) <= EXACT
    assert not any(isinstance(module, TunedLayer) for module in folded.modules())


@pytest.mark.parametrize("options", [{}, {"exclude": ["bn"]}, {"example_inputs": image()}], ids=["", "bn", "inputs"])
def test_a_block_inside_tune_mode_gives_back_what_was(options: dict[str, Any]):
    model = normfuse.tune_mode(network(), exclude=["block.1"]).train()
    before = [(type(module), vars(module).get("_normfuse_tuned")) for module in model.modules()]
    with contextlib.suppress(KeyError), normfuse.tuned(model, **options):
        assert isinstance(model.block[1], TunedLayer)
        raise KeyError
    assert [(type(module), vars(module).get("_normfuse_tuned")) for module in model.modules()] == before
    assert isinstance(model.conv(image()), NormalizedValue)


def test_a_layer_replaced_inside_the_block_stays_as_it_is():
    model = tuned()
    with normfuse.tuned(model):
        model.bn = nn.GroupNorm(2, 6).double()  # type: ignore[assignment]
        parametrizations.weight_norm(model.block[0])
    expected = network()
    parametrizations.weight_norm(expected.block[0])
    expected.bn = nn.GroupNorm(2, 6).double()  # type: ignore[assignment]
    assert_same(gradients(set_mode(expected, True), image()), gradients(model, image()))
