"""For each pass a model that it edits at several places, and an input; with much about it that could get lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normfuse
from normfuse.base import Pass
from normfuse.passes import PASSES
from normfuse.passes.quantize import Quantize
from normfuse.passes.recalibrate import Recalibrate
from normfuse.passes.swap_l1 import SwapL1
from normfuse.passes.swap_unified import SwapUnified
from tests.parity import randomize_norms
from tests.passes.residual_streams import Residual, X
from tests.statistics.networks import images, network

IMAGES = images(3)


class Calls(nn.Module):
    """One convolution that is called twice, each time with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(x)).tanh()))


def normed_twice() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4))


class Branches(nn.Module):
    """A sum of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def computed_weights() -> nn.Module:
    inner = parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*inner, parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))


def without_norms() -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Conv2d(4, 3, 1)))


def with_dead_channels() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[1].weight[:2], model[4].weight[1] = 0, 0  # pyright: ignore[reportOptionalSubscript]
    return model


def quantizing() -> nn.Module:
    return normfuse.quantize(network(), example_inputs=IMAGES)


def models() -> Iterator[tuple[str, Callable[[], Pass], Callable[[], nn.Module], Tensor]]:
    """Yield, for each pass, what makes it, a model that it edits at several places, and an input."""
    data: dict[str, Any] = {
        "quantize": lambda: Quantize([IMAGES]),
        "recalibrate": lambda: Recalibrate([IMAGES]),
        "swap-l1": lambda: SwapL1([X]),
        "swap-unified": lambda: SwapUnified([X]),
    }
    special: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "center-norm": (Residual, X),
        "duplicate-shared": (Calls, IMAGES),
        "equalize-ranges": (without_norms, IMAGES),
        "fold-affine": (normed_twice, X),
        "materialize": (computed_weights, IMAGES),
        "merge-branches": (lambda: nn.Sequential(Branches(), nn.Tanh(), Branches()), IMAGES),
        "prune-constant": (with_dead_channels, IMAGES),
        "shiftquant-off": (quantizing, IMAGES),
        "swap-l1": (Residual, X),
        "swap-unified": (Residual, X),
    }
    for name, cls in PASSES.items():
        yield name, data.get(name, cls), *special.get(name, (network, IMAGES))


CASES = {name: (one, model, x) for name, one, model, x in models()}


def prepared(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a model in which much could get lost: mixed modes and flags, hooks, modules and tensors outside tables."""
    torch.manual_seed(0)
    model = randomize_norms(build().double())
    vars(model).pop("train", None)
    nn.Module.train(model)
    first = next(model.children())
    first.eval()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    model.held = [first, {"again": [first]}]  # type: ignore[assignment]
    layers = [module for module in model.modules() if not list(module.children())]
    model.record = SimpleNamespace(layers=tuple(layers), last=layers[-1])  # type: ignore[assignment]
    model.history = {"losses": [0.5], "best": torch.ones(2)}  # type: ignore[assignment]
    return model
