"""What a layer takes is read from its call: every product, called in every way, on parameters from everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse import api
from normfuse.base import Reason
from normfuse.report import Status
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
ATEN = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A product with a weight: its function, the shape of the weight, its input, and the layer that does the same."""

    function: Callable[..., Tensor]
    weight: tuple[int, ...]
    inputs: Tensor
    layer: Callable[[bool], nn.Module]
    norm: Callable[[], nn.Module]


def convolution(n: int, kind: str = "Conv") -> Product:
    function = getattr(F, f"{'conv' if kind == 'Conv' else 'conv_transpose'}{n}d")
    layer = getattr(nn, f"{kind}{n}d")
    norm = getattr(nn, f"BatchNorm{n}d")
    return Product(function, (4, 4, *[3] * n), image(2, 4, *[5] * n), lambda b: layer(4, 4, 3, bias=b), lambda: norm(4))


PRODUCTS = {
    "conv1d": convolution(1),
    "conv2d": convolution(2),
    "conv3d": convolution(3),
    "conv_transpose2d": convolution(2, "ConvTranspose"),
    "linear": Product(F.linear, (4, 4), image(3, 4), lambda b: nn.Linear(4, 4, bias=b), lambda: nn.BatchNorm1d(4)),
}
CALLS: dict[str, Callable[..., Tensor]] = {
    "with a bias": lambda f, x, w, b: f(x, w, b),
    "bias by keyword": lambda f, x, w, b: f(input=x, weight=w, bias=b),
    "without": lambda f, x, w, b: f(x, w),
    "literal None": lambda f, x, w, b: f(x, w, None),
    "None by keyword": lambda f, x, w, b: f(x, weight=w, bias=None),
    "through data": lambda f, x, w, b: f(x, w.data, b.detach() if b is not None else None),
    "aten": lambda f, x, w, b: getattr(ATEN, f.__name__)(x, w, b),
}
ADDS_NONE = ("without", "literal None", "None by keyword")


class OnLayer(nn.Module):
    """A function call on the parameters of a layer, which has a bias or lacks it."""

    def __init__(self, product: Product, call: Callable[..., Tensor], bias: bool) -> None:
        super().__init__()
        self.layer, self.norm = product.layer(bias), product.norm()
        self.product, self.call = product, call

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.call(self.product.function, x, self.layer.weight, self.layer.bias))


class OnRoot(nn.Module):
    """The same on parameters of the model itself."""

    def __init__(self, product: Product, call: Callable[..., Tensor], bias: bool) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(product.weight)), product.norm()
        self.register_parameter("bias", nn.Parameter(torch.randn(4)) if bias else None)
        self.product, self.call = product, call

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.call(self.product.function, x, self.weight, self.bias))


class OnTwo(nn.Module):
    """The weight of one module, the bias of another."""

    def __init__(self, product: Product, call: Callable[..., Tensor], bias: bool) -> None:
        super().__init__()
        self.layer, self.other, self.norm = product.layer(not bias), product.layer(bias), product.norm()
        self.product, self.call = product, call

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.call(self.product.function, x, self.layer.weight, self.other.bias))


class OwnForward(nn.Module):
    """A subclass of the layer with a forward of its own, which holds its norm."""

    def __init__(self, product: Product, call: Callable[..., Tensor], bias: bool) -> None:
        super().__init__()
        base: Any = type(product.layer(bias))

        class Holds(base):
            def forward(self, input: Tensor) -> Tensor:
                return self.norm(call(product.function, input, self.weight, self.bias))

        self.block = product.layer(bias)
        self.block.__class__ = Holds
        self.block.norm = product.norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


HOLDERS = {"layer": OnLayer, "root": OnRoot, "two": OnTwo, "own forward": OwnForward}


def model_of(product: str, call: str, holder: str, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(HOLDERS[holder](PRODUCTS[product], CALLS[call], bias).double().eval())


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "traced"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_call_takes_what_it_adds(product: str, call: str, holder: str, bias: bool, recorded: bool):
    """Folded where the call adds a bias or would add the one that is missing beside its weight; else the call is named.

    A bias that is missing in another module than the weight's, or one that no call would add, is no place for a shift.
    """
    model, inputs = model_of(product, call, holder, bias), PRODUCTS[product].inputs
    result = api.apply(model, api.EXACT_PASSES, example_inputs=inputs if recorded else None)
    (norm,) = result.report.norms
    if product == "linear" and not recorded:
        expected: Reason | None = Reason.RANK_UNKNOWN  # a BatchNorm1d behind it may be called on (N, C, L)
    else:
        expected = None if call not in ADDS_NONE and (bias or holder != "two") else Reason.NO_BIAS
    assert (norm.refusal.reason if norm.refusal else None) is expected
    if norm.refusal is not None and expected is Reason.NO_BIAS:
        assert "adds no bias to what it makes of" in norm.refusal.detail
    assert_parity(model, result.model, inputs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("call", ["with a bias", "without", "literal None"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_call_in_an_exported_program(product: str, call: str, holder: str, bias: bool):
    """A layer that is all that its module held takes its norm; a bias that the call leaves out is not one of it."""
    model, inputs = model_of(product, call, holder, bias), PRODUCTS[product].inputs
    program = torch.export.export(model, (inputs,))
    result = api.apply(program, api.EXACT_PASSES, example_inputs=inputs)  # type: ignore[type-var]
    (norm,) = result.report.norms
    if holder == "layer":
        assert (norm.status is Status.APPLIED) is not (bias and call in ADDS_NONE)
    assert_parity(model, result.model, inputs)
