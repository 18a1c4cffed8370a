"""Layers that no example reached: those that could be given a changed value raise in the folded model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse import DeployedModelError, Reason, Status
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image


class Domains(nn.Module):
    """One convolution, and a norm for each domain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bns = nn.Conv2d(4, 4, 1), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.bns[domain](self.conv(x))


class OtherLayer(Domains):
    """The other branch is no norm, and lies in a container that does not run either."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.other(self.conv(x)) if domain else super().forward(x)


class Block(Domains):
    """Is used by a method of its own, so that its forward never runs."""

    def encode(self, x: Tensor, domain: int) -> Tensor:
        return Domains.forward(self, x, domain)


class ByMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.block.encode(x, domain)


class ByRank(Domains):
    """Another rank of the input takes another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bns = nn.Linear(4, 4), nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        y = self.conv(x)
        return self.bns[0](y) if x.dim() == 2 else self.bns[1](y.transpose(1, 2))


def built(kind: Callable[[], nn.Module]) -> nn.Module:
    return randomize_norms(kind().double().eval())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple, tuple, set[str]]] = {
    "norms by domain": (Domains, (image(),), (image(), 1), {"bns.1"}),
    "another layer": (OtherLayer, (image(),), (image(), 1), {"bns.1", "other", "other.0", "other.1"}),
    "through a method": (ByMethod, (image(),), (image(), 1), {"block", "block.bns.1"}),
    "another rank": (ByRank, (image(3, 4),), (image(2, 3, 4),), {"bns.1"}),
}


def guarded(report: normfuse.Report) -> set[str]:
    reason = Reason.NOT_REACHED
    return {o.subject for o in report.not_reached if o.refusal is not None and o.refusal.reason is reason}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_branch_that_no_example_took_raises(case, inplace: bool):
    kind, example, other, names = case
    model = built(kind)
    source = copy.deepcopy(model)
    result = normfuse.apply(model, ["fold-bn"], example_inputs=example, inplace=inplace)
    assert result.report.norms[0].status is Status.APPLIED
    assert guarded(result.report) == names
    assert_parity(source, result.model, example)
    with pytest.raises(DeployedModelError, match="ran in no example"):
        result.model(*other)


def test_a_traced_model_raises_too():
    folded = normfuse.fold(built(Domains))
    assert isinstance(folded.bns[0], nn.Identity)
    with pytest.raises(DeployedModelError, match=r"bns\.1"):
        folded(image(), 1)


class Head(nn.Module):
    """An auxiliary head on the output of whole blocks, which no fold changes; and what does nothing in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.conv, self.drop, self.skip = nn.Conv2d(4, 4, 1), nn.Dropout(), nn.Identity()
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor, head: bool = False) -> Tensor:
        y = self.block(x)
        return self.head(y) if head else self.conv(y)


def test_a_layer_that_sees_no_changed_value_goes_on():
    model = built(Head)
    result = normfuse.apply(model, ["fold-bn"], example_inputs=image())
    assert [o.status for o in result.report.norms] == [Status.APPLIED, Status.NOT_REACHED]
    assert not guarded(result.report)
    assert torch.allclose(result.model(image(), head=True), model(image(), head=True), atol=1e-10, rtol=0)


class CallsForward(Domains):
    """Calls a layer by its ``forward``, past the hooks, where no reader of the model sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.act.forward(super().forward(x, domain))


@pytest.mark.parametrize("example", [image(), None])
def test_a_layer_that_is_called_by_its_forward_ran(example: Tensor | None):
    model = built(CallsForward)
    result = normfuse.apply(model, ["fold-bn"], example_inputs=example)
    assert guarded(result.report) == {"bns.1"}
    assert_parity(model, result.model, image())


class HoldsForward(Domains):
    """Calls a block by its ``forward``, which a dictionary holds."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.steps = {"run": self.block.forward}

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return super().forward(self.steps["run"](x), domain)


@pytest.mark.parametrize("example", [image(), None])
def test_a_block_whose_forward_is_held_and_called_ran(example: Tensor | None, tmp_path: Path):
    model = built(HoldsForward)
    result = normfuse.apply(model, ["fold-bn"], example_inputs=example)
    assert guarded(result.report) == {"bns.1"}
    torch.save(result.model, tmp_path / "whole.pt")
    for folded in (result.model, copy.deepcopy(result.model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert_parity(model, folded, image())


class Computed(nn.Module):
    """Is traced as a whole only when its first weight is made plain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1, bias=False))
        self.steps = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])
        self.tail, self.other = nn.Sequential(nn.Sigmoid(), nn.Tanh()), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        x = F.conv2d(x, self.first.weight)
        x = self.steps[1](self.steps[0](x))
        return self.other(x) if other else self.tail(x)


def test_a_model_that_materializing_makes_traceable_is_read_as_a_whole():
    model = built(Computed)
    result = normfuse.apply(model, normfuse.api.EXACT_PASSES)
    assert result.report.norms[0].status is Status.APPLIED
    assert guarded(result.report) == {"other"}
    assert_parity(model, result.model, image())


def test_the_guard_is_undone_by_hand():
    model = built(Domains)
    folded = normfuse.fold(model, example_inputs=image())
    del folded.bns[1].forward
    assert folded(image(), 1).shape == image().shape


def test_the_guard_changes_nothing_else():
    model = built(Domains)
    folded = normfuse.fold(model, example_inputs=image())
    assert type(folded.bns[1]) is nn.BatchNorm2d
    assert [key for key in folded.state_dict() if key.startswith("bns.1")] == [
        key for key in model.state_dict() if key.startswith("bns.1")
    ]
    traced = torch.fx.symbolic_trace(folded, concrete_args={"domain": 0})
    for other in (copy.deepcopy(folded), torch.compile(folded, backend="eager"), traced):
        assert torch.allclose(other(image()), folded(image()), atol=1e-10, rtol=0)
    program = torch.export.export(folded, (image(),)).module()
    assert torch.allclose(program(image()), folded(image()), atol=1e-10, rtol=0)
    with pytest.raises(DeployedModelError):
        copy.deepcopy(folded)(image(), 1)


@pytest.mark.parametrize("arch", [None, "tests.test_reach:Domains"])
def test_the_guard_is_kept_in_the_file(arch: str | None, tmp_path: Path):
    folded = normfuse.fold(built(Domains), example_inputs=image())
    normfuse.save(folded, tmp_path / "folded.pt", arch=arch)
    allowed = ["tests.test_reach.Domains"]
    loaded = normfuse.load(tmp_path / "folded.pt", arch=arch, allow_globals=allowed)
    assert_parity(folded, loaded, image())
    with pytest.raises(DeployedModelError, match=r"bns\.1"):
        loaded(image(), 1)


def test_a_pickled_model_keeps_the_guard(tmp_path: Path):
    torch.save(normfuse.fold(built(Domains), example_inputs=image()), tmp_path / "whole.pt")
    with pytest.raises(DeployedModelError, match=r"bns\.1"):
        torch.load(tmp_path / "whole.pt", weights_only=False)(image(), 1)


def test_a_model_that_was_not_changed_has_no_guards():
    model = built(Domains)
    result = normfuse.apply(model, ["fold-bn"], example_inputs=image(), exclude=["bns.0"])
    assert not guarded(result.report)
    assert torch.equal(result.model(image(), 1), model(image(), 1))


class HoldsScript(Domains):
    """The other branch was compiled by TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
            self.script = torch.jit.script(nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.script(self.conv(x)) if domain else super().forward(x)


def test_a_compiled_branch_raises_too():
    model = built(HoldsScript)
    result = normfuse.apply(model, ["fold-bn"], example_inputs=image())
    assert guarded(result.report) == {"bns.1", "script"}
    assert_parity(model, result.model, image())
    with pytest.raises(DeployedModelError, match="script"):
        result.model(image(), 1)
