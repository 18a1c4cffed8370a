"""Computed weights become plain ones of the same value, and what folds into plain weights then folds."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import normfuse
from normfuse import surgery
from normfuse.report import Outcome, Status

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.nn.utils import spectral_norm, weight_norm

X = torch.linspace(-2, 3, 2 * 4 * 9 * 9, dtype=torch.float64).reshape(2, 4, 9, 9).sin()
Make = Callable[[], nn.Module]


def old_weight_norm(layer: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer, **options)


def randomised(model: nn.Module) -> nn.Module:
    """Double precision, eval mode, and no parameter or statistic at its initial value."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                assert tensor is not None
                nn.init.normal_(tensor)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return model.double().eval()


def materialized(model: nn.Module, x: Tensor | None = X) -> normfuse.Result:
    return normfuse.apply(model, ["materialize"], example_inputs=x)


def assert_same(a: nn.Module, b: nn.Module, x: Tensor = X) -> None:
    with torch.no_grad():
        torch.testing.assert_close(b(x), a(x), rtol=1e-10, atol=1e-10)


def only(result: normfuse.Result, subject: str) -> Outcome:
    (outcome,) = [o for o in result.report.outcomes if o.subject == subject]
    return outcome


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, padding=1, **options)


class StandardizedConv(nn.Conv2d):
    """Weight standardization as the paper's own code writes it."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return nn.functional.conv2d(
            input, weight / std.expand_as(weight), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class PositiveLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.exp(), self.bias)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


COMPUTED: dict[str, Make] = {
    "old weight norm": lambda: old_weight_norm(conv()),
    "old weight norm of the whole": lambda: old_weight_norm(conv(), dim=None),  # type: ignore[arg-type]
    "old spectral norm": lambda: spectral_norm(conv()),
    "old spectral norm, transposed": lambda: spectral_norm(nn.ConvTranspose2d(4, 6, 3)),
    "weight norm": lambda: parametrizations.weight_norm(conv(groups=2)),
    "spectral norm": lambda: parametrizations.spectral_norm(conv()),
    "orthogonal": lambda: parametrizations.orthogonal(conv()),
    "pruned": lambda: prune.random_unstructured(conv(), "weight", 0.5),
    "any": lambda: parametrize.register_parametrization(conv(), "weight", Double()),
    "two in a row": lambda: parametrize.register_parametrization(
        parametrizations.weight_norm(conv()), "weight", Double()
    ),
    "standardized": lambda: StandardizedConv(4, 6, 3, stride=2, padding=1),
    "linear": lambda: PositiveLinear(9, 5),
}


@pytest.fixture(params=COMPUTED)
def make(request: pytest.FixtureRequest) -> Make:
    layer = COMPUTED[request.param]
    return lambda: randomised(nn.Sequential(layer()))


def test_function_stays(make: Make):
    model = make()
    result = materialized(model)
    assert [(o.subject, o.status, o.norm) for o in result.report.outcomes] == [("0.weight", Status.APPLIED, False)]
    assert_same(model, result.model)


def test_weight_is_a_plain_parameter(make: Make):
    layer = materialized(make()).model.get_submodule("0")
    assert sorted(dict(layer.named_parameters())) == ["bias", "weight"]
    assert type(layer).__module__.startswith("torch.nn.modules.")
    assert not layer._forward_pre_hooks
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad


def test_given_model_is_untouched(make: Make):
    model = make()
    keys, values = list(model.state_dict()), [v.clone() for v in model.state_dict().values()]
    materialized(model)
    normfuse.inspect(model, ["materialize"], example_inputs=X)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), values, strict=True))


def test_structure_replays_on_a_fresh_model(make: Make):
    done = materialized(make()).model
    fresh = make()
    surgery.replay(fresh, done.normfuse_manifest["edits"])  # type: ignore[arg-type]
    fresh.load_state_dict(done.state_dict(), strict=True)
    assert_same(done, fresh)


def test_no_inputs_needed(make: Make):
    model = make()
    result = materialized(model, None)
    assert len(result.report.applied) == 1
    assert_same(model, result.model)


@pytest.mark.parametrize("name", ["weight norm", "old spectral norm", "standardized"])
def test_model_of_one_layer(name: str):
    model = randomised(COMPUTED[name]())
    result = materialized(model)
    assert only(result, "weight").status is Status.APPLIED
    assert_same(model, result.model)


def test_excluded_layer_stays():
    model = randomised(nn.Sequential(parametrizations.weight_norm(conv())))
    result = normfuse.apply(model, ["materialize"], example_inputs=X, exclude=["0"])
    assert parametrize.is_parametrized(result.model.get_submodule("0"))
    assert not result.report.applied


def test_training_mode_does_not_iterate():
    model = randomised(nn.Sequential(parametrizations.spectral_norm(conv())))
    expected = copy.deepcopy(model)
    assert_same(expected, materialized(model.train()).model)


@pytest.mark.parametrize("name", ["old weight norm", "old spectral norm", "weight norm", "pruned", "standardized"])
def test_batch_norm_folds_afterwards(name: str):
    model = randomised(nn.Sequential(COMPUTED[name](), nn.BatchNorm2d(6), nn.ReLU()))
    result = normfuse.apply(model, ["materialize", "fold-bn"], example_inputs=X)
    assert only(result, "1").status is Status.APPLIED
    assert_same(model, result.model)


def test_batch_norm_does_not_fold_into_a_computed_weight():
    model = randomised(nn.Sequential(parametrizations.weight_norm(conv()), nn.BatchNorm2d(6)))
    refusal = only(normfuse.apply(model, ["fold-bn"], example_inputs=X), "1").refusal
    assert refusal is not None
    assert refusal.reason is normfuse.Reason.PARAMETRIZED


def test_frozen_weight_stays_frozen():
    for layer in (parametrizations.weight_norm(conv()), old_weight_norm(conv()), spectral_norm(conv())):
        model = randomised(nn.Sequential(layer)).requires_grad_(False)
        assert not any(p.requires_grad for p in materialized(model).model.parameters())


def test_layer_called_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).relu())

    model = randomised(Twice())
    assert_same(model, materialized(model).model)


def test_recurrent_layer_reads_the_plain_weight():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = spectral_norm(nn.LSTM(9, 5), "weight_hh_l0")

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x[:, 0])[0]

    model = randomised(Recurrent())
    result = materialized(model)
    assert_same(model, result.model)
    with torch.no_grad():
        result.model.lstm.weight_hh_l0.zero_()
        before, after = model(X), result.model(X)
    assert not torch.allclose(before, after)


def test_tied_weights_are_untied():
    def tied() -> nn.Module:
        model = nn.Sequential(StandardizedConv(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
        model[1].weight = model[0].weight
        return randomised(model)

    model = tied()
    done = materialized(model).model
    assert_same(model, done)
    fresh = tied()
    surgery.replay(fresh, done.normfuse_manifest["edits"])  # type: ignore[arg-type]
    fresh.load_state_dict(done.state_dict(), strict=True)
    assert_same(done, fresh)


# refusals


def refusal_of(model: nn.Module, x: Tensor | None = X) -> normfuse.Refusal:
    before = copy.deepcopy(model.state_dict())
    (outcome,) = materialized(model.double().eval(), x).report.refused
    assert all(torch.equal(value, before[key].double()) for key, value in model.state_dict().items())
    assert outcome.refusal is not None
    return outcome.refusal


class Failing(nn.Module):
    broken = False

    def forward(self, weight: Tensor) -> Tensor:
        if self.broken:
            raise ArithmeticError("no such weight")
        return weight


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.rand_like(weight)


def test_refuses_what_cannot_be_computed():
    layer = parametrize.register_parametrization(conv(), "weight", Failing())
    model = nn.ModuleDict({"used": nn.Identity(), "unused": layer})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    layer.parametrizations.weight[0].broken = True  # type: ignore[union-attr, index]
    refusal = refusal_of(model)
    assert refusal.reason is normfuse.Reason.PARAMETRIZED
    assert "no such weight" in refusal.detail


def test_refuses_another_value_at_each_call():
    layer = parametrize.register_parametrization(conv(), "weight", Noisy())
    refusal = refusal_of(nn.Sequential(layer))
    assert refusal.reason is normfuse.Reason.PARAMETRIZED
    assert "another value" in refusal.detail


class Padded(StandardizedConv):
    """Standardizes, and pads as far as the input needs it."""

    def forward(self, input: Tensor) -> Tensor:
        missing = -input.shape[-1] % 2 if self.training else (input.shape[-1] - 1) % 2
        return super().forward(nn.functional.pad(input, (0, missing)) if missing else input + 1)


class OtherStride(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.weight.tanh(), self.bias, 2, self.padding)


class Reshaped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.repeat(2, 1))


@pytest.mark.parametrize("layer", [Padded(4, 6, 3), OtherStride(4, 6, 3), Reshaped(9, 5, bias=False)])
def test_refuses_a_forward_that_does_more(layer: nn.Module):
    assert refusal_of(nn.Sequential(layer)).reason is normfuse.Reason.FORWARD_OVERRIDDEN


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_refuses_a_layer_whose_method_was_replaced(method: str):
    model = randomised(nn.Sequential(StandardizedConv(4, 6, 3), nn.BatchNorm2d(6)))
    setattr(model[0], method, getattr(type(model[0]), method).__get__(model[0]))
    assert_same(model, normfuse.fold(copy.deepcopy(model), example_inputs=X, inplace=True))
    refusal = refusal_of(model)
    assert refusal.reason is normfuse.Reason.FORWARD_OVERRIDDEN
    assert refusal.hint == f"del 0.{method}"
    delattr(model[0], method)
    assert only(materialized(model), "0.weight").status is Status.APPLIED


class Reader(nn.Module):
    """Uses the raw weight of a layer that standardizes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = StandardizedConv(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + nn.functional.conv2d(x, self.conv.weight, padding=1)


def test_refuses_a_weight_that_others_read():
    assert refusal_of(Reader()).reason is normfuse.Reason.SHARED_PARAMETER


class WithoutCall(nn.Module):
    """Computes with the weight of a layer whose hook, which would compute it, does not run."""

    def __init__(self, read: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.read, self.layer, self.bn = read, layer, nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.read(self.layer, x))


READS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "function": lambda layer, x: nn.functional.conv2d(x, layer.weight, layer.bias),
    "forward": lambda layer, x: layer.forward(x),
    "after a call": lambda layer, x: layer(x) + nn.functional.conv2d(x, layer.weight * 2, layer.bias),
}
HOOKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral norm": spectral_norm,
    "weight norm": old_weight_norm,
    "pruning": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("read", ["function", "forward"])
@pytest.mark.parametrize("hook", HOOKS)
def test_weight_that_is_read_where_its_hook_does_not_run(hook: str, read: str):
    """What a hook assigns is as old as the last call of its layer; the source computes with that."""
    model = randomised(WithoutCall(READS[read], HOOKS[hook](nn.Conv2d(4, 6, 3))))
    model.layer.weight = model.layer.weight.detach().double()  # of float32, before the parameters changed
    for x in (X, None):
        result = normfuse.apply(copy.deepcopy(model), normfuse.api.EXACT_PASSES, example_inputs=x)
        assert_same(copy.deepcopy(model), result.model)
    refusal = only(materialized(copy.deepcopy(model)), "layer.weight").refusal
    assert refusal is not None
    assert "without a call of layer, which would compute it first" in refusal.detail
    assert refusal.reason is normfuse.Reason.PARAMETRIZED


@pytest.mark.parametrize("read", ["function", "after a call"])
@pytest.mark.parametrize("hook", HOOKS)
def test_weight_that_its_hook_has_brought_up_to_date(hook: str, read: str):
    """Who reads it reads the value of the last call, which is the same in eval mode."""
    model = randomised(WithoutCall(READS[read], HOOKS[hook](nn.Conv2d(4, 6, 3))))
    model.layer(X)
    model.layer.weight = model.layer.weight.detach()
    result = materialized(model)
    assert only(result, "layer.weight").status is Status.APPLIED
    assert_same(model, result.model)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(StandardizedConv(4, 4, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if x.sum() > 0 else x


def test_refuses_when_readers_may_be_unseen():
    assert refusal_of(Branching(), None).reason is normfuse.Reason.PARTIAL_CAPTURE


# timm


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [9, 10])
def test_timm_standardized_convolutions(name: str, stride: int, size: int):
    layers = pytest.importorskip("timm.layers")

    def make() -> nn.Module:
        return randomised(nn.Sequential(getattr(layers, name)(4, 6, 3, stride=stride), nn.BatchNorm2d(6)))

    model, x = make(), torch.randn(2, 4, size, size, dtype=torch.float64)
    result = normfuse.apply(model, ["materialize", "fold-bn"], example_inputs=x)
    assert [o.status for o in result.report.outcomes] == [Status.APPLIED] * 2
    dynamic, layer = name.endswith("Same") and stride > 1, result.model.get_submodule("0")
    assert type(layer).__name__ == ("Conv2dSame" if dynamic else "Conv2d")
    assert sorted(dict(layer.named_parameters())) == ["bias", "weight"]
    for other in (x, torch.randn(1, 4, size + 3, size + 4, dtype=torch.float64)):
        assert_same(model, result.model, other)


def test_timm_same_padding_replays():
    layers = pytest.importorskip("timm.layers")

    def make() -> nn.Module:
        return randomised(nn.Sequential(layers.ScaledStdConv2dSame(4, 6, 3, stride=2)))

    done, fresh = materialized(make()).model, make()
    surgery.replay(fresh, done.normfuse_manifest["edits"])  # type: ignore[arg-type]
    fresh.load_state_dict(done.state_dict(), strict=True)
    assert_same(done, fresh)


@pytest.mark.parametrize("maker", [spectral_norm, parametrizations.spectral_norm], ids=["hook", "parametrization"])
@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_is_computed_twice_over(maker: Make, called: bool, training: bool):
    """By a hook or a parametrization, and by the forward of the layer, which may not run; in training it moves."""
    read = (lambda layer, x: layer(x)) if called else READS["function"]
    layer = maker(StandardizedConv(4, 6, 3).double())
    model = randomised(WithoutCall(read, layer))
    model.layer.weight = model.layer.weight.detach() if maker is spectral_norm else model.layer.weight
    reference = copy.deepcopy(model)
    result = normfuse.apply(model.train(training), normfuse.api.EXACT_PASSES, example_inputs=X, verify=False)
    assert_same(reference, result.model)
