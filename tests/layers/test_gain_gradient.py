"""The gain's gradient is as precise as eval mode's, however large the mean of the values is beside their deviation."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.layers import gain_gradient, scaled
from normfuse.layers.fixed_statistics import Statistics
from normfuse.layers.kept import Kept, kept_distance
from tests.gradients import apply_norm
from tests.layers.test_scaled import kept_tensors
from tests.parity import error

TIMES = 3  # eval mode's own error
OFFSETS = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # of the inputs, in deviations


class Rows(nn.Module):
    """A norm over the channels of ``(*, C)``."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, y: Tensor) -> Tensor:
        return self.norm(y.flatten(0, -2)).view(y.shape)


MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv2d(16, 24, 3, padding=1, bias=False), (8, 16, 8, 8)),
    "stem with a bias": (lambda: nn.Conv2d(3, 16, 5, stride=2), (8, 3, 12, 12)),
    "grouped": (lambda: nn.Conv2d(16, 24, 3, groups=4), (8, 16, 10, 10)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16, bias=False), (8, 16, 8, 8)),
    "scales the output": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (4, 64, 4, 4)),
    "1d": (lambda: nn.Conv1d(16, 24, 3, bias=False), (8, 16, 40)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 24, 2, stride=2), (4, 16, 5, 5)),
    "linear": (lambda: nn.Linear(32, 24, bias=False), (256, 32)),
    "linear over rows": (lambda: nn.Linear(32, 24), (8, 32, 32)),
}


def pair(name: str, offset: float, *, cancelling: bool = False) -> tuple[nn.Sequential, Tensor]:
    """Return a layer and a norm with the statistics of its outputs, and its input; in float64, with values of float32.

    With ``cancelling`` the sum of every filter is 0.
    """
    make, shape = MAKERS[name]
    layer = make().double()
    if cancelling:
        axes = (0, 2, 3) if name == "transposed" else tuple(range(1, layer.weight.dim()))  # type: ignore[operator]
        layer.weight.data.sub_(layer.weight.mean(axes, keepdim=True))  # type: ignore[union-attr,operator,arg-type]
        layer.float().double()
    channels = getattr(layer, "out_channels", None) or layer.out_features
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    norm = kind(channels).double()
    model = nn.Sequential(layer, Rows(norm) if isinstance(layer, nn.Linear) else norm).float().double()
    x = (offset + torch.randn(shape)).double()
    with torch.no_grad():
        y = layer(x)
        rows = y.flatten(0, -2) if isinstance(layer, nn.Linear) else y.transpose(0, 1).flatten(1).t()
        norm.running_mean.copy_(rows.mean(0))  # type: ignore[union-attr]
        norm.running_var.copy_(rows.var(0))  # type: ignore[union-attr]
        norm.weight.uniform_(0.5, 1.5)
    return model.float().double().eval(), x


class ByProduct(nn.Sequential):
    """A pair in Tune mode, whose product returns the normalized value."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


def tuned(model: nn.Sequential) -> nn.Sequential:
    """Return a pair in Tune mode, also where the norm is over the rows of a linear layer."""
    made = ByProduct(*copy.deepcopy(model))
    apply_norm(made[0], norm_of(made))
    return made


def norm_of(model: nn.Sequential) -> nn.Module:
    return model[1].norm if isinstance(model[1], Rows) else model[1]  # type: ignore[return-value]


def coherent(z: Tensor) -> Tensor:
    """Return gradients of the outputs as an average over all positions behind a ReLU gives them."""
    generator = torch.Generator().manual_seed(1)
    first = z.shape[:2] if z.dim() > 2 else z.shape
    mask = torch.rand(z.shape, generator=generator, dtype=torch.float64) > 0.4
    signs = torch.randn(first, generator=generator, dtype=torch.float64) + 0.5
    return (signs.view(*first, *[1] * (z.dim() - len(first))) * mask).to(z.dtype)


def gain_of(model: nn.Sequential) -> nn.Parameter:
    return norm_of(model).weight  # type: ignore[return-value]


def off(model: nn.Sequential, x: Tensor, exact: Tensor, grad: Tensor, context: Any) -> float:
    """Return how far the gain's gradient is from the exact one, relative to that."""
    with context:
        z = model(x)
    (found,) = torch.autograd.grad(z, gain_of(model), grad.to(z.dtype))
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("trained", ["all", "gain"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_at_every_offset(name: str, autocast: bool, trained: str, form: str):
    for offset in OFFSETS:
        model, x = pair(name, offset)
        z = model(x)
        grad = coherent(z)
        (exact,) = torch.autograd.grad(z, gain_of(model), grad)
        single = copy.deepcopy(model).float()
        single[0].requires_grad_(trained == "all")
        errors = [
            off(m, x.float(), exact, grad, torch.autocast("cpu", torch.bfloat16, enabled=autocast))
            for m in (single, tuned(single))
        ]
        assert errors[1] <= TIMES * errors[0], (offset, errors)


@pytest.mark.parametrize("name", ["convolution", "transposed", "linear"])
def test_filters_that_cancel_themselves(name: str, form: str):
    """Their outputs have no mean, but what they sum has."""
    for offset in OFFSETS[1:]:
        model, x = pair(name, offset, cancelling=True)
        z = model(x)
        grad = coherent(z)
        (exact,) = torch.autograd.grad(z, gain_of(model), grad)
        single = model.float()
        errors = [off(m, x.float(), exact, grad, contextlib.nullcontext()) for m in (single, tuned(single))]
        assert errors[1] <= TIMES * errors[0], (offset, errors)


@pytest.mark.parametrize("name", ["convolution", "depthwise", "scales the output", "transposed", "linear over rows"])
def test_second_derivatives(name: str, form: str):
    """A backward pass with a graph takes it from the output as well, and so do the gradients of that."""
    for offset in (0.0, 10.0, 1e3):
        model, x = pair(name, offset)
        results = []
        for one in (model, copy.deepcopy(model).float(), tuned(copy.deepcopy(model).float())):
            z = one(x.to(one[0].weight.dtype))
            first = torch.autograd.grad((z * coherent(z)).sum(), gain_of(one), create_graph=True)[0]
            second = torch.autograd.grad(first.square().sum(), one[0].weight)[0]
            results.append([first.detach().double(), second.double()])
        for exact, in_eval, found in zip(*results, strict=True):
            assert error(exact, found) <= TIMES * error(exact, in_eval) + 1e-6, offset


# which way is taken


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every gradient that is taken from the output adds a line."""
    taken: list[str] = []

    def run(*args: Any) -> Tensor:
        taken.append("from output")
        return gain_gradient.gain_gradient_from_output(*args)

    monkeypatch.setattr(scaled, "gain_gradient_from_output", run)
    return taken


def test_ordinary_values_take_the_cheap_way(monkeypatch: pytest.MonkeyPatch):
    taken = spied(monkeypatch)
    for name, offset in itertools.product(("grouped", "depthwise", "linear"), (0.5, 1000.0)):
        taken.clear()
        model, x = pair(name, offset)
        z = tuned(model)(x)
        z.backward(torch.randn_like(z))
        assert len(taken) == (offset == 1000.0)


def test_nothing_more_is_kept_for_backward():
    model, x = pair("convolution", 1000.0)
    one = tuned(model)
    own = {t.data_ptr() for t in (x, *model.state_dict().values(), *one.state_dict().values())}
    assert {t.data_ptr() for t in kept_tensors(lambda: one(x))} <= own


def test_on_other_devices_the_statistics_decide():
    """Looked at when they change, not at every step; the bias is what it was at that time."""
    mean, var, bias = torch.tensor([1.0, -9.0]), torch.tensor([1.0, 4.0]), torch.tensor([0.0, 1.0])
    kept = Kept()
    assert kept_distance(kept, mean, var, 0.0, bias) == pytest.approx(5.0)
    first = kept.entry
    bias.add_(0.1)
    assert kept_distance(kept, mean, var, 0.0, bias) == pytest.approx(5.0)
    assert kept.entry is first
    mean.mul_(2)
    assert kept_distance(kept, mean, var, 0.0, bias) == pytest.approx(9.55)
    assert kept_distance(kept, mean, var, 0.0, None) == pytest.approx(9.0)
    statistics = Statistics(torch.ones(2), None, mean, var, 0.0)
    assert statistics.distance(None) == pytest.approx(9.0), "also where nothing is kept"
    with torch.inference_mode():
        made = mean + 0
        assert kept_distance(kept, made, var, 0.0, None) == pytest.approx(9.0)
