"""What UnifiedNorm and PowerNorm share: layout, padding, precision, state, inference form."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.layers.running_norms import DOUBLE, Make, assert_same_state, both, power, state, step, train
from tests.parity import EXACT, error


@both
@pytest.mark.parametrize("shape", [(5,), (4, 2), (2, 3, 2), (1, 2, 1, 5)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_channel_axis(make: Make, shape: tuple[int, ...], dim: int) -> None:
    """The channels on any axis are the channels on the last one, permuted."""
    if not -len(shape) - 1 <= dim <= len(shape):
        pytest.skip("no such axis")
    last, other = make(**DOUBLE), make(dim=dim, **DOUBLE)
    for _ in range(8):
        x, grad = torch.randn(2, *shape, 3, dtype=torch.float64)
        expected = step(last, x, grad)
        found = step(other, x.movedim(-1, dim), grad.movedim(-1, dim))
        for a, b in zip(expected, found, strict=True):
            assert error(a.movedim(-1, dim), b) <= EXACT
    assert_same_state(last, other)


@both
def test_one_vector_is_one_token(make: Make) -> None:
    one, several = make(**DOUBLE), make(**DOUBLE)
    for _ in range(6):
        x, grad = torch.randn(2, 3, dtype=torch.float64)
        for a, b in zip(step(one, x, grad), step(several, x[None], grad[None]), strict=True):
            assert error(b[0], a) <= EXACT
    assert_same_state(several, one)


@both
@pytest.mark.parametrize("dim", [1, -1])
def test_padding_is_as_if_it_were_not_there(make: Make, dim: int) -> None:
    """Statistics and gradients are those of the other tokens, whatever stands at the padding and is sent back to it."""
    masked, plain = make(dim=dim, **DOUBLE), make(**DOUBLE)
    for _ in range(8):
        x, grad = torch.randn(2, 4, 5, 3, dtype=torch.float64)
        mask = torch.rand(4, 5) < 0.4
        expected = step(plain, x[~mask], grad[~mask])
        x[mask] = torch.nan
        found = [v.movedim(dim, -1) for v in step(masked, x.movedim(-1, dim), grad.movedim(-1, dim), mask)]
        for a, b in zip(expected, found, strict=True):
            assert error(a, b[~mask]) <= EXACT
        assert not found[1][mask].any()
    assert_same_state(plain, masked)


@both
def test_a_batch_of_padding_alone_keeps_the_second_moment(make: Make) -> None:
    norm = make(**DOUBLE)
    train(norm, 5, 3)
    before = norm.running_second_moment.clone()
    y, x_grad = step(norm, *torch.randn(2, 4, 3, dtype=torch.float64), torch.ones(4, dtype=torch.bool))
    assert torch.isfinite(y).all()
    assert not x_grad.any()
    assert all(torch.isfinite(value).all() for value in state(norm).values())
    if make is power:
        assert error(before, norm.running_second_moment) <= EXACT


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(make: Make, dtype: torch.dtype) -> None:
    """Statistics are those of the rounded input in float32; the output has one rounding of its own."""
    half, single = make(), make()
    for _ in range(8):
        x, grad = torch.randn(2, 16, 3).to(dtype)
        found, expected = step(half, x, grad), step(single, x.float(), grad.float())
        for a, b in zip(expected, found, strict=True):
            assert b.dtype == dtype
            assert error(a, b) <= torch.finfo(dtype).eps
    assert_same_state(single, half, 0)


@both
def test_half_precision_module_keeps_its_statistics(make: Make) -> None:
    norm, single = make(), make()
    train(norm, 5, 3)
    single.load_state_dict(norm.state_dict())
    norm.bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert {b.dtype for b in norm.buffers() if b.is_floating_point()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), single.buffers(), strict=True))
    y, x_grad = step(norm, *torch.randn(2, 5, 3, dtype=torch.bfloat16))
    assert {y.dtype, x_grad.dtype, norm.weight.grad.dtype} == {torch.bfloat16}
    assert norm.double().running_second_moment.dtype == torch.float64
    assert make(dtype=torch.bfloat16).running_second_moment.dtype == torch.float32


@both
def test_autocast(make: Make) -> None:
    model = nn.Sequential(nn.Linear(4, 3), make())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(6, 4))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert model[1].running_second_moment.dtype == torch.float32
    assert torch.isfinite(model[0].weight.grad).all()


@both
def test_double_input_to_a_single_precision_module_is_not_rounded(make: Make) -> None:
    x, grad = torch.randn(2, 6, 3, dtype=torch.float64)
    for a, b in zip(step(make().double(), x, grad), step(make(), x, grad), strict=True):
        assert b.dtype == torch.float64
        assert error(a, b) <= 1e-6


@both
def test_inference_form(make: Make) -> None:
    """Eval mode is ``affine_map()``, for any leading axes, differentiable, and leaves the statistics alone."""
    norm = make(dim=1, **DOUBLE)
    train(norm, 4, 3, 5)
    norm.eval()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    a, c = norm.affine_map()
    assert (a.dtype, a.shape, c.shape) == (torch.float64, (3,), (3,))
    y = norm(x, torch.ones(2, 4, dtype=torch.bool))
    assert error(a[:, None] * x.detach() + c[:, None], y.detach()) <= EXACT
    expected = norm.weight.detach() / (norm.running_second_moment + norm.eps).sqrt()
    assert error(expected, a) <= EXACT
    assert error(norm.bias.detach(), c) <= EXACT
    y.sum().backward()
    assert error(a[:, None].expand(2, 3, 4), x.grad) <= EXACT
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@both
def test_affine_map_of_single_precision_is_computed_in_double(make: Make) -> None:
    norm = make()
    train(norm, 5, 3)
    for one, other in zip(norm.affine_map(), copy.deepcopy(norm).double().affine_map(), strict=True):
        assert torch.equal(one, other)


@both
def test_state_dict_continues_identically(make: Make) -> None:
    norm, other = make(**DOUBLE), make(**DOUBLE)
    train(norm, 5, 3, steps=7)
    other.load_state_dict(norm.state_dict())
    for module in (norm, other):
        module.zero_grad()
    found = [train(module, 5, 3, seed=1) for module in (norm, other)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert_same_state(norm, other, 0)


@both
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_copies_are_independent(make: Make, copier: Callable[[Any], Any]) -> None:
    norm = make(process_group=None, **DOUBLE)
    train(norm, 5, 3)
    y = norm(torch.randn(5, 3, dtype=torch.float64, requires_grad=True))
    other = copier(norm)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    y.sum().backward()  # of the original: the copy's statistics stay
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert not torch.equal(norm.running_gradient_statistic, other.running_gradient_statistic)
    train(other, 5, 3)
    assert norm.step == 9
    assert other.step == 17


@both
def test_training_without_gradient_updates_forward_statistics_alone(make: Make) -> None:
    norm, other = make(**DOUBLE), make(**DOUBLE)
    for _ in range(6):
        x = torch.randn(5, 3, dtype=torch.float64)
        with torch.no_grad():
            y = norm(x)
        assert torch.equal(y, other(x))
    for name, value in norm.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert norm.step == 6
    assert not norm.running_gradient_statistic.any()


@both
def test_backward_twice_updates_gradient_statistics_twice(make: Make) -> None:
    norm = make(**DOUBLE)
    y = norm(torch.randn(5, 3, dtype=torch.float64, requires_grad=True))
    grad = torch.randn(5, 3, dtype=torch.float64)
    seen = []
    for _ in range(2):
        y.backward(grad, retain_graph=True)
        seen.append(norm.running_gradient_statistic.clone())
    assert norm.step == 1
    assert seen[0].any()
    assert not torch.equal(*seen)


@both
def test_forwards_before_their_backwards(make: Make) -> None:
    """Gradient accumulation over several forwards: each backward uses the statistics of its own forward."""
    together, fresh = make(**DOUBLE), make(**DOUBLE)
    train(together, 5, 3)
    fresh.load_state_dict(together.state_dict())
    xs = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad((fresh(xs[0]) ** 3).sum(), xs)
    outputs = [together(x) for x in xs]
    (found,) = torch.autograd.grad((outputs[0] ** 3).sum(), xs)
    assert error(first, found) <= EXACT


@both
def test_second_derivative_is_refused(make: Make) -> None:
    x = torch.randn(5, 3, requires_grad=True)
    (grad,) = torch.autograd.grad((make()(x) ** 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@both
def test_resets(make: Make) -> None:
    norm = make()
    train(norm, 5, 3)
    running = norm.running_second_moment.clone()
    norm.reset_step()
    assert norm.step == 0
    assert torch.equal(norm.running_second_moment, running)
    norm.reset_parameters()
    fresh = {**make().state_dict(), "weight": torch.ones(3), "bias": torch.zeros(3)}
    assert all(torch.equal(value, fresh[name]) for name, value in norm.state_dict().items())


@both
def test_misuse_is_refused_at_the_call(make: Make) -> None:
    norm = make()
    with pytest.raises(ValueError, match="has not 3 channels on axis -1"):
        norm(torch.randn(2, 4))
    with pytest.raises(ValueError, match="channels on axis 2"):
        make(dim=2)(torch.randn(2, 3))
    with pytest.raises(TypeError, match="floating-point"):
        norm(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="padding_mask is bool"):
        norm(torch.randn(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="one per token"):
        norm(torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool))
    for options in ({"eps": 0.0}, {"momentum": 1.0}, {"warmup_steps": -1}, {"process_group": "all"}):
        with pytest.raises(ValueError, match=r"^(give|process_group is)"):
            make(**options)
    assert norm.step == 0


@both
def test_arguments_are_shown(make: Make) -> None:
    shown = repr(make(process_group="world", dim=1))
    assert "3, eps=1e-05, momentum=0.9, warmup_steps=4, dim=1, synchronized" in shown
