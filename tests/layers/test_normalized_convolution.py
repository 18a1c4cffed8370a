"""The compiled convolutions of Tune mode: values and gradients are those of the Python form, and what is kept."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import normfuse
from normfuse.capture import unwrap
from normfuse.layers import normalized_convolution
from normfuse.layers.normalized_convolution import Maker
from normfuse.layers.products import Convolution
from normfuse.layers.scaled import ScaledProduct
from tests.gradients import assert_same, gradients, set_mode
from tests.layers.test_scaled import (
    CONVOLUTIONS,
    GAINS,
    SIZES,
    assert_equals_eval,
    assert_subsets_equal_eval,
    by_eval,
    make,
)
from tests.parity import EXACT, error
from tests.passes.test_tune_mode import COMPILED, NOT_DIFFERENTIABLE, NOT_FINITE
from tests.zoo import ZOO

PLAIN = {name: product for name, product in CONVOLUTIONS.items() if not product.transposed}


def run(kernels: Maker, values: list[Any], product: Convolution) -> Tensor:
    pair = kernels(product.stride, product.padding, product.dilation, product.groups)
    return pair.normalized(*values, True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_every_convolution(kernels: Maker, name: str, bias: bool):
    for size in SIZES.values():
        assert_equals_eval(make(PLAIN[name], size, bias=bias), PLAIN[name], functools.partial(run, kernels))


@pytest.mark.parametrize("gains", [None, [0.0, *GAINS[1:]], [1e-300, *GAINS[1:]], [0.0] * 6])
@pytest.mark.parametrize("size", SIZES.values())
def test_every_gain(kernels: Maker, size: int, gains: list[float] | None):
    product = PLAIN["2d groups 1"]
    assert_equals_eval(make(product, size, gains=gains), product, functools.partial(run, kernels))


@pytest.mark.parametrize("size", SIZES.values())
def test_gradients_of_every_subset(kernels: Maker, size: int):
    assert_subsets_equal_eval(PLAIN["1d groups 2"], size, functools.partial(run, kernels))


@pytest.mark.parametrize("missing", [(2,), (3,), (4,), (2, 3, 4)])
def test_without_bias_gain_or_shift(kernels: Maker, missing: tuple[int, ...]):
    product = PLAIN["2d groups 2"]
    for size in SIZES.values():
        values = make(product, size)
        values = [None if i in missing else value for i, value in enumerate(values)]
        one, other = run(kernels, values, product), ScaledProduct.apply(*values, product)
        assert error(other.detach(), one.detach()) <= EXACT  # type: ignore[attr-defined]
        trained = [t for t in values[:5] if t is not None]
        found = [torch.autograd.grad(z.square().sum(), trained) for z in (one, other)]  # type: ignore[attr-defined]
        assert all(error(a, b) <= EXACT for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("size", [3, 1])
def test_gradcheck(kernels: Maker, size: int):
    product = PLAIN["1d groups 2"]
    values = make(product, size)

    def function(*tensors: Tensor) -> Tensor:
        return run(kernels, [*tensors, *values[5:]], product)

    assert torch.autograd.gradcheck(function, values[:5])
    assert torch.autograd.gradgradcheck(function, values[:5])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_weights(kernels: Maker, dtype: torch.dtype, threads: int):
    """Over scratch memory, by several threads, scaling the weight and scaling the output, in both memory formats."""
    product = Convolution((1, 1), (1, 1), (1, 1), 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size, layout in itertools.product((2, 24), (torch.contiguous_format, torch.channels_last)):
            shapes = ((2, 96, size, size), (131, 96, 3, 3), (131,), (131,), (131,))
            values = [torch.randn(*shape).to(dtype) for shape in shapes]
            values[:2] = [value.to(memory_format=layout) for value in values[:2]]
            values = [value.requires_grad_() for value in values]
            fixed = [torch.randn(131).to(dtype), torch.rand(131).to(dtype) + 0.5, 1e-3]
            one, other = run(kernels, [*values, *fixed], product), by_eval([*values, *fixed], product)
            grad = torch.randn_like(one)
            found = [torch.autograd.grad(z, values, grad) for z in (one, other)]
            limit = EXACT if dtype == torch.float64 else 1e-4
            assert all(error(b, a) <= limit for a, b in zip(*found, strict=True))
            assert found[0][1].stride() == values[1].stride()
    finally:
        torch.set_num_threads(before)


def net() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64)]
    model = nn.Sequential(*layers).double()
    for norm in (model[1], model[4]):
        for value in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(value)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


def kinds(z: Tensor) -> set[str]:
    """Return the names of the operations that made a value."""
    found, waiting = set(), [z.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {node.name() for node in found}


def test_tune_mode_runs_it(kernels: Maker, monkeypatch: pytest.MonkeyPatch):
    model = normfuse.tune_mode(net())
    x = torch.randn(2, 3, 9, 9).double()
    assert any("ScaledConvolution" in name for name in kinds(model(x)))
    monkeypatch.setenv("NORMFUSE_KERNELS", "0")
    normalized_convolution.kernels.forget()
    assert any("ScaledProduct" in name for name in kinds(model(x)))
    assert not any("ScaledConvolution" in name for name in kinds(model(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_take_the_python_form(kernels: Maker, dtype: torch.dtype):
    model = normfuse.tune_mode(net().float())
    with torch.autocast("cpu", dtype):
        names = kinds(model(torch.randn(2, 3, 9, 9)))
    assert not any("ScaledConvolution" in name for name in names)
    names = kinds(model.to(dtype)(torch.randn(2, 3, 9, 9, dtype=dtype)))
    assert not any("ScaledConvolution" in name for name in names)


def test_frozen_and_without_gradients(kernels: Maker):
    model = normfuse.tune_mode(net())
    x = torch.randn(2, 3, 9, 9).double()
    expected = model(x).detach()
    with torch.no_grad():
        assert error(expected, model(x)) <= EXACT
    with torch.inference_mode():
        assert error(expected, model(x)) <= EXACT


@pytest.mark.parametrize("reentrant", [True, False])
def test_first_use_inside_a_checkpoint(kernels: Maker, reentrant: bool):
    """The trial that a library must pass leaves no trace in what the checkpoint keeps."""
    model, plain = normfuse.tune_mode(net()), net()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 9, 9).double().requires_grad_()
    normalized_convolution.kernels.forget()
    z = checkpoint(model, x, use_reentrant=reentrant)
    z.square().sum().backward()  # type: ignore[union-attr]
    plain(x.detach()).square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert error(other.grad, one.grad) <= EXACT  # type: ignore[arg-type]


def test_first_use_under_autocast(kernels: Maker):
    normalized_convolution.kernels.forget()
    with torch.autocast("cpu", torch.bfloat16):
        assert normalized_convolution.kernels.get() is not None


def test_only_the_input_is_kept(kernels: Maker):
    kept: list[Tensor] = []
    model = normfuse.tune_mode(net()[3:])
    x = torch.randn(2, 8, 9, 9).double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(x)
    held = {t.data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    assert kept
    assert {t.data_ptr() for t in kept} <= held


def test_changed_weights_are_refused_in_backward(kernels: Maker):
    model = normfuse.tune_mode(net())
    z = model(torch.randn(2, 3, 9, 9).double())
    with torch.no_grad():
        model[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_other_tensors_are_left_to_the_python_form(kernels: Maker):
    product = PLAIN["2d groups 1"]
    values = make(product, 9)

    def refused(values: list[Any]) -> bool:
        return run(kernels, values, product) is None

    assert not refused(values)
    assert refused([values[0].float(), *values[1:]])
    assert refused([t.to(torch.bfloat16) for t in values[:7]] + values[7:])
    assert refused([t.to("meta") for t in values[:7]] + values[7:])
    assert refused([*values[:5], values[5][:3], *values[6:]])
    assert refused([values[0][0], *values[1:]])
    assert refused([values[0], values[1].transpose(0, 1).contiguous().transpose(0, 1), *values[2:]])


def test_a_stride_of_zero_is_an_error(kernels: Maker):
    with pytest.raises(RuntimeError, match="non-positive stride"):
        kernels((1, 0), (0, 0), (1, 1), 1)


class _Seeing(TorchDispatchMode):
    """Sees every operation, and does it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # which torch calls for forward-mode differentiation
def test_those_who_have_to_see_each_operation_see_the_python_form(kernels: Maker):
    product = PLAIN["2d groups 1"]
    values = make(product, 9)
    with _Seeing():
        assert run(kernels, values, product) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert run(kernels, values, product) is None
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(values[0], torch.ones_like(values[0]))
        assert run(kernels, [dual, *values[1:]], product) is None
        assert run(kernels, values, product) is not None
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(run(kernels, [x, *values[1:]], product) is None)
        return x.sum()

    torch.func.grad(function)(values[0].detach())
    assert seen == [True]


def test_only_gains_trained(kernels: Maker):
    """The norm works after the convolution then, as in eval mode."""
    model = normfuse.tune_mode(net())
    normfuse.parameter_groups(model, "norm")
    assert any("BatchNorm" in name for name in kinds(model(torch.randn(2, 3, 9, 9).double())))


def test_only_vectors_are_kept_and_not_where_they_must_not_be(kernels: Maker):
    product = PLAIN["2d groups 1"]
    for size in (17, 9, 2):  # where the weight is scaled, and the output
        values = [t.detach() for t in make(product, size)[:7]] + [0.1]
        pair = kernels(product.stride, product.padding, product.dilation, product.groups)
        pair.normalized(*values, False)
        assert pair.held() == []
        pair.normalized(*values, True)
        assert [t.shape for t in pair.held()] == [(6,), (6,)]
        with torch.inference_mode():
            made = [t + 0 for t in values[:7]] + [0.1]
            assert error(by_eval(made, product), pair.normalized(*made, True)) <= EXACT
            assert not any(t.is_inference() for t in pair.held())


def test_several_threads(kernels: Maker):
    model = normfuse.tune_mode(net()).requires_grad_(False)
    inputs = [torch.randn(2, 3, size, size).double() for size in (9, 5, 9, 5)]
    expected = [model(x) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(model, inputs * 50))
    assert all(error(one, other) <= EXACT for one, other in zip(expected * 50, found, strict=True))


@pytest.mark.parametrize("name", sorted(ZOO.keys() - NOT_DIFFERENTIABLE - COMPILED - NOT_FINITE))
def test_zoo(kernels: Maker, name: str):
    """Whole networks in Tune mode: the outputs, and the gradients of everything, are those of eval mode."""
    trap = ZOO[name]
    expected = gradients(set_mode(unwrap(trap.build()), True), trap.inputs())
    model = normfuse.tune_mode(trap.build(), example_inputs=trap.inputs())
    dtypes = {tensor.dtype for tensor in expected.values() if tensor is not None}
    assert_same(expected, gradients(unwrap(model).train(), trap.inputs()), EXACT if dtypes <= {torch.float64} else 1e-2)


def test_kernels_with_wrong_values_or_gradients_are_not_used(kernels: Maker):
    def wrong(change: Callable[[Tensor, list[Any]], Tensor]) -> Maker:
        def made(*geometry: Any) -> Any:
            pair = kernels(*geometry)
            return types.SimpleNamespace(normalized=lambda *given: change(pair.normalized(*given), list(given)))

        return made

    def with_gradient(factor: float) -> Maker:  # the same value, another gradient
        return wrong(lambda z, given: z + (factor * (given[3] - given[3].detach())).sum())

    assert normalized_convolution._are_right(kernels)
    assert normalized_convolution._are_right(with_gradient(0.0))
    assert not normalized_convolution._are_right(with_gradient(1e-3))
    assert not normalized_convolution._are_right(wrong(lambda z, _: z * 1.001))
    assert not normalized_convolution._are_right(wrong(lambda _z, _given: None))  # type: ignore[arg-type,return-value]


def test_a_damaged_library_is_not_used(tmp_path: Path):
    tmp_path.chmod(0o700)
    path = tmp_path / "damaged.so"
    code = "from normfuse.layers.normalized_convolution import kernels; from pathlib import Path; import sys;"
    code += "print(kernels.load(Path(sys.argv[1])))"
    path.write_bytes(b"not a library")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
