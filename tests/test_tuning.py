"""``tune_mode`` on a whole model: steps, state, modes, the way back, and what is said about it."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.layers.change_of_class import TunedLayer
from normfuse.layers.tuned import FixedNorm, TunedProduct
from normfuse.tuning import tune_mode, tuned
from tests.gradients import assert_same, gradients, hard_norms, set_mode
from tests.zoo.trap import image


class Block(nn.Module):
    """A residual block with dropout as a layer and as a function, and a norm that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.bn1(self.conv1(self.alone(x))).relu())
        y = F.dropout(self.bn2(self.conv2(y)), 0.2, training=self.training)
        return F.relu(x + y)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem = (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    model = nn.Sequential(*stem, Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return hard_norms(model.double())  # type: ignore[return-value]


NORMS = ["1", "3.alone", "3.bn1", "3.bn2"]


class Untraceable(nn.Module):
    """No part of it can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if x.sum() < 1e9 else x


# steps


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.01, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        torch.manual_seed(step)
        inputs, targets = torch.randn(8, 4, 6, 6, dtype=torch.float64, generator=generator), torch.arange(8) % 3
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_follow_eval_mode(optimizer: str, form: str):
    """Five steps, with an optimizer made before; AdamW divides by gradients, so rounding is magnified."""
    reference, model = network(), network()
    optimizers = [OPTIMIZERS[optimizer](m.parameters()) for m in (reference, model)]
    before = copy.deepcopy(model.state_dict())
    tune_mode(model).train()
    train(set_mode(reference, True), optimizers[0], 5)
    train(model, optimizers[1], 5)
    for (name, one), two in zip(reference.named_parameters(), model.parameters(), strict=True):
        scale = float(one.detach().abs().max())
        torch.testing.assert_close(one, two, rtol=0, atol=1e-8 * scale, msg=name)
        assert not torch.equal(before[name], two), f"{name} was trained"
    for name, buffer in model.named_buffers():
        assert torch.equal(before[name], buffer), f"{name} stays bit by bit"


def test_statistics_survive_every_call_of_train():
    model = tune_mode(network())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    versions = {name: buffer._version for name, buffer in model.named_buffers()}
    for step in (model.train, model.eval, model[3].train, lambda: model[3].alone.train(), lambda: model[1].train()):
        step()
        model(image()).sum().backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(before[name], buffer)
        assert buffer._version == versions[name], f"{name} was not even written to"


def test_dropout_follows_the_mode():
    model = tune_mode(network())
    assert_same(gradients(set_mode(network(), True), image()), gradients(model.train(), image()))
    assert_same(gradients(network().eval(), image()), gradients(model.eval(), image()))
    with torch.no_grad():
        assert torch.equal(model.eval()(image()), model(image()))
        assert not torch.equal(model.train()(image()), model(image()))


# state


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model that tune_mode may not change."""
    return {
        "state": {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()},
        "training": [module.training for module in model.modules()],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "trained": [p.requires_grad for p in model.parameters()],
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert list(before["state"]) == list(after["state"]), "keys and their order"
    for key, (identity, value) in before["state"].items():
        assert after["state"][key][0] == identity, f"{key} is the same tensor"
        assert torch.equal(value, after["state"][key][1])
    assert all(before[key] == after[key] for key in ("training", "modules", "trained"))


@pytest.mark.parametrize("example", [None, image()], ids=["traced", "recorded"])
def test_nothing_but_classes_changes(example: Tensor | None):
    model = network()
    model[3].eval()
    model[1].weight.requires_grad_(False)
    before, classes = snapshot(model), [type(module) for module in model.modules()]
    instances = [dict(vars(module)) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    assert tune_mode(model, example_inputs=example) is model
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert_unchanged(before, model)
    assert sum(isinstance(m, TunedLayer) for m in model.modules()) == 7
    assert tune_mode(model, False) is model
    assert_unchanged(before, model)
    assert [type(module) for module in model.modules()] == classes
    for module, kept in zip(model.modules(), instances, strict=True):
        assert list(vars(module)) == list(kept)
        assert all(vars(module)[key] is value for key, value in kept.items())


def test_state_dicts_fit_both_ways():
    plain, model = network(), tune_mode(network())
    expected = gradients(plain.eval(), image())
    for tensor in model.state_dict().values():
        tensor.fill_(1)
    assert model.load_state_dict(plain.state_dict()) == ([], [])
    assert_same(expected, gradients(model.eval(), image()))
    other = network()
    for tensor in other.state_dict().values():
        tensor.fill_(1)
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert_same(expected, gradients(other.eval(), image()))


def test_twice_is_once():
    once, twice = tune_mode(network()), tune_mode(tune_mode(network()))
    assert [type(m) for m in once.modules()] == [type(m) for m in twice.modules()]
    assert_same(gradients(once, image()), gradients(twice, image()))
    assert [type(m) for m in tune_mode(twice, False).modules()] == [type(m) for m in network().modules()]


def test_a_plain_model_is_left_alone_by_the_way_back():
    model = network()
    before = snapshot(model)
    assert_unchanged(before, tune_mode(model, False))


def test_trained_and_back():
    """What was learned stays when the classes go back, and the statistics move again in train()."""
    model = tune_mode(network()).train()
    train(model, OPTIMIZERS["SGD"](model.parameters()), 1)
    expected = gradients(model.eval(), image())
    tune_mode(model, False)
    assert_same(expected, gradients(model, image()))
    mean = model[1].running_mean.clone()
    model.train()(image())
    assert not torch.equal(mean, model[1].running_mean)


def test_context_manager():
    model = network()
    with tuned(model) as same:
        assert same is model
        assert isinstance(model[0], TunedProduct)
    assert type(model[0]) is nn.Conv2d
    with contextlib.suppress(KeyError), tuned(model, exclude=["1"]):
        assert [isinstance(m, TunedLayer) for m in (model[1], model[3].conv1)] == [False, True]
        raise KeyError
    assert [type(m) for m in model.modules()] == [type(m) for m in network().modules()]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module]):
    inner = network()
    wrapped = wrap(inner)
    assert tune_mode(wrapped) is wrapped
    assert isinstance(inner[0], TunedProduct)
    tune_mode(wrapped, False)
    assert type(inner[0]) is nn.Conv2d


# which norms


def touched(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, TunedLayer) and hasattr(m, "running_mean")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, NORMS),
        ({"include": ["3.*"]}, NORMS[1:]),
        ({"include": ["3.bn?"], "exclude": ["3.bn1"]}, ["3.bn2"]),
        ({"exclude": ["3.alone"]}, ["1", "3.bn1", "3.bn2"]),
        ({"exclude": ["*"]}, []),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_include_and_exclude(options: dict[str, Any], expected: list[str]):
    model = tune_mode(network(), **options)
    assert touched(model) == expected
    model.train()(image())
    moved = [
        name
        for name in NORMS
        if not torch.equal(model.get_buffer(f"{name}.running_mean"), network().get_buffer(f"{name}.running_mean"))
    ]
    assert moved == [name for name in NORMS if name not in expected]


def test_apply_does_what_inspect_says():
    model = network().train()
    report = normfuse.inspect(model, ["tune-mode"])
    result = normfuse.apply(model, ["tune-mode"])
    assert report == result.report
    assert result.model is not model
    assert [o.subject for o in report.norms] == ["1", "3.alone", "3.bn1", "3.bn2"]
    assert {o.subject: o.partners for o in report.norms} == {
        "1": ("0",),
        "3.alone": (),
        "3.bn1": ("3.conv1",),
        "3.bn2": ("3.conv2",),
    }
    assert all(module.training for module in result.model.modules()), "Tune mode does not choose the mode"
    assert touched(normfuse.apply(model, ["tune-mode"], inplace=True).model) == NORMS
    assert touched(model) == NORMS


def test_fold_leaves_tune_mode_first():
    model = tune_mode(network())
    folded = normfuse.fold_bn(model)
    assert touched(model) == NORMS, "the source is as it was"
    assert not touched(folded)
    with torch.no_grad():
        assert_same({"y": network().eval()(image())}, {"y": folded(image())})


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[tuple[int, str]]]]:
    with caplog.at_level(logging.INFO, "normfuse"):
        yield lambda: [(record.levelno, record.getMessage()) for record in caplog.records]


def test_says_what_it_did(messages: Callable[[], list[tuple[int, str]]]):
    tune_mode(network())
    [(level, text)] = messages()
    assert level == logging.INFO
    assert text.startswith("tune-mode: 3 of 4 norms applied by the layer before, 1 on fixed statistics where they are")


def test_warns_where_nothing_is_paired(messages: Callable[[], list[tuple[int, str]]]):
    model = tune_mode(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)))
    [(level, text)] = messages()
    assert level == logging.WARNING
    assert "0 of 1 norms applied" in text
    assert touched(model) == ["2"]


def test_says_nothing_alarming_about_a_model_without_norms(messages: Callable[[], list[tuple[int, str]]]):
    tune_mode(nn.Sequential(nn.Linear(4, 4)))
    assert [level for level, _ in messages()] == [logging.INFO]


def test_untraceable_model_keeps_its_statistics(messages: Callable[[], list[tuple[int, str]]]):
    model = hard_norms(Untraceable().double())
    before, expected = copy.deepcopy(model.state_dict()), gradients(set_mode(copy.deepcopy(model), False), image())
    tune_mode(model).train()
    [(level, text)] = messages()
    assert level == logging.WARNING
    assert "pass example_inputs" in text
    assert isinstance(model.bn, FixedNorm)
    assert_same(expected, gradients(model, image()))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert touched(tune_mode(copy.deepcopy(model), exclude=["bn"])) == []
    tune_mode(model, example_inputs=image())
    assert isinstance(model.conv, TunedProduct)
    assert_same(expected, gradients(model, image()))


def test_example_that_the_model_does_not_take():
    model = tune_mode(network())
    with pytest.raises(normfuse.CaptureError, match="does not run on the example inputs"):
        tune_mode(model, example_inputs=image(1, 3))
    assert_same(gradients(network().eval(), image()), gradients(model.eval(), image()))
