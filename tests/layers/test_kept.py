"""What Tune mode keeps between calls is never stale, whichever way a value is written."""

from __future__ import annotations

import copy
import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.layers.normalized_layer import Pairing
from tests.gradients import hard_norms
from tests.parity import EXACT, error
from tests.zoo.trap import image


def inputs() -> Tensor:
    """Return inputs whose outputs are so large that it is always the weight that is scaled."""
    return image(2, 4, 12, 12)


def small() -> Tensor:
    """Return inputs whose outputs are so small that it is they that are scaled."""
    return image(1, 4, 4, 4)


@pytest.fixture
def pair() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).double().eval()
    return hard_norms(model)  # type: ignore[return-value]


def pairing(tuned: nn.Sequential) -> Pairing:
    return vars(tuned[0])["_normfuse_tuned"]


def step(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(inputs()).square().sum().backward()
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
    for given in (inputs(), small(), inputs()):
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
            tuned(inputs())
        expected, found = (
            torch.autograd.grad(m(inputs()).square().sum(), [p for p in m.parameters() if p.requires_grad])
            for m in (pair, tuned)
        )
        for one, two in zip(expected, found, strict=True):
            assert error(one, two) <= EXACT


def test_model_made_under_inference_mode(form: str):
    with torch.inference_mode():
        model = hard_norms(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).double().eval())
        expected = model(inputs())
        tuned = normfuse.tune_mode(model)
        assert error(expected, tuned(inputs())) <= EXACT
        model[0].weight.mul_(2)
        model[0].bias.mul_(2)
        model[1].running_mean.mul_(2)
        expected = normfuse.tune_mode(copy.deepcopy(tuned), False)(inputs())
        assert error(expected, tuned(inputs())) <= EXACT


def test_kept_while_nothing_changes(pair: nn.Sequential):
    tuned = normfuse.tune_mode(pair)
    with torch.no_grad():
        tuned(inputs())
        first = pairing(tuned).fixed.value
        tuned(small())
        assert pairing(tuned).fixed.value is first
        tuned[1].weight.mul_(2)
        tuned(inputs())
        assert pairing(tuned).fixed.value is not first


def test_nothing_made_from_the_weight_is_kept(pair: nn.Sequential):
    """It could not be told whether it is right without reading the whole weight."""
    with torch.no_grad():
        tuned = normfuse.tune_mode(pair)
        for given in (inputs(), small()):
            tuned(given)
            assert [vector.shape for vector in pairing(tuned).fixed.value] == [(8,), (8,)]


# writes to a part of the weight that autograd does not see


def outside_of_torch(weight: Tensor) -> None:
    ctypes.memset(weight.data_ptr(), 0x40, weight.element_size())  # 2 to 33 in any format


def swap(weight: Tensor) -> None:
    weight.data[[4, 6]] = weight.data[[6, 4]]


def negate(weight: Tensor) -> None:
    weight.data[3].neg_()


def one_value(weight: Tensor) -> None:
    weight.data[5, 2, 1, 1] = 7


def one_filter(weight: Tensor) -> None:
    weight.data[7] = 0


def not_a_number(weight: Tensor) -> None:
    weight.data[4, 0, 0, 0] = float("nan")


ROUNDING = {torch.float64: EXACT, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}
PARTS = {
    function.__name__: function for function in (outside_of_torch, swap, negate, one_value, one_filter, not_a_number)
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda weight: weight.contiguous(memory_format=torch.channels_last),
    "transposed": lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
    "a part of another": lambda weight: torch.cat([weight, weight], 1)[:, 2:6],
}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_weight_counts(pair: nn.Sequential, part: str, dtype: torch.dtype, form: str):
    """One filter, one value, a change of order or of sign: the next call is that of a model that never ran before."""
    tuned = normfuse.tune_mode(pair.to(dtype)).requires_grad_(False)
    for given, layout in itertools.product((inputs().to(dtype), small().to(dtype)), LAYOUTS.values()):
        tuned[0].weight.data = layout(torch.randn_like(tuned[0].weight))
        before = tuned(given).clone()
        PARTS[part](tuned[0].weight)
        expected, found = (model(given).nan_to_num(9.0) for model in (copy.deepcopy(tuned), tuned))
        assert error(expected, found) <= ROUNDING[dtype]
        assert not torch.equal(before, found)


def test_reciprocal_deviations_are_kept_while_training(pair: nn.Sequential):
    tuned = normfuse.tune_mode(pair)
    step(tuned)
    first = pairing(tuned).rstd.value
    step(tuned)
    assert pairing(tuned).rstd.value is first
    tuned[1].running_var.data.mul_(2)
    plain = normfuse.tune_mode(copy.deepcopy(tuned), False).eval()
    for model in (plain, tuned):
        model(inputs()).square().sum().backward()
    assert pairing(tuned).rstd.value is not first
    for one, two in zip(plain.parameters(), tuned.parameters(), strict=True):
        assert error(one.grad, two.grad) <= EXACT


def test_copies_keep_nothing(pair: nn.Sequential):
    tuned = normfuse.tune_mode(pair)
    with torch.no_grad():
        tuned(inputs())
        copied = copy.deepcopy(tuned)
        assert pairing(tuned).fixed.value is not None
        assert pairing(copied).fixed.value is None
        assert pairing(copied).norm is copied[1]
        copied[0].weight.zero_()
        assert error(normfuse.tune_mode(copy.deepcopy(copied), False)(inputs()), copied(inputs())) <= EXACT


def test_two_dtypes_in_turn(pair: nn.Sequential, form: str):
    """Autocast and its absence do not share a weight."""
    tuned = normfuse.tune_mode(pair.float())
    given = inputs().float()
    with torch.no_grad():
        full = tuned(given)
        with torch.autocast("cpu", torch.bfloat16):
            assert tuned(given).dtype is torch.bfloat16
        assert torch.equal(full, tuned(given))
