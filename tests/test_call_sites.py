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


MATRICES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w),
    "addmm by keyword": lambda m, x: torch.addmm(input=m.b, mat1=x, mat2=m.w),
    "method": lambda m, x: m.b.addmm(x, m.w),
    "matmul and add": lambda m, x: x @ m.w + m.b,
    "mm and add": lambda m, x: torch.mm(x, m.w).add(m.b),
    "transposed": lambda m, x: torch.addmm(m.b, x, m.v.T),
    "transposed by method": lambda m, x: x.matmul(m.v.transpose(0, 1)) + m.b,
    "permuted": lambda m, x: F.linear(x, m.w.permute(1, 0), m.b),
    "t": lambda m, x: F.linear(x, m.w.t(), bias=m.b),
    "embedding": lambda m, x: F.embedding((x > 0).long().sum(1), m.w),
    "embedding of torch": lambda m, x: torch.embedding(m.w, (x > 0).long().sum(1)),
    "matmul alone": lambda m, x: x @ m.w,
    "scaled": lambda m, x: torch.addmm(m.b, x, m.w, beta=2),
    "weight on the left": lambda m, x: (m.v @ x.T).T,
}
WITHOUT_PLACE = ("matmul alone", "scaled", "weight on the left")


class OnMatrix(nn.Module):
    """A product with a matrix, between two norms."""

    def __init__(self, product: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.v, self.b = (nn.Parameter(torch.randn(*size)) for size in ((6, 4), (4, 6), (4,)))
        self.norm, self.product = nn.BatchNorm1d(4), product

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.product(self, x))


@pytest.mark.parametrize("form", ["recorded", "traced", "exported"])
@pytest.mark.parametrize("product", MATRICES)
def test_every_product_with_a_matrix(product: str, form: str):
    torch.manual_seed(0)
    inputs = image(3, 6)
    model = randomize_norms(OnMatrix(MATRICES[product]).double().eval())
    source: Any = torch.export.export(model, (inputs,)) if form == "exported" else model
    result = api.apply(source, api.EXACT_PASSES, example_inputs=inputs if form != "traced" else None)
    (norm,) = result.report.norms
    if form != "traced":
        assert (norm.status is Status.APPLIED) is (product not in WITHOUT_PLACE)
    assert_parity(model, result.model, inputs)


class TwoCalls(nn.Module):
    """One weight in two calls, a norm behind each or behind their sum."""

    def __init__(self, first: Callable[..., Tensor], second: Callable[..., Tensor], shared: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.other = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.calls, self.shared = (first, second), shared

    def forward(self, x: Tensor) -> Tensor:
        first, second = (call(self.layer, x) for call in self.calls)
        return self.norm(first) * (self.norm if self.shared else self.other)(second.tanh())


TWICE: dict[str, Callable[..., Tensor]] = {
    "module": lambda layer, x: layer(x),
    "bias": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "no bias": lambda layer, x: F.linear(x, layer.weight),
    "transposed": lambda layer, x: x @ layer.weight.T,
}


@pytest.mark.parametrize("duplicate", [True, False], ids=["duplicated", ""])
@pytest.mark.parametrize("shared", [True, False], ids=["one norm", "two norms"])
@pytest.mark.parametrize("second", TWICE)
@pytest.mark.parametrize("first", TWICE)
def test_one_weight_in_two_calls(first: str, second: str, shared: bool, duplicate: bool):
    model = randomize_norms(TwoCalls(TWICE[first], TWICE[second], shared).double().eval())
    folded = api.fold(model, example_inputs=image(3, 4), duplicate_shared=duplicate)
    assert_parity(model, folded, image(3, 4))
