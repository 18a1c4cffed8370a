"""The L1 norms as modules: statistics, inference form, conversions, precisions, layouts, compiled and empty batches."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.layers import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d, L1LayerNorm, L1RMSNorm
from normfuse.layers.affine_inference import AffineInference
from normfuse.layers.mean_deviation import channel_deviation, deviation_ratio
from tests.parity import EXACT, assert_parity, error, randomize_norms

DOUBLE = {"dtype": torch.float64}
RANKS = {L1BatchNorm1d: (nn.BatchNorm1d, (6, 4)), L1BatchNorm2d: (nn.BatchNorm2d, (3, 4, 5, 2))}
RANKS = {**RANKS, L1BatchNorm3d: (nn.BatchNorm3d, (2, 4, 3, 2, 2))}
each_rank = pytest.mark.parametrize("cls", RANKS, ids=lambda cls: cls.__name__)
ALL = [lambda **o: L1BatchNorm1d(8, **o), lambda **o: L1LayerNorm(8, **o), lambda **o: L1RMSNorm(8, **o)]
every = pytest.mark.parametrize("make", ALL, ids=["batch", "layer", "rms"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def randomized(norm: Any) -> Any:
    with torch.no_grad():
        for i, p in enumerate(norm.parameters()):
            p.copy_(randn(*p.shape, seed=i + 5))
    return norm


@each_rank
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_running_statistics(cls: Any, momentum: float | None):
    """Against the same layer of torch for the mean, and averages made by hand for the deviation."""
    l2, shape = RANKS[cls]
    norm, torch_norm = cls(4, momentum=momentum, **DOUBLE), l2(4, momentum=momentum, **DOUBLE)
    expected = torch.ones(4, **DOUBLE)
    for t in range(1, 5):
        x = randn(*shape, seed=t) * t + 1
        norm(x)
        torch_norm(x)
        axes = [i for i in range(x.dim()) if i != 1]
        s = (x - x.mean(axes, keepdim=True)).abs().mean(axes)
        rho = 1 / t if momentum is None else momentum
        expected = (1 - rho) * expected + rho * s
    assert error(torch_norm.running_mean, norm.running_mean) <= EXACT
    assert error(expected, norm.running_deviation) <= EXACT
    assert int(norm.num_batches_tracked) == 4
    state = copy.deepcopy(norm.state_dict())
    norm.eval()(randn(*shape))
    assert all(torch.equal(state[key], value) for key, value in norm.state_dict().items())


@each_rank
@pytest.mark.parametrize("options", [{}, {"gaussian": True}, {"affine": False}, {"eps": 0.3}])
def test_inference_is_the_affine_map(cls: Any, options: dict[str, Any]):
    _, shape = RANKS[cls]
    norm = randomized(cls(4, **options, **DOUBLE))
    for t in range(3):
        norm(randn(*shape, seed=t) * 3 - 1)
    a, c = norm.eval().affine_map()
    assert a.dtype == c.dtype == torch.float64
    assert isinstance(norm, AffineInference)
    x, along = randn(*shape), (1, -1, *[1] * (len(shape) - 2))
    assert error(norm(x).detach(), a.reshape(along) * x + c.reshape(along)) <= EXACT
    assert norm.dim == 1


@each_rank
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_conversion_of_batch_norm_is_exact_in_eval(cls: Any, gaussian: bool, measured: bool, affine: bool):
    l2, shape = RANKS[cls]
    bn = l2(4, affine=affine, eps=1e-3, momentum=0.2, **DOUBLE)
    randomize_norms(bn)
    xs = [randn(*shape, seed=t) for t in range(3)]
    norm = cls.from_batch_norm(bn.eval(), channel_deviation(xs) if measured else None, gaussian=gaussian)
    assert not norm.training
    assert norm.momentum == 0.2
    assert_parity(bn, norm, randn(*shape, seed=9))
    if not measured:
        gain = torch.ones(4, **DOUBLE) if bn.weight is None else bn.weight.detach()
        assert error(gain if gaussian else gain * math.sqrt(2 / math.pi), norm.weight.detach()) <= EXACT


def test_conversion_of_batch_norm_trains_on_at_the_same_scale():
    """Gaussian channels: in training mode the converted layer is within a few percent of the source."""
    x = randn(4000, 5) * torch.tensor([0.1, 1, 3, 10, 50], **DOUBLE) + 2
    bn = nn.BatchNorm1d(5, momentum=None, **DOUBLE)
    bn(x)
    for deviation in (None, channel_deviation([x[:2000], x[2000:]])):
        for gaussian in (False, True):
            norm = L1BatchNorm1d.from_batch_norm(bn, deviation, gaussian=gaussian)
            assert norm.training
            assert error(bn(x), norm(x)) < 0.05


def test_channel_deviation_weighs_batches_by_their_size():
    xs = [randn(3, 4, 5), randn(0, 4, 5), randn(7, 4, 5, seed=1) * 9]
    parts = [(x - x.mean((0, 2), keepdim=True)).abs().sum((0, 2)) for x in xs if len(x)]
    assert error(sum(parts) / 50, channel_deviation(xs)) <= EXACT  # type: ignore[operator]
    with pytest.raises(ValueError, match="no inputs"):
        channel_deviation([])


def test_conversion_of_layer_norm_is_as_far_off_as_the_ratio_spreads():
    """Each token differs from LayerNorm by the factor kappa sigma / s, up to eps."""
    x = randn(50, 4, 64) ** 3
    ln = nn.LayerNorm(64, eps=1e-12, **DOUBLE)
    randomized(ln)
    kappa = deviation_ratio(x)
    for gaussian in (False, True):
        norm = L1LayerNorm.from_layer_norm(ln, kappa, gaussian=gaussian)
        norm.eps = 1e-12
        d = x - x.mean(-1, keepdim=True)
        ratio = d.abs().mean(-1, keepdim=True) / d.square().mean(-1, keepdim=True).sqrt()
        assert float(ratio.mean()) == pytest.approx(kappa, rel=1e-12)
        assert error((ln(x) - ln.bias) * kappa / ratio + ln.bias, norm(x)) <= 1e-9


@pytest.mark.parametrize("gaussian", [False, True])
def test_conversions_start_close_on_gaussian_tokens(gaussian: bool):
    x = randn(20, 4000)
    ln, rms = randomized(nn.LayerNorm(4000, **DOUBLE)), randomized(nn.RMSNorm(4000, **DOUBLE))
    assert error(ln(x), L1LayerNorm.from_layer_norm(ln, gaussian=gaussian)(x)) < 0.05
    assert error(rms(x), L1RMSNorm.from_rms_norm(rms, gaussian=gaussian)(x)) < 0.05
    assert deviation_ratio([x[:3], x[3:]], centred=False) == pytest.approx(math.sqrt(2 / math.pi), rel=0.01)


def test_conversion_keeps_what_the_source_has():
    plain = nn.LayerNorm((2, 3), elementwise_affine=False)
    assert L1LayerNorm.from_layer_norm(plain).normalized_shape == (2, 3)
    assert L1LayerNorm.from_layer_norm(nn.LayerNorm(4, bias=False)).bias is None
    assert L1RMSNorm.from_rms_norm(nn.RMSNorm(4).half().eval()).weight.dtype == torch.float16
    assert error(plain(x := randn(2000, 2, 3).float()), L1LayerNorm.from_layer_norm(plain)(x)) < 1


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make: Any, dtype: torch.dtype):
    """Statistics in float32: the output is that of float64, rounded, for values that overflow a half-precision sum."""
    norm = randomized(make())
    x = (randn(4, 8) * 1000 + 5000).to(dtype)
    half = copy.deepcopy(norm).to(dtype)
    expected = copy.deepcopy(half).double()(x.double())
    assert half(x).dtype == dtype
    assert error(expected, half(x)) <= 2 * torch.finfo(dtype).eps
    x.requires_grad_()
    half(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == half.weight.grad.dtype == dtype
    assert {b.dtype for b in half.buffers()} <= {torch.float32, torch.int64}
    with torch.autocast("cpu", dtype):
        assert error(expected, norm(x)) <= 8 * torch.finfo(dtype).eps


def test_buffers_stay_wide():
    assert {b.dtype for b in L1BatchNorm1d(3).half().buffers()} == {torch.float32, torch.int64}
    assert {b.dtype for b in L1BatchNorm1d(3).half().double().buffers()} == {torch.float64, torch.int64}
    assert L1BatchNorm1d(3).half().eval()(torch.ones(2, 3).half()).dtype == torch.float16


@pytest.mark.parametrize("training", [True, False])
def test_channels_last(training: bool):
    norm = randomized(L1BatchNorm2d(4, **DOUBLE)).train(training)
    x, grad = randn(3, 4, 5, 6), randn(3, 4, 5, 6, seed=1)
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=form).requires_grad_()
        y = copy.deepcopy(norm)(leaf)
        y.backward(grad)
        assert y.is_contiguous(memory_format=form)
        results.append((y.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        assert error(one, other) <= EXACT


@every
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(make: Any, backend: str):
    norm = randomized(make(**DOUBLE))
    twin = copy.deepcopy(norm)
    compiled: Any = torch.compile(twin, fullgraph=True, backend=backend)
    for t in range(3):
        x, grad = randn(5, 8, seed=t), randn(5, 8, seed=t + 9)
        results = []
        for module, call in ((norm, norm), (twin, compiled)):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.backward(grad)
            results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        for one, other in zip(*results, strict=True):
            assert error(one, other) <= EXACT
    x = randn(5, 8)
    assert error(norm.eval()(x), compiled.eval()(x)) <= EXACT


@every
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(make: Any, training: bool):
    norm = make().train(training)
    before = copy.deepcopy(norm.state_dict())
    x = torch.empty(0, 8, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.shape == (0, 8)
    assert x.grad is not None
    assert all(bool((p.grad == 0).all()) for p in norm.parameters())
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


@every
def test_nothing_waits_for_the_device(make: Any):
    norm = make(device="meta")
    x = torch.empty(5, 8, device="meta", requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert norm.eval()(x).shape == (5, 8)


@every
def test_state_dict_and_repr(make: Any):
    norm = randomized(make(gaussian=True))
    norm(torch.randn(4, 8))
    other = make(gaussian=True)
    other.load_state_dict(norm.state_dict())
    assert_parity(norm, other, torch.randn(4, 8), tolerance=0)
    assert "gaussian=True" in repr(norm)
    assert "gaussian" not in repr(make())


@pytest.mark.parametrize(
    ("norm", "x", "error_type", "match"),
    [
        (L1BatchNorm2d(3), torch.ones(2, 3), ValueError, "rank 4"),
        (L1BatchNorm1d(3), torch.ones(2, 4), ValueError, "3 channels"),
        (L1BatchNorm1d(3), torch.ones(1, 3), ValueError, "one value per channel"),
        (L1BatchNorm1d(3), torch.ones(2, 3, dtype=torch.int8), TypeError, "floating-point"),
        (L1LayerNorm((2, 3)), torch.ones(2, 2, 4), ValueError, "does not end in"),
        (L1LayerNorm(3), torch.ones(2, 3, dtype=torch.int8), TypeError, "floating-point"),
        (L1RMSNorm(3), torch.ones(()), ValueError, "does not end in"),
    ],
)
def test_wrong_inputs(norm: nn.Module, x: Tensor, error_type: type[Exception], match: str):
    with pytest.raises(error_type, match=match):
        norm(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: L1BatchNorm1d(0),
        lambda: L1BatchNorm1d(3, eps=0),
        lambda: L1BatchNorm1d(3, momentum=1.5),
        lambda: L1LayerNorm(0),
        lambda: L1LayerNorm(()),
        lambda: L1RMSNorm(4, eps=-1),
        lambda: L1LayerNorm.from_layer_norm(nn.LayerNorm(3), kappa=1.2),
        lambda: L1BatchNorm1d.from_batch_norm(nn.BatchNorm1d(3), -torch.ones(3)),
        lambda: L1BatchNorm1d.from_batch_norm(nn.BatchNorm1d(3), torch.ones(4)),
        lambda: deviation_ratio(torch.ones(3, 4)),
    ],
)
def test_wrong_arguments(make: Any):
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own text
        make()


def test_wrong_sources():
    for call in (
        lambda: L1BatchNorm1d.from_batch_norm(nn.BatchNorm1d(3, track_running_stats=False)),
        lambda: L1BatchNorm1d.from_batch_norm(nn.LayerNorm(3)),
        lambda: L1LayerNorm.from_layer_norm(nn.RMSNorm(3)),
        lambda: L1RMSNorm.from_rms_norm(nn.LayerNorm(3)),
    ):
        with pytest.raises(TypeError, match="is not a"):
            call()
