"""Norms with running statistics are their equations, step by step, as ``literal_families`` writes them out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import NormfuseError
from normfuse.layers import (
    ActNorm,
    EstimatedBatchNorm1d,
    EstimatedBatchNorm2d,
    EstimatedBatchNorm3d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    OnlineNorm,
)
from normfuse.layers.online_norm import LayerScaling
from tests.layers import literal_families as literal
from tests.parity import EXACT, error, randomize_norms

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def rows(x: Tensor) -> literal.Batch:
    return x.detach().flatten(2).tolist() if x.dim() > 2 else x.detach().unsqueeze(2).tolist()


def assert_close(found: Tensor, expected: Any, what: str = "") -> None:
    wanted = torch.tensor(expected, dtype=torch.float64).reshape(found.shape)
    assert error(wanted, found.detach()) <= EXACT, what


def uniform(norm: Any) -> Any:
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


@pytest.mark.parametrize(("batch", "sizes"), [(6, [3, 3]), (7, [3, 2, 2]), (2, [2]), (9, [3, 3, 3])])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_ghost_batch_norm(batch: int, sizes: list[int], momentum: float | None) -> None:
    norm = uniform(GhostBatchNorm2d(3, 3, momentum=momentum, **DOUBLE))
    slow = literal.LiteralGhostBatchNorm(3, momentum, norm.eps)
    for step in range(4):
        x = torch.randn(batch, 3, 2, 2, **DOUBLE) * (1 + step)
        assert_close(norm(x), slow.train(rows(x), sizes, norm.weight.tolist(), norm.bias.tolist()), f"step {step}")
        assert_close(norm.running_mean, slow.mu_hat)
        assert_close(norm.running_var, slow.v_hat)
    assert norm.num_batches_tracked == 4 * len(sizes)
    x = torch.randn(batch, 3, 2, 2, **DOUBLE)
    expected = literal.normalized(rows(x), slow.mu_hat, slow.v_hat, norm.weight.tolist(), norm.bias.tolist(), norm.eps)
    assert_close(norm.eval()(x), expected)


def test_ghost_batch_norm_of_one_ghost_is_batch_norm() -> None:
    norm, plain = GhostBatchNorm1d(4, 8, **DOUBLE), nn.BatchNorm1d(4, **DOUBLE)
    x = torch.randn(8, 4, 5, **DOUBLE)
    assert torch.equal(norm(x), plain(x))
    assert set(norm.state_dict()) == set(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, norm.state_dict()[name]), name


def test_ghost_gradients_are_those_of_each_ghost() -> None:
    norm = uniform(GhostBatchNorm3d(2, 2, **DOUBLE))
    assert torch.autograd.gradcheck(norm, torch.randn(4, 2, 2, 1, 2, requires_grad=True, **DOUBLE))


@pytest.mark.parametrize("kind", [EstimatedBatchNorm1d, EstimatedBatchNorm2d, EstimatedBatchNorm3d])
def test_estimated_batch_norm(kind: Any) -> None:
    rank = {EstimatedBatchNorm1d: 3, EstimatedBatchNorm2d: 4, EstimatedBatchNorm3d: 5}[kind]
    norm, slow = uniform(kind(3, **DOUBLE)), literal.LiteralEstimatedBatchNorm(3)
    for step, speed in enumerate((0.0, 1.0, 0.3, 0.05, 0.05)):
        norm.speed = speed
        x = torch.randn(2, 3, *[2] * (rank - 2), **DOUBLE) + step
        found = norm(x)
        speed = float(torch.tensor(speed))  # the buffer is in float32, as the authors'
        assert_close(found, slow.train(rows(x), speed, norm.weight.tolist(), norm.bias.tolist()), f"step {step}")
        assert_close(norm.running_mean, slow.mu_hat)
        assert_close(norm.running_var, slow.v_hat)
    x = torch.randn(2, 3, *[2] * (rank - 2), **DOUBLE)
    eval_output = norm.eval()(x)
    norm.train().speed = 0.0
    assert torch.equal(norm(x), eval_output)


def test_no_gradient_through_estimates() -> None:
    norm = uniform(EstimatedBatchNorm1d(2, speed=0.5, **DOUBLE))
    x = torch.randn(4, 2, requires_grad=True, **DOUBLE)
    norm(x).sum().backward()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert x.grad is not None
    assert error(scale.detach().expand(4, 2), x.grad) <= EXACT


@pytest.mark.parametrize("shape", [(5, 3, 4), (4, 2, 2, 3), (3, 2)])
@pytest.mark.parametrize(("forward", "backward"), [(0.9, 0.8), (0.999, 0.99), (0.0, 0.0), (1.0, 1.0)])
def test_online_norm(shape: tuple[int, ...], forward: float, backward: float) -> None:
    options: dict[str, Any] = {"alpha_forward": forward, "alpha_backward": backward, **DOUBLE}
    norm = OnlineNorm(shape[1], affine=False, control=None, **options)
    slow = literal.LiteralOnlineNorm(shape[1], forward, backward, 1e-5)
    for step in range(5):
        x, grad = torch.randn(2, *shape, **DOUBLE) * (1 + step)
        x.requires_grad_()
        y = norm(x)
        y.backward(grad)
        assert x.grad is not None
        core = norm.core
        for found, expected in (
            (y, slow.forward(rows(x))),
            (x.grad, slow.backward(rows(grad))),
            (core.running_mean, slow.mu),
            (core.running_var, slow.s2),
            (core.gradient_mean, slow.U),
            (core.gradient_product, slow.V),
        ):
            assert_close(found, expected, f"step {step}")


def test_online_norm_controls_what_follows_its_affine() -> None:
    norm = OnlineNorm(3, clamp=0.5, **DOUBLE).eval()
    bare = OnlineNorm(3, control=None, **DOUBLE).eval()
    scaled = OnlineNorm(3, control="layer_scaling", **DOUBLE).eval()
    for one in (norm, bare, scaled):
        randomize_norms(one)
    x = torch.randn(4, 3, 5, **DOUBLE)
    assert torch.equal(norm(x), bare(x).clamp(-0.5, 0.5))
    values = rows(bare(x))
    roots = [math.sqrt(literal.mean([p * p for row in sample for p in row]) + 1e-5) for sample in values]
    expected = [[[p / r for p in row] for row in s] for s, r in zip(values, roots, strict=True)]
    assert_close(scaled(x), expected)
    assert isinstance(scaled.control, LayerScaling)


def test_act_norm_starts_from_its_first_batch() -> None:
    norm = ActNorm(3, eps=0.0, **DOUBLE)
    with pytest.raises(NormfuseError, match="has not seen its first batch"):
        norm.eval()(torch.randn(2, 3))
    first = torch.randn(6, 3, 4, 4, **DOUBLE) * 3 + 1
    y = norm.train()(first)
    channels = y.detach().movedim(1, 0).flatten(1)
    assert channels.mean(1).abs().max() <= EXACT
    assert (channels.std(1, unbiased=False) - 1).abs().max() <= EXACT
    before = norm.weight.clone()
    other, log_det = norm(torch.randn(2, 3, 4, 4, **DOUBLE), return_log_det=True)
    assert torch.equal(norm.weight, before)
    expected = [16 * sum(math.log(abs(s)) for s in norm.weight.tolist())] * 2
    assert_close(log_det, expected)
    assert other.shape == (2, 3, 4, 4)
    assert error(first, norm.inverse(y).detach()) <= EXACT


def test_act_norm_log_determinant_is_that_of_its_jacobian() -> None:
    norm = ActNorm(2, dim=-1, **DOUBLE)
    norm(torch.randn(5, 3, 2, **DOUBLE))
    x = torch.randn(1, 3, 2, **DOUBLE)
    jacobian: Any = torch.autograd.functional.jacobian(norm, x)
    _, log_det = norm(x, return_log_det=True)
    assert_close(log_det, [float(jacobian.reshape(6, 6).slogdet()[1])])


NORMS = [
    lambda **k: GhostBatchNorm2d(4, 2, **k),
    lambda **k: EstimatedBatchNorm2d(4, speed=0.1, **k),
    lambda **k: OnlineNorm(4, **k),
    lambda **k: ActNorm(4, **k),
]


@pytest.mark.parametrize("make", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_state_and_copy(make: Any, dtype: torch.dtype) -> None:
    norm, x = make().to(dtype), torch.randn(4, 4, 3, 3, dtype=dtype)
    norm(x).sum().backward()
    assert norm(x).dtype == dtype
    other = make().to(dtype)
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other.eval()(x), norm.eval()(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: GhostBatchNorm1d(4, 0),
        lambda: GhostBatchNorm1d(4, 2, track_running_stats=False),
        lambda: EstimatedBatchNorm1d(4, speed=2.0),
        lambda: EstimatedBatchNorm1d(4, track_running_stats=False),
        lambda: OnlineNorm(0),
        lambda: OnlineNorm(4, control="none"),  # type: ignore[arg-type]
        lambda: OnlineNorm(4)(torch.randn(2, 3)),
        lambda: ActNorm(4, dim=0),
        lambda: ActNorm(4)(torch.randn(2, 3)),
        lambda: GhostBatchNorm2d(4, 2)(torch.randn(2, 4)),
    ],
)
def test_bad_arguments(make: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        make()
