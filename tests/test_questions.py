"""A model that asks its norms what they are: the place of a folded norm answers, or the norm stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import Reason, Status
from normfuse.capture import capture
from normfuse.layers.deployed import Placeholder
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image


class Asks(nn.Module):
    """Asks its norm, or whatever stands there, before it runs it."""

    def __init__(self, ask: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, eps=1e-3)
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.ask(self.bn, x)))


def asking(ask: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return randomize_norms(Asks(ask).double().eval())


def in_a_loop(norm: nn.Module, x: Tensor) -> Tensor:
    return x + sum(m.weight.shape[0] for m in [norm] if hasattr(m, "weight") and hasattr(m, "running_mean"))


ANSWERED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "type of the gain": lambda norm, x: x.to(norm.weight.dtype),
    "device of the statistics": lambda norm, x: x.to(norm.running_mean.device),
    "shape of the shift": lambda norm, x: x[:, : norm.bias.shape[0]],
    "eps": lambda norm, x: x + norm.eps,
    "number of channels": lambda norm, x: x[:, : norm.num_features],
    "flags": lambda norm, x: x + 1 if norm.affine and norm.track_running_stats and not norm.training else x,
    "momentum": lambda norm, x: x * (norm.momentum or 1.0),
    "whether it has a gain": lambda norm, x: x if norm.weight is None else x * 2,
    "in a loop": in_a_loop,
}
REFUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "first parameter": lambda norm, x: x.to(next(norm.parameters()).dtype),
    "its children": lambda norm, x: x + len(list(norm.children())),
    "its attributes": lambda norm, x: x + len(vars(norm)["_parameters"]),
    "a count": lambda norm, x: x.to(norm.num_batches_tracked.device),
}


@pytest.mark.parametrize("ask", ANSWERED.values(), ids=ANSWERED)
@pytest.mark.parametrize("traced", [False, True])
def test_the_place_of_the_norm_answers(ask: Callable[[Any, Tensor], Tensor], traced: bool):
    model = asking(ask)
    result = normfuse.apply(model, ["fold-bn"], example_inputs=None if traced else image())
    assert [o.status for o in result.report.norms] == [Status.APPLIED]
    assert_parity(model, result.model, image())


@pytest.mark.parametrize("ask", REFUSED.values(), ids=REFUSED)
def test_a_norm_stays_where_nothing_else_could_answer(ask: Callable[[Any, Tensor], Tensor]):
    model = asking(ask)
    result = normfuse.apply(model, ["fold-bn"], example_inputs=image())
    refusal = result.report.norms[0].refusal
    assert refusal is not None
    assert refusal.reason is Reason.ASKED
    assert refusal.detail.startswith("code of the model reads bn.")
    assert_parity(model, result.model, image())


def test_values_of_the_norm_are_not_answered():
    """A read of the values, and not only of their type, keeps the norm."""
    model = asking(lambda norm, x: x * norm.running_var.mean())
    (outcome,) = normfuse.inspect(model, example_inputs=image()).norms
    assert outcome.status is Status.REFUSED


class AsksForClass(Asks):
    """Decides by the class of a layer how it is called."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv, self.bn):
            x = layer(x) if isinstance(layer, nn.BatchNorm2d | nn.Conv2d) else x
        return x


class AsksInMethod(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(self.conv(x))

    def normalize(self, x: Tensor) -> Tensor:
        return self.bn(x) if type(self.bn) is nn.BatchNorm2d else self.bn(x.transpose(1, 3)).transpose(1, 3)


def is_norm_of_channels(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm)


class AsksInFunction(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + float(is_norm_of_channels(self.bn))


@pytest.mark.parametrize("kind", [AsksForClass, AsksInMethod, AsksInFunction])
@pytest.mark.parametrize("traced", [False, True])
def test_a_norm_stays_where_its_class_is_asked(kind: type[Asks], traced: bool):
    model = randomize_norms(kind(lambda norm, x: x).double().eval())
    result = normfuse.apply(model, ["fold-bn"], example_inputs=None if traced else image())
    refusal = result.report.norms[0].refusal
    assert refusal is not None
    assert refusal.reason is Reason.ASKED
    assert f"the model ({kind.__name__}) asks whether a layer is a BatchNorm2d" in refusal.detail
    assert_parity(model, result.model, image())


class AsksLayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.to(self.norm.weight.dtype)))


def test_a_norm_that_only_loses_its_gain_keeps_answering():
    model = randomize_norms(AsksLayerNorm().double().eval())
    result = normfuse.apply(model, ["fold-affine"], example_inputs=image(2, 3, 4))
    assert result.report
    assert_parity(model, result.model, image(2, 3, 4))


def test_reads_are_noted_without_a_trace():
    model = asking(ANSWERED["eps"])
    graph = capture(model, image())
    assert graph.asked == {"bn": {"eps"}}
    assert "__getattribute__" not in vars(nn.BatchNorm2d)


def test_a_norm_that_asks_itself_is_no_question():
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            mean, var = self.running_mean, self.running_var
            return nn.functional.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    model = randomize_norms(nn.Sequential(nn.Conv2d(4, 4, 1), Own(4)).double().eval())
    assert not capture(model, image()).asked
    assert isinstance(normfuse.fold(model, example_inputs=image())[1], nn.Identity)


def built() -> nn.Module:
    return asking(ANSWERED["type of the gain"])


def test_the_placeholder_is_an_identity_without_state(tmp_path: Path):
    folded = normfuse.fold(built(), example_inputs=image())
    assert isinstance(folded.bn, Placeholder)
    assert list(folded.state_dict()) == ["conv.weight", "conv.bias"]
    assert folded.bn.weight.isnan().all()
    assert normfuse.inspect(folded, example_inputs=image()).norms == ()
    half = copy.deepcopy(folded).to(torch.bfloat16)
    assert half(image()).dtype is torch.bfloat16
    normfuse.save(folded, tmp_path / "folded.pt", arch="tests.test_questions:built")
    loaded = normfuse.load(tmp_path / "folded.pt", arch="tests.test_questions:built")
    assert_parity(folded, loaded, image())
    program = torch.export.export(folded, (image(),)).module()
    assert torch.allclose(program(image()), folded(image()), atol=1e-10, rtol=0)
