"""The compiled convolution in Tune mode: the same values and gradients as the Python form, and the same things kept."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normfuse
from normfuse.capture import unwrap
from normfuse.layers import scaled_convolution
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


@pytest.fixture
def operator(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[scaled_convolution.Operator]:
    """Turn the compiled operator on for one test."""
    monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(kernel_folder))
    monkeypatch.delenv("NORMFUSE_KERNELS", raising=False)
    scaled_convolution.kernels.forget()
    found = scaled_convolution.kernels.get()
    assert found is not None
    yield found
    scaled_convolution.kernels.forget()


def run(operator: scaled_convolution.Operator, values: list[Any], product: Convolution) -> Tensor:
    return operator(*values, product.stride, product.padding, product.dilation, product.groups)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_every_convolution(operator: scaled_convolution.Operator, name: str, bias: bool):
    for size in SIZES.values():
        assert_equals_eval(make(PLAIN[name], size, bias=bias), PLAIN[name], functools.partial(run, operator))


@pytest.mark.parametrize("gains", [None, [0.0, *GAINS[1:]], [1e-300, *GAINS[1:]], [0.0] * 6])
@pytest.mark.parametrize("size", SIZES.values())
def test_every_gain(operator: scaled_convolution.Operator, size: int, gains: list[float] | None):
    product = PLAIN["2d groups 1"]
    assert_equals_eval(make(product, size, gains=gains), product, functools.partial(run, operator))


@pytest.mark.parametrize("size", SIZES.values())
def test_gradients_of_every_subset(operator: scaled_convolution.Operator, size: int):
    assert_subsets_equal_eval(PLAIN["1d groups 2"], size, functools.partial(run, operator))


@pytest.mark.parametrize("missing", [(2,), (3,), (4,), (2, 3, 4)])
def test_without_bias_gain_or_shift(operator: scaled_convolution.Operator, missing: tuple[int, ...]):
    product = PLAIN["2d groups 2"]
    for size in SIZES.values():
        values = make(product, size)
        values = [None if i in missing else value for i, value in enumerate(values)]
        one, other = run(operator, values, product), ScaledProduct.apply(*values, product)
        assert error(other.detach(), one.detach()) <= EXACT  # type: ignore[attr-defined]
        trained = [t for t in values[:5] if t is not None]
        found = [torch.autograd.grad(z.square().sum(), trained) for z in (one, other)]  # type: ignore[attr-defined]
        assert all(error(a, b) <= EXACT for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("size", [3, 1])
def test_gradcheck(operator: scaled_convolution.Operator, size: int):
    product = PLAIN["1d groups 2"]
    values = make(product, size)

    def function(*tensors: Tensor) -> Tensor:
        return run(operator, [*tensors, *values[5:]], product)

    assert torch.autograd.gradcheck(function, values[:5])
    assert torch.autograd.gradgradcheck(function, values[:5])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_weights(operator: scaled_convolution.Operator, dtype: torch.dtype, threads: int):
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
            one, other = run(operator, [*values, *fixed], product), by_eval([*values, *fixed], product)
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


def test_tune_mode_runs_it(operator: scaled_convolution.Operator, monkeypatch: pytest.MonkeyPatch):
    model = normfuse.tune_mode(net())
    x = torch.randn(2, 3, 9, 9).double()
    assert any("ScaledConvolution" in name for name in kinds(model(x)))
    monkeypatch.setenv("NORMFUSE_KERNELS", "0")
    scaled_convolution.kernels.forget()
    assert any("ScaledProduct" in name for name in kinds(model(x)))
    assert not any("ScaledConvolution" in name for name in kinds(model(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_take_the_python_form(operator: scaled_convolution.Operator, dtype: torch.dtype):
    model = normfuse.tune_mode(net().float())
    with torch.autocast("cpu", dtype):
        names = kinds(model(torch.randn(2, 3, 9, 9)))
    assert not any("ScaledConvolution" in name for name in names)
    names = kinds(model.to(dtype)(torch.randn(2, 3, 9, 9, dtype=dtype)))
    assert not any("ScaledConvolution" in name for name in names)


def test_frozen_and_without_gradients(operator: scaled_convolution.Operator):
    model = normfuse.tune_mode(net())
    x = torch.randn(2, 3, 9, 9).double()
    expected = model(x).detach()
    with torch.no_grad():
        assert error(expected, model(x)) <= EXACT
    with torch.inference_mode():
        assert error(expected, model(x)) <= EXACT


@pytest.mark.parametrize("reentrant", [True, False])
def test_first_use_inside_a_checkpoint(operator: scaled_convolution.Operator, reentrant: bool):
    """The trial that a library must pass leaves no trace in what the checkpoint keeps."""
    model, plain = normfuse.tune_mode(net()), net()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 9, 9).double().requires_grad_()
    scaled_convolution.kernels.forget()
    z = checkpoint(model, x, use_reentrant=reentrant)
    z.square().sum().backward()  # type: ignore[union-attr]
    plain(x.detach()).square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert error(other.grad, one.grad) <= EXACT  # type: ignore[arg-type]


def test_first_use_under_autocast(operator: scaled_convolution.Operator):
    scaled_convolution.kernels.forget()
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_convolution.kernels.get() is not None


def test_only_the_input_is_kept(operator: scaled_convolution.Operator):
    kept: list[Tensor] = []
    model = normfuse.tune_mode(net()[3:])
    x = torch.randn(2, 8, 9, 9).double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(x)
    held = {t.data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    assert kept
    assert {t.data_ptr() for t in kept} <= held


def test_changed_weights_are_refused_in_backward(operator: scaled_convolution.Operator):
    model = normfuse.tune_mode(net())
    z = model(torch.randn(2, 3, 9, 9).double())
    with torch.no_grad():
        model[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_the_operator_names_what_it_does_not_take(operator: scaled_convolution.Operator):
    product = PLAIN["2d groups 1"]
    values = make(product, 9)
    with pytest.raises(RuntimeError, match="like the weight"):
        run(operator, [values[0].float(), *values[1:]], product)
    with pytest.raises(RuntimeError, match="expected"):
        run(operator, [*values[:5], values[5][:3], *values[6:]], product)
    with pytest.raises(RuntimeError, match="rows"):
        run(operator, [values[0], values[1].transpose(0, 1).contiguous().transpose(0, 1), *values[2:]], product)


@pytest.mark.parametrize("name", sorted(ZOO.keys() - NOT_DIFFERENTIABLE - COMPILED - NOT_FINITE))
def test_zoo(operator: scaled_convolution.Operator, name: str):
    """Whole networks in Tune mode: the outputs, and the gradients of everything, are those of eval mode."""
    trap = ZOO[name]
    expected = gradients(set_mode(unwrap(trap.build()), True), trap.inputs())
    model = normfuse.tune_mode(trap.build(), example_inputs=trap.inputs())
    dtypes = {tensor.dtype for tensor in expected.values() if tensor is not None}
    assert_same(expected, gradients(unwrap(model).train(), trap.inputs()), EXACT if dtypes <= {torch.float64} else 1e-2)


def test_an_operator_with_wrong_values_or_gradients_is_not_used(operator: scaled_convolution.Operator):
    def wrong(factor: float, x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, *others: Any) -> Tensor:
        z = operator(x, weight, bias, gain, *others)
        return z + (factor * gain - (factor * gain).detach()).sum()  # the same value, another gradient

    assert scaled_convolution._is_right(operator)
    assert scaled_convolution._is_right(functools.partial(wrong, 0.0))
    assert not scaled_convolution._is_right(functools.partial(wrong, 1e-3))
    assert not scaled_convolution._is_right(lambda *given: operator(*given) * 1.001)


def test_a_damaged_library_is_not_used(tmp_path: Path):
    tmp_path.chmod(0o700)
    path = tmp_path / "damaged.so"
    code = "from normfuse.layers.scaled_convolution import kernels; from pathlib import Path; import sys;"
    code += "print(kernels.load(Path(sys.argv[1])))"
    path.write_bytes(b"not a library")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
