"""Merging parallel linear branches: the networks it was made for, every refusal, and what may not be touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import normfuse
from normfuse import surgery
from normfuse.base import Reason
from normfuse.pipeline import Result
from tests.parity import assert_parity, randomize_norms

PASSES = ("fold-bn", "merge-branches")


class Block(nn.Module):
    """Branches of one value, summed, inside a module of their own, then an activation."""

    def __init__(self, *branches: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.head = head or nn.Identity()
        self.branches = nn.ModuleList(branches)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        total: int | Tensor = 0
        for branch in self.branches:
            total = total + branch(x)
        return self.act(total)


def merged(block: nn.Module, channels: int = 8) -> tuple[nn.Module, Result[nn.Sequential]]:
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.SiLU(), block).double().eval()
    randomize_norms(model)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    result = normfuse.apply(model, PASSES, example_inputs=x)
    assert_parity(model, result.model, x)
    assert_parity(model, result.model, torch.randn(1, 3, 17, 11, dtype=torch.float64))
    return model, result


def convs(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def reasons(result: Result[nn.Sequential]) -> set[Reason]:
    return {outcome.refusal.reason for outcome in result.report.refused if outcome.refusal}


BRANCHES: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "repvgg": lambda: (nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
    "norms behind": lambda: (
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)),
        nn.BatchNorm2d(8),
    ),
    "depthwise": lambda: (
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Identity(),
    ),
    "grouped": lambda: (
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8),
    ),
    "strided": lambda: (nn.Conv2d(8, 4, 3, padding=1, stride=2), nn.Conv2d(8, 4, 1, stride=2)),
    "dilated": lambda: (nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 1)),
    "same": lambda: (nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 1, padding="valid")),
    "rectangular": lambda: (nn.Conv2d(8, 8, (3, 1), padding=(1, 0)), nn.Conv2d(8, 8, (3, 1), padding=(1, 0))),
    "identity": lambda: (nn.Conv2d(8, 8, 1), nn.Identity()),
    "unpadded": lambda: (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_become_one_convolution(name: str) -> None:
    _, result = merged(Block(*BRANCHES[name]()))
    assert len(convs(result.model)) == 2
    assert not [m for m in result.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(result.report.norms) == len({o.subject for o in result.report.norms})
    assert all(outcome.status is normfuse.Status.APPLIED for outcome in result.report.norms)


def test_what_runs_before_and_after_the_branches_stays() -> None:
    head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.SiLU())
    _, result = merged(Block(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), head=head))
    assert [type(m).__name__ for m in result.model[2].children()] == ["Sequential", "Conv2d", "ReLU"]


def test_a_difference_and_a_scale_merge() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.norm = nn.BatchNorm2d(8)
            self.gamma = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * (self.conv(x) - self.norm(x))

    _, result = merged(Mixer())
    assert isinstance(result.model[2], nn.Conv2d)


def test_one_dimension() -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.norm(x)

    model = randomize_norms(nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), Line()).double().eval())
    x = torch.randn(2, 2, 16, dtype=torch.float64)
    result = normfuse.apply(model, PASSES, example_inputs=x)
    assert_parity(model, result.model, x)
    assert isinstance(result.model[2], nn.Conv1d)


UNMERGED: dict[str, tuple[Callable[[], tuple[nn.Module, ...]], Reason]] = {
    "dense and depthwise": (
        lambda: (nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.BatchNorm2d(8)),
        Reason.NOT_CHEAPER,
    ),
    "two dilations": (
        lambda: (nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 3, padding=1)),
        Reason.EXTRA_CONSUMER,
    ),
    "reflected": (
        lambda: (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)),
        Reason.EXTRA_CONSUMER,
    ),
    "non-linear": (lambda: (nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU()), nn.BatchNorm2d(8)), Reason.EXTRA_CONSUMER),
}


@pytest.mark.parametrize("name", UNMERGED)
def test_what_is_no_gain_or_no_sum_stays(name: str) -> None:
    branches, reason = UNMERGED[name]
    _, result = merged(Block(*branches()))
    assert reason in reasons(result)
    assert any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())


def test_a_block_that_is_called_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    _, result = merged(Twice())
    assert Reason.SHARED_MODULE in reasons(result)


def test_a_hook_on_the_block_is_refused() -> None:
    block = Block(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    block.branches[0].register_forward_hook(lambda module, args, output: None)
    _, result = merged(block)
    assert Reason.HAS_HOOKS in reasons(result)


def test_a_branch_that_is_read_elsewhere_keeps_the_block() -> None:
    class Leaky(Block):
        def forward(self, x: Tensor) -> Tensor:
            first = self.branches[0](x)
            return (first + self.branches[1](x)) * first

    _, result = merged(Leaky(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)))
    assert any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())


@pytest.mark.models
@pytest.mark.parametrize(("name", "norms"), [("repghostnet_050", 112), ("fastvit_t8", 70), ("repvgg_a0", 61)])
def test_reparametrizable_networks_lose_every_norm(name: str, norms: int) -> None:
    model = randomize_norms(timm.create_model(name).double().eval())
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    result = normfuse.apply(model, normfuse.api.EXACT_PASSES, example_inputs=x)
    assert_parity(model, result.model, x)
    assert sum(o.status is normfuse.Status.APPLIED and not o.remains for o in result.report.norms) == norms


def test_the_structure_is_rebuilt_from_the_manifest() -> None:
    model, result = merged(Block(*BRANCHES["norms behind"]()))
    fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), Block(*BRANCHES["norms behind"]())).double().eval()
    surgery.replay(fresh, result.model.normfuse_manifest["edits"])
    for name, tensor in result.model.state_dict().items():
        surgery.assign(fresh.get_submodule, {name: tensor})
    assert_parity(model, fresh, torch.randn(2, 3, 12, 12, dtype=torch.float64))
