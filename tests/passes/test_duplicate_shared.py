"""Copies of shared layers, on request: exact, one for each call, and right again after a run that failed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import DeployedModelError
from normfuse.base import Reason
from normfuse.layers.deployed import CallSites, reset_calls
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image


class Shared(nn.Module):
    """One convolution, called twice, with a norm of its own after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        x = torch.tanh(self.first(self.conv(x)))
        if fail:
            raise RuntimeError("the user's own error")
        return self.second(self.conv(x))


class Tied(nn.Module):
    """Two layers with one weight; a norm follows the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=torch.float64).reshape(2, 3, 8, 8)


@pytest.fixture
def shared() -> nn.Module:
    return randomize_norms(Shared().double().eval())


def test_sharing_is_refused_by_default(shared: nn.Module) -> None:
    report = normfuse.inspect(shared, example_inputs=X)
    assert {o.refusal.reason for o in report.refused if o.refusal} == {Reason.SHARED_MODULE}
    assert all("duplicate_shared" in o.refusal.hint for o in report.refused if o.refusal)


def test_each_call_gets_weights_of_its_own(shared: nn.Module) -> None:
    folded = normfuse.fold_bn(shared, example_inputs=X, duplicate_shared=True)
    assert_parity(shared, folded, X)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    for again in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert_parity(shared, again, X)


def test_a_run_that_failed_halfway_does_not_shift_the_calls(shared: nn.Module) -> None:
    folded = normfuse.fold_bn(shared, example_inputs=X, duplicate_shared=True)
    with pytest.raises(RuntimeError, match="own error"):
        folded(X, fail=True)
    assert_parity(shared, folded, X)


def test_tied_weights_are_untied() -> None:
    model = randomize_norms(Tied().double().eval())
    x = torch.randn(5, 4, dtype=torch.float64)
    refused = normfuse.inspect(model, example_inputs=x).refused
    assert [o.refusal.reason for o in refused if o.refusal] == [Reason.SHARED_PARAMETER]
    folded = normfuse.fold_bn(model, example_inputs=x, duplicate_shared=True)
    assert_parity(model, folded, x)
    assert folded.first.weight is not folded.second.weight
    assert isinstance(folded.norm, nn.Identity)


def test_sharing_that_hinders_nothing_stays() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(torch.tanh(self.norm(self.conv(x)))))

    model = randomize_norms(Pair().double().eval())
    folded = normfuse.fold_bn(model, example_inputs=X, duplicate_shared=True)
    assert_parity(model, folded, X)
    assert isinstance(folded.conv, nn.Conv2d)


def test_a_call_by_function_cannot_be_told_apart() -> None:
    class Functional(Shared):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            x = torch.tanh(self.first(nn.functional.conv2d(x, self.conv.weight, padding=1)))
            return self.second(nn.functional.conv2d(x, self.conv.weight, padding=1))

    model = randomize_norms(Functional().double().eval())
    report = normfuse.apply(model, ("fold-bn",), example_inputs=X, duplicate_shared=True).report
    assert Reason.SHARED_MODULE in {o.refusal.reason for o in report.refused if o.refusal}


def test_call_sites_take_turns() -> None:
    layer = CallSites(nn.Linear(1, 1), 2)
    nn.init.zeros_(layer.sites[1].weight)
    one = torch.ones(1, 1)
    first, second = layer(one), layer(one)
    assert not torch.equal(first, second)
    with pytest.raises(DeployedModelError, match="called once more"):
        layer(one)
    reset_calls(layer, ())
    assert torch.equal(layer(one), first)


class Calls(nn.Module):
    """One convolution with a norm of its own after each call; the order of the norms is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(4, 4, 1), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: Tensor, order: tuple[int, ...] = (0, 1)) -> Tensor:
        for index in order:
            x = torch.tanh(self.norms[index](self.conv(x)))
        return x


@pytest.mark.parametrize("order", [(1, 0), (1,), (0, 1, 0), (0, 0)])
def test_duplicated_layers_are_called_as_in_the_example(order: tuple[int, ...]):
    model = randomize_norms(Calls().double().eval())
    folded = normfuse.fold(model, example_inputs=image(), duplicate_shared=True)
    assert isinstance(folded.norms[1], nn.Identity)
    for _ in range(2):
        assert_parity(model, folded, image())
        with pytest.raises(DeployedModelError):
            folded(image(), order)
    assert_parity(model, folded, (image(), (0,)))  # the calls that there are have their own weights


class SharedPair(nn.Module):
    """One convolution and one norm, called twice in turn, once with its values turned around."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).tanh() + self.norm(-self.conv(x.flip(3))).tanh()


def test_a_norm_that_is_shared_as_its_layer_is_runs_in_turn_with_the_copies() -> None:
    model = randomize_norms(SharedPair().double().eval())
    folded = normfuse.fold(model, example_inputs=X, duplicate_shared=True)
    assert isinstance(folded.norm, nn.Identity)
    assert_parity(model, folded, X)


class FirstCall(nn.Module):
    """Calls a layer before the norm that goes into its second call, and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(torch.tanh(self.conv(x))))


@pytest.mark.parametrize("inputs", [X, None])
def test_a_norm_in_front_of_the_copy_that_takes_it(inputs: Tensor | None) -> None:
    model = randomize_norms(FirstCall().double().eval())
    result = normfuse.apply(model, ["fold-bn"], example_inputs=inputs, duplicate_shared=True)
    assert isinstance(result.model.bn, nn.Identity)
    assert_parity(model, result.model, X)
    assert_parity(model, copy.deepcopy(result.model), X)
