"""A branch that leaves out a norm, or the layer that it was folded into, raises in the folded model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse import DeployedModelError, Status
from normfuse.capture import capture
from normfuse.capture.decisions import is_decided
from normfuse.graph import has_hooks
from tests.parity import assert_parity, outputs, randomize_norms
from tests.zoo.trap import image


class Flag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        y = self.conv(x)
        return y if plain else self.bn(y)


class BySize(Flag):
    """The batch decides."""

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        y = self.conv(x)
        if y.shape[0] > 2:
            return y
        return self.bn(y)


class AroundABlock(Flag):
    """What decides is the code that calls the block of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(self.bn, nn.Sigmoid())

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        return self._rest(self.conv(x), plain)

    def _rest(self, y: Tensor, plain: bool) -> Tensor:
        return y.sigmoid() if plain else self.block(y)


class Forwards(Flag):
    """The norm goes into the layer behind it."""

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        return self.conv(x if plain else self.bn(x))


class LeavesTheLayerOut(Flag):
    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        y = self.bn(x)
        return y if plain else self.conv(y)


class Tokens(Flag):
    """The gain of a norm that stays goes into the layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        return self.conv(x if plain else self.bn(x))


class ByFunction(Flag):
    """The layer is not called, its function is; then its caller stands for it."""

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        y = F.conv2d(x, self.conv.weight, self.conv.bias)
        return y if plain else self.bn(y)


class NormByFunction(Flag):
    """The norm is not called, its function is; then its caller stands for it."""

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        y = x if plain else self.conv(x)
        bn = self.bn
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ReadThrough(Flag):
    def __init__(self) -> None:
        super().__init__()
        self.bn = OwnForward(4)


KINDS = {
    cls.__name__: cls
    for cls in (Flag, AroundABlock, Forwards, LeavesTheLayerOut, Tokens, ByFunction, NormByFunction, ReadThrough)
}


def built(kind: Callable[[], nn.Module]) -> nn.Module:
    return randomize_norms(kind().double().eval())


@pytest.mark.parametrize(
    ("name", "recorded"), [*((name, True) for name in KINDS), ("Flag", False), ("Forwards", False)]
)
def test_a_branch_without_the_norm_or_the_layer_raises(name: str, recorded: bool):
    model, x = built(KINDS[name]), image(2, 4, 6, 4)
    result = normfuse.apply(model, normfuse.api.EXACT_PASSES, example_inputs=x if recorded else None)
    assert result.report.norms[0].status is Status.APPLIED
    assert_parity(model, result.model, x)
    with pytest.raises(DeployedModelError, match="that take this branch too"):
        result.model(x, plain=True)
    assert_parity(model, result.model, x)


def test_another_batch_size_raises():
    model = built(BySize)
    folded = normfuse.fold(model, example_inputs=image(2, 4, 6, 6))
    assert_parity(model, folded, image(1, 4, 5, 5))
    with pytest.raises(DeployedModelError, match="bn ran 0 times and conv 1 times, in the examples 1 and 1"):
        folded(image(3, 4, 6, 6))


def test_examples_of_both_branches_leave_the_norm():
    model, x = built(Flag), image()
    folded = normfuse.fold(model, example_inputs=[(x,), (x, True)])
    assert type(folded.bn) is nn.BatchNorm2d
    assert_parity(model, folded, (x, True))


class Early(Flag):
    """Returns before the layer, or counts as often as it is asked to."""

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            x = self.bn(self.conv(x))
        return x if times else x * 2


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_branch_without_both_is_right(times: int):
    model = built(Early)
    folded = normfuse.fold(model, example_inputs=image())
    assert isinstance(folded.bn, nn.Identity)
    assert_parity(model, folded, (image(), times))


class Settings(Flag):
    """Decides by its own settings alone, as blocks of networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.act = None, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.down is not None:
            y = self.down(y)
        return y if self.act is None else self.act(y)


def test_nothing_is_counted_where_nothing_is_decided():
    for model in (built(Settings), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double().eval()):
        folded = normfuse.fold(model, example_inputs=image())
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in folded.modules()]
        assert not any(hooks)


@pytest.mark.parametrize("kind", [Flag, Settings])
def test_what_decides(kind: Callable[[], nn.Module]):
    for inputs in (image(), None):
        assert capture(built(kind), inputs).decided == ({"conv", "bn"} if kind is Flag else set())


def test_a_decision_of_the_caller_of_a_model_is_none_of_the_model():
    model, x = built(Settings), image()
    graph = capture(model, x) if x.shape[0] == 2 else None
    assert graph is not None
    assert not graph.decided

    def inner(value: int) -> bool:
        return is_decided(test_a_decision_of_the_caller_of_a_model_is_none_of_the_model.__code__) if value else False

    assert inner(1)


# what a folded model must still be able to do


def raises(model: nn.Module) -> None:
    assert model(image()).shape == image().shape
    with pytest.raises(DeployedModelError):
        model(image(), plain=True)


def test_copies_and_pickles_count_for_themselves(tmp_path: Path):
    folded = normfuse.fold(built(Flag), example_inputs=image())
    copied = copy.deepcopy(folded)
    torch.save(folded, tmp_path / "whole.pt")
    for model in (copied, torch.load(tmp_path / "whole.pt", weights_only=False), folded):
        raises(model)


@pytest.mark.parametrize("arch", [None, "tests.test_tied_calls:Flag"])
def test_files_keep_the_ties(arch: str | None, tmp_path: Path):
    normfuse.save(normfuse.fold(built(Flag), example_inputs=image()), tmp_path / "folded.pt", arch=arch)
    raises(normfuse.load(tmp_path / "folded.pt", arch=arch, allow_globals=["tests.test_tied_calls.Flag"]))


def test_threads_count_for_themselves():
    """One thread stands inside of a run while others begin and end theirs."""
    folded = normfuse.fold(built(Flag), example_inputs=image())
    inside, others_done, errors = threading.Event(), threading.Event(), []

    def wait(*_: object) -> None:
        if threading.current_thread() is slow:
            inside.set()
            others_done.wait(10)

    def run() -> None:
        try:
            folded(image())
        except Exception as error:
            errors.append(error)

    folded.bn.register_forward_hook(wait)
    slow = threading.Thread(target=run)
    slow.start()
    assert inside.wait(10)
    for _ in range(3):
        folded(image())
    others_done.set()
    slow.join()
    assert not errors


def test_a_run_that_fails_leaves_no_count():
    model = built(Flag)
    folded = normfuse.fold(model, example_inputs=image())
    folded.bn.register_forward_pre_hook(lambda module, args: 1 / int(args[0].shape[2] > 2))
    with pytest.raises(ZeroDivisionError):
        folded(image(1, 4, 2, 2))
    folded.bn._forward_pre_hooks.clear()
    assert_parity(model, folded, image())


def test_what_compiles_and_exports_still_does():
    folded = normfuse.fold(built(Flag), example_inputs=image())
    expected = folded(image())
    for other in (torch.compile(folded, backend="eager"), torch.export.export(folded, (image(),)).module()):
        assert torch.equal(other(image()), expected)


def test_counting_is_no_hook_that_stands_in_the_way():
    folded = normfuse.fold(built(Flag), example_inputs=image())
    assert not any(map(has_hooks, folded.modules()))
    folded.bn = nn.Sequential(folded.bn, randomize_norms(nn.BatchNorm2d(4)).double().eval())
    again = normfuse.fold(folded, example_inputs=image())
    assert isinstance(again.bn[1], nn.Identity)
    assert_parity(folded, again, image())
    assert outputs(again, image())
