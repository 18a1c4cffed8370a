"""The product with the norm in its weight: values, gradients, second gradients, and what is kept for backward."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.layers.products import Convolution, Matrix, Product
from normfuse.layers.scaled import ScaledProduct
from normfuse.layers.scratch import is_large
from tests.parity import EXACT, error

Run = Callable[[list[Any], Any], Tensor]
GAINS = [-1.5, 0.7, 1e-9, 2.0, -0.3, 1.0]
CONVOLUTIONS = {
    f"{'transposed ' * transposed}{dims}d groups {groups}": Convolution(
        (2,) * dims, (1,) * dims, (1,) * dims, groups, transposed, (1,) * dims if transposed else ()
    )
    for dims, groups, transposed in itertools.product((1, 2, 3), (1, 2), (False, True))
}
SIZES = {"scales the weight": 9, "scales the output": 2}


def make(product: Product, size: int, *, bias: bool = True, gains: list[float] | None = None) -> list[Any]:
    """Return ``x, weight, bias, gain, shift, mean, var, eps``, all but the last three trained."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if isinstance(product, Convolution):
        dims, groups = len(product.stride), product.groups
        x, weight = draw(2, 4, *[size] * dims), draw(6, 4 // groups, *[3] * dims)
        weight = draw(4, 6 // groups, *[3] * dims) if product.transposed else weight
    else:
        x, weight = draw(size, 3, 4), draw(6, 4)
    values = [x, weight, draw(6) if bias else None, torch.tensor(gains or GAINS, dtype=torch.float64), draw(6)]
    for value in values:
        if value is not None:
            value.requires_grad_()
    return [*values, draw(6), draw(6).abs() + 0.3, 0.1]


def by_eval(values: list[Any], product: Product) -> Tensor:
    """Return what eval mode computes: the product, then the norm."""
    x, weight, bias, gain, shift, mean, var, eps = values
    y = product.run(x, weight, bias)
    shape = (-1,) if isinstance(product, Matrix) else (-1, *[1] * (y.dim() - 2))
    gain, shift, mean, var = (t.view(shape) for t in (gain, shift, mean, var))
    return (y - mean) / torch.sqrt(var + eps) * gain + shift


def by_python(values: list[Any], product: Product) -> Tensor:
    return cast(Tensor, ScaledProduct.apply(*values, product))


def assert_equals_eval(values: list[Any], product: Product, run: Run = by_python) -> None:
    z, expected = run(values, product), by_eval(values, product)
    assert error(expected.detach(), z.detach()) <= EXACT
    trained = [t for t in values[:5] if t is not None]
    grad = torch.randn(z.shape, dtype=torch.float64)
    pairs = zip(torch.autograd.grad(expected, trained, grad), torch.autograd.grad(z, trained, grad), strict=True)
    for index, (one, two) in enumerate(pairs):
        assert error(one, two) <= EXACT, index


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution(name: str, bias: bool):
    for size in SIZES.values():
        assert_equals_eval(make(CONVOLUTIONS[name], size, bias=bias), CONVOLUTIONS[name])


@pytest.mark.parametrize("size", [3, 1])
def test_linear(size: int):
    assert_equals_eval(make(Matrix(), size), Matrix())


@pytest.mark.parametrize("gains", [None, [0.0, *GAINS[1:]], [1e-300, *GAINS[1:]], [0.0] * 6])
@pytest.mark.parametrize(("way", "size"), SIZES.items())
def test_where_the_scale_goes(way: str, size: int, gains: list[float] | None):
    """To the smaller of weight and output, but to the weight where a gradient would be divided by (almost) nothing."""
    product = CONVOLUTIONS["2d groups 1"]
    values = make(product, size, gains=gains)
    z = ScaledProduct.apply(*values, product)
    assert (z.numel() < values[1].numel()) == (way == "scales the output")
    assert z.grad_fn.on_output == (way == "scales the output" and gains is None)
    assert_equals_eval(values, product)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_output_size_is_right(name: str):
    product = CONVOLUTIONS[name]
    for size in (1, 2, 5, 6):
        x, weight, *_ = make(product, size)
        assert product.output_size(x.shape, weight.shape) == product.run(x, weight, None).numel()


@pytest.mark.parametrize("size", SIZES.values())
@pytest.mark.parametrize("product", [CONVOLUTIONS["1d groups 2"], CONVOLUTIONS["transposed 1d groups 2"], Matrix()])
def test_gradients_of_every_subset(product: Product, size: int):
    assert_subsets_equal_eval(product, size)


def assert_subsets_equal_eval(product: Product, size: int, run: Run = by_python) -> None:
    """What is not asked for is not computed, and the rest is unchanged."""
    full = make(product, size)
    y = by_eval(full, product)
    grad = torch.randn(y.shape, dtype=torch.float64)
    expected = torch.autograd.grad(y, full[:5], grad)
    for wanted in itertools.product((False, True), repeat=5):
        if not any(wanted):
            continue
        values = [t.detach().requires_grad_(w) for t, w in zip(full[:5], wanted, strict=True)] + full[5:]
        z = run(values, product)
        assert error(y.detach(), z.detach()) <= EXACT
        z.backward(grad)
        for value, one, w in zip(values, expected, wanted, strict=False):
            assert (value.grad is not None) == w
            assert not w or error(one, value.grad) <= EXACT


SMALL = (CONVOLUTIONS["1d groups 2"], CONVOLUTIONS["transposed 2d groups 1"], Matrix())


@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("product", SMALL)
def test_gradcheck(product: Product, size: int):
    gains = [-1.5, 0.7, 0.0, 2.0, -0.3, 1.0]
    values = make(product, size, gains=gains)
    assert torch.autograd.gradcheck(lambda *v: ScaledProduct.apply(*v, *values[5:], product), values[:5])
    assert torch.autograd.gradgradcheck(lambda *v: ScaledProduct.apply(*v, *values[5:], product), values[:5])


def test_second_gradient_of_a_product_applied_twice():
    """The input of the second call depends on the weight: that way must not be counted inside the second call."""
    product = Convolution((1,), (1,), (1,), 1)
    values = make(product, 4)
    x, weight, *rest = values
    weight = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    rest = [*(t[:4].detach().requires_grad_(t.requires_grad) for t in rest[:-1]), rest[-1]]

    def penalty(function: Any) -> tuple[Tensor, ...]:
        y = function([function([x, weight, *rest], product).tanh(), weight, *rest], product)
        trained = [x, weight, *rest[:3]]
        first = torch.autograd.grad(y.square().sum(), trained, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), trained)

    for one, two in zip(penalty(by_eval), penalty(lambda v, p: ScaledProduct.apply(*v, p)), strict=True):
        assert error(one.detach(), two.detach()) <= EXACT


# what is kept


def kept_tensors(call: Any) -> list[Tensor]:
    """Return the tensors that a call keeps for backward."""
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return tensors


def test_only_the_input_is_kept_beside_what_the_layers_hold():
    product = Convolution((1, 1), (1, 1), (1, 1), 1)
    values = make(product, 9)
    x, weight, bias, gain, shift, mean, var, eps = values
    own = {t.data_ptr() for t in (weight, bias, gain, shift, mean, var)}
    kept = kept_tensors(lambda: ScaledProduct.apply(*values, product))
    assert [t.data_ptr() for t in kept if t.data_ptr() not in own] == [x.data_ptr()]
    by_eval_mode = kept_tensors(
        lambda: F.batch_norm(F.conv2d(x, weight, bias, padding=1), mean, var, gain, shift, eps=eps)
    )
    assert 2 * 6 * 9 * 9 in [t.numel() for t in by_eval_mode], "eval mode keeps the output of the convolution as well"


def test_weights_in_shared_memory_do_not_mix():
    """Large scaled weights are made in one memory: other layers, sizes and threads in between change no gradient."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Conv2d(64, 128, 3),
        nn.ConvTranspose2d(128, 64, 3),
        nn.Conv2d(64, 64, 3),
    ]
    layers[3].to(memory_format=torch.channels_last)
    assert all(is_large(layer.weight) for layer in layers)
    products = [Convolution((1, 1), (p, p), (1, 1), 1, t) for p, t in ((1, False), (0, False), (0, True), (0, False))]

    def train(function: Any, x: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y, parameters = leaf, [leaf]
        for layer, product in zip(layers, products, strict=True):
            weight = layer.weight.detach().double().requires_grad_()
            channels = weight.shape[1 if product.transposed else 0]
            gain = torch.linspace(-1, 1, channels, dtype=torch.float64).requires_grad_()
            fixed = torch.linspace(0.5, 1.5, channels, dtype=torch.float64)
            y = function([y, weight, None, gain, fixed * 0, -fixed, fixed, 0.0], product).relu()
            parameters += [weight, gain]
        return list(torch.autograd.grad(y.sum(), parameters))

    batches = [torch.randn(1, 64, 8, 8, dtype=torch.float64) for _ in range(3)]
    found: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        found[index] = train(lambda values, product: ScaledProduct.apply(*values, product), batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, batch in enumerate(batches):
        for one, two in zip(train(by_eval, batch), found[index], strict=True):
            assert error(one, two) <= EXACT
