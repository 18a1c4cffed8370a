"""Layers and weights that a model also holds outside of its module tree."""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import Reason
from normfuse.holders import Holders
from normfuse.surgery import copy
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image


class Pair(NamedTuple):
    conv: Any
    norm: Any


class Slots:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Held(nn.Module):
    """A convolution and a norm, called from wherever ``hold`` puts them."""

    def __init__(self, hold: Callable[[nn.Module, nn.Module], Any], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.held, self.call = hold(self.conv, self.bn), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.held, x)


def built(hold: Callable[..., Any], call: Callable[..., Any]) -> nn.Module:
    return randomize_norms(Held(hold, call).double().eval())


MOVABLE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "list": (lambda c, n: [c, n], lambda h, x: h[1](h[0](x))),
    "deque": (lambda c, n: collections.deque([c, n]), lambda h, x: h[1](h[0](x))),
    "dictionary": (lambda c, n: {"c": c, "n": n}, lambda h, x: h["n"](h["c"](x))),
    "tuple": (lambda c, n: (c, n), lambda h, x: h[1](h[0](x))),
    "named tuple": (Pair, lambda h, x: h.norm(h.conv(x))),
    "tuples in a dictionary of lists": (lambda c, n: {1: [((c, n),)]}, lambda h, x: h[1][0][0][1](h[1][0][0][0](x))),
    "object": (lambda c, n: types.SimpleNamespace(c=c, n=n), lambda h, x: h.n(h.c(x))),
    "object with slots": (lambda c, n: (c, Slots(n)), lambda h, x: h[1].layer(h[0](x))),
}
FROZEN: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "closure": (lambda c, n: lambda x: n(c(x)), lambda h, x: h(x)),
    "default": (lambda c, n: lambda x, n=n: n(c(x)), lambda h, x: h(x)),
    "partial": (lambda c, n: (c, functools.partial(n)), lambda h, x: h[1](h[0](x))),
    "set": (lambda c, n: (c, {n}), lambda h, x: next(iter(h[1]))(h[0](x))),
    "key": (lambda c, n: (c, {n: 1}), lambda h, x: next(iter(h[1]))(h[0](x))),
    "weak reference": (lambda c, n: (c, weakref.ref(n)), lambda h, x: h[1]()(h[0](x))),
}


@pytest.mark.parametrize("name", MOVABLE)
@pytest.mark.parametrize("traced", [False, True])
def test_a_folded_norm_goes_from_where_it_is_held(name: str, traced: bool):
    model = built(*MOVABLE[name])
    result = normfuse.apply(model, ["fold-bn"], example_inputs=None if traced else image())
    assert result.report.norms[0].status is normfuse.Status.APPLIED
    assert_parity(model, result.model, image())


@pytest.mark.parametrize("name", FROZEN)
def test_a_norm_that_is_held_where_nothing_else_can_be_put_stays(name: str):
    model = built(*FROZEN[name])
    expected = model(image())
    outcome = normfuse.apply(model, ["fold-bn"], example_inputs=image(), inplace=True).report.norms[0]
    assert outcome.refusal is not None
    assert outcome.refusal.reason is Reason.HELD_ELSEWHERE
    assert "held" in outcome.refusal.detail
    assert torch.equal(model(image()), expected)


@pytest.mark.parametrize("name", [*MOVABLE, *FROZEN])
def test_a_fold_of_a_copy_leaves_the_source_and_computes_the_same(name: str):
    model = built(*(MOVABLE | FROZEN)[name])
    expected = model(image())
    folded = normfuse.fold(model, example_inputs=image())
    assert torch.equal(model(image()), expected)
    assert_parity(model, folded, image())


def test_a_norm_whose_forward_is_held_is_folded_in_its_place():
    """Only its function is called, so that the module stays, with other values, for whoever holds its method."""
    model = built(lambda c, n: (c, n.forward), lambda h, x: h[1](h[0](x)))
    result = normfuse.apply(model, ["fold-bn"], example_inputs=image())
    assert result.report.norms[0].status is normfuse.Status.APPLIED
    assert type(result.model.bn) is nn.BatchNorm2d
    assert_parity(model, result.model, image())


def test_the_report_says_that_a_function_keeps_a_copy_on_the_source():
    report = normfuse.inspect(built(*FROZEN["closure"]), example_inputs=image())
    assert any(note.startswith("bn is held by a function") for note in report.notes)


def test_a_copy_that_would_train_a_layer_of_its_source_is_refused():
    model = built(*FROZEN["closure"]).train()
    before = model.bn.running_mean.clone()
    with pytest.raises(normfuse.CaptureError, match=r"calls conv of the model.*call model\.eval\(\) first"):
        normfuse.fold(model, example_inputs=image())
    assert model.training
    assert torch.equal(model.bn.running_mean, before)
    assert normfuse.fold(model.eval(), example_inputs=image()) is not model


class HoldsWeights(nn.Module):
    """Calls a convolution by its parameters, from a list of them."""

    def __init__(self, make: Callable[[list[Any]], Any] = list) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.weights = make([self.conv.weight, self.conv.bias])

    def forward(self, x: Tensor) -> Tensor:
        held: Any = self.weights
        weight, bias = held() if isinstance(held, types.FunctionType) else held
        return self.bn(F.conv2d(x, weight, bias))


def test_a_weight_changes_where_it_is_held():
    model = randomize_norms(HoldsWeights().eval().double())
    model.weights = [model.conv.weight, model.conv.bias]
    folded = normfuse.fold(model, example_inputs=image())
    assert isinstance(folded.bn, nn.Identity)
    assert folded.weights[0] is folded.conv.weight
    assert_parity(model, folded, image())


def test_a_weight_in_a_closure_stays():
    model = randomize_norms(HoldsWeights(lambda held: lambda: held).eval().double())
    tensors = (model.conv.weight, model.conv.bias)
    model.weights = lambda: tensors
    outcome = normfuse.apply(model, ["fold-bn"], example_inputs=image(), inplace=True).report.norms[0]
    assert outcome.refusal is not None
    assert outcome.refusal.reason is Reason.HELD_ELSEWHERE
    assert "conv.weight is also held by the closure of weights[0], which keeps it" in outcome.refusal.detail


class Listed(nn.Module):
    """The architecture of a file, with a plain list beside its tree."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
        for index, layer in enumerate(self.layers):
            self.add_module(f"layer{index}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_file_is_loaded_with_the_same_replacement(tmp_path: Path):
    folded = normfuse.fold(randomize_norms(Listed().double().eval()), example_inputs=image())
    normfuse.save(folded, tmp_path / "folded.pt", arch="tests.test_holders:Listed")
    loaded = normfuse.load(tmp_path / "folded.pt", arch="tests.test_holders:Listed")
    assert isinstance(loaded.layers[1], nn.Identity)
    assert_parity(folded, loaded, image())


def test_what_a_layer_holds_of_itself_does_not_keep_it():
    model = randomize_norms(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double().eval())
    model[1].original = model[1].forward
    assert normfuse.inspect(model, example_inputs=image())


class Careful:
    """An object whose property must not run, in a cycle."""

    def __init__(self) -> None:
        self.me = [self]

    @property
    def value(self) -> None:
        raise AssertionError("a property was run")


def test_properties_do_not_run_and_cycles_end():
    model = Listed()
    model.careful = Careful()
    model.careful.layer = model.layer1
    places = sorted(holder.name for holder in Holders(model).of(model.layer1))
    assert places == ["careful.layer", "layers[1]"]


def test_holders_of_a_copy_are_its_own():
    model = Listed()
    other = copy(model)
    Holders(other).replace(other.layer1, nn.Identity())
    assert isinstance(model.layers[1], nn.BatchNorm2d)
