"""What Tune mode keeps between calls is never stale, whichever way a value is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.layers.tuned import Pairing
from tests.gradients import hard_norms
from tests.parity import EXACT, error
from tests.zoo.trap import image


def inputs() -> Tensor:
    """Return inputs whose outputs are so large that it is the weight that is scaled and kept."""
    return image(2, 4, 12, 12)


@pytest.fixture
def pair() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).double().eval()
    return hard_norms(model)  # type: ignore[return-value]


def picture() -> Tensor:
    """Return an input whose output is so large that the effective weight is kept."""
    return image(2, 4, 11, 11)


def pairing(tuned: nn.Sequential) -> Pairing:
    return vars(tuned[0])["_normfuse_tuned"]


def step(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(picture()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def fill(attribute: str, layer: int, value: float = 0.5) -> Callable[[nn.Sequential], None]:
    """Return what changes a tensor of a layer in place, as autograd sees it."""

    def write(model: nn.Sequential) -> None:
        with torch.no_grad():
            getattr(model[layer], attribute).copy_(torch.full_like(getattr(model[layer], attribute), value))

    return write


def fill_data(attribute: str, layer: int) -> Callable[[nn.Sequential], None]:
    """Return what changes a tensor behind autograd's back."""
    return lambda model: getattr(model[layer], attribute).data.mul_(1.5)


def replace_data(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data.flip(0)


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


def replace_buffer(model: nn.Sequential) -> None:
    model[1].running_mean = model[1].running_mean + 1


def replace_eps(model: nn.Sequential) -> None:
    model[1].eps = 0.1


def load(model: nn.Sequential) -> None:
    model.load_state_dict(
        {key: value * 0.5 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    )


def set_to_none(model: nn.Sequential) -> None:
    model[0].bias = None


def momentum_update(model: nn.Sequential) -> None:
    """As averages of weights are made."""
    for parameter in model.parameters():
        parameter.data.lerp_(parameter.detach() + 1, 0.3)


WRITES: dict[str, Callable[[nn.Sequential], None]] = {
    "optimizer": step,
    "average": momentum_update,
    "parameter replaced": replace_parameter,
    "weight.data replaced": replace_data,
    "buffer replaced": replace_buffer,
    "eps": replace_eps,
    "state dict": load,
    "bias removed": set_to_none,
    **{
        f"{name} {layer}": fill(name, layer) for name, layer in (("weight", 0), ("bias", 0), ("weight", 1), ("bias", 1))
    },
    **{f"data of {n} {i}": fill_data(n, i) for n, i in (("weight", 0), ("bias", 0), ("weight", 1), ("bias", 1))},
    **{name: fill(name, 1) for name in ("running_mean", "running_var")},
    **{f"data of {name}": fill_data(name, 1) for name in ("running_mean", "running_var")},
}
RUNS: dict[str, Callable[[], Any]] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("write", WRITES)
def test_never_stale(pair: nn.Sequential, write: str, run: str, form: str):
    """After each kind of write the next call, with or without gradients, is that of eval mode."""
    tuned = normfuse.tune_mode(copy.deepcopy(pair))
    moved: list[float] = []
    for given in (inputs(), image(2, 4, 4, 4), inputs()):
        with RUNS[run]():
            before = tuned(given).clone()
            assert torch.equal(before, tuned(given))
        for model in (pair, tuned):
            WRITES[write](model)
        with torch.no_grad():
            expected = pair(given)
        with RUNS[run]():
            assert error(expected, tuned(given)) <= EXACT
        assert error(expected, tuned(given).detach()) <= EXACT
        moved.append(error(expected, before))
    assert moved[0] > EXACT, "the write makes a difference"


def test_inference_first_and_training_afterwards(pair: nn.Sequential, form: str):
    """Nothing made under inference_mode ends up in a graph."""
    tuned = normfuse.tune_mode(copy.deepcopy(pair))
    for trained in ("weight", "bias"):
        for model in (pair, tuned):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith(trained))
        with torch.inference_mode():
            tuned(picture())
        expected, found = (
            torch.autograd.grad(m(picture()).square().sum(), [p for p in m.parameters() if p.requires_grad])
            for m in (pair, tuned)
        )
        for one, two in zip(expected, found, strict=True):
            assert error(one, two) <= EXACT


def test_model_made_under_inference_mode(form: str):
    with torch.inference_mode():
        model = hard_norms(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).double().eval())
        expected = model(picture())
        tuned = normfuse.tune_mode(model)
        assert error(expected, tuned(picture())) <= EXACT
        model[0].weight.mul_(2)
        model[0].bias.mul_(2)
        model[1].running_mean.mul_(2)
        expected = normfuse.tune_mode(copy.deepcopy(tuned), False)(picture())
        assert error(expected, tuned(picture())) <= EXACT


def test_kept_while_nothing_changes(pair: nn.Sequential):
    tuned = normfuse.tune_mode(pair)
    with torch.no_grad():
        tuned(picture())
        first = pairing(tuned).weight.value
        tuned(picture())
        assert pairing(tuned).weight.value is first
        tuned[0].weight.mul_(2)
        tuned(picture())
        assert pairing(tuned).weight.value is not first


def test_reciprocal_deviations_are_kept_while_training(pair: nn.Sequential):
    tuned = normfuse.tune_mode(pair)
    step(tuned)
    first = pairing(tuned).rstd.value
    step(tuned)
    assert pairing(tuned).rstd.value is first
    tuned[1].running_var.data.mul_(2)
    plain = normfuse.tune_mode(copy.deepcopy(tuned), False).eval()
    for model in (plain, tuned):
        model(picture()).square().sum().backward()
    assert pairing(tuned).rstd.value is not first
    for one, two in zip(plain.parameters(), tuned.parameters(), strict=True):
        assert error(one.grad, two.grad) <= EXACT


@pytest.mark.parametrize("shape", [(1, 4, 3, 3), (2, 4, 9, 9)])
def test_weight_that_is_large_beside_its_output_is_not_kept(pair: nn.Sequential, shape: tuple[int, ...]):
    """A copy of it would cost more memory than Tune mode saves; the output is scaled instead."""
    with torch.no_grad():
        given = image(*shape)
        expected = pair(given)
        tuned = normfuse.tune_mode(pair)
        assert error(expected, tuned(given)) <= EXACT
    assert pairing(tuned).weight.value is None
    assert [tensor.shape for tensor in pairing(tuned).scale.value] == [(8,), (8,)]


def test_copies_keep_nothing(pair: nn.Sequential):
    tuned = normfuse.tune_mode(pair)
    with torch.no_grad():
        tuned(picture())
        copied = copy.deepcopy(tuned)
        assert pairing(tuned).weight.value is not None
        assert pairing(copied).weight.value is None
        assert pairing(copied).norm is copied[1]
        copied[0].weight.zero_()
        assert error(normfuse.tune_mode(copy.deepcopy(copied), False)(picture()), copied(picture())) <= EXACT


def test_two_dtypes_in_turn(pair: nn.Sequential, form: str):
    """Autocast and its absence do not share a weight."""
    tuned = normfuse.tune_mode(pair.float())
    given = inputs().float()
    with torch.no_grad():
        full = tuned(given)
        with torch.autocast("cpu", torch.bfloat16):
            assert tuned(given).dtype is torch.bfloat16
        assert torch.equal(full, tuned(given))
