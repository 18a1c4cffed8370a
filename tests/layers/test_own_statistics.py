"""Norms by their own statistics, and norms in two parts, are their equations as ``literal_families`` has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.layers import (
    GDN,
    IBN,
    AdaptiveDeviation,
    BatchChannelNorm,
    EstimatedBatchNorm2d,
    LearnedRegionNorm,
    PartialRMSNorm,
    QKNorm,
    RegionNorm,
    ScaleNorm,
)
from normfuse.layers.region_norm import normalize_regions
from tests.layers import literal_families as literal
from tests.parity import EXACT, error, randomize_norms

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def rows(x: Tensor) -> literal.Batch:
    return x.detach().flatten(2).tolist()


def assert_close(found: Tensor, expected: Any) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64).reshape(found.shape)
    assert error(wanted, found.detach()) <= EXACT


def random(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return randomize_norms(module.double())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("estimate", [True, False])
def test_batch_channel_norm(training: bool, estimate: bool) -> None:
    norm: BatchChannelNorm = random(BatchChannelNorm(6, 3, estimate=estimate)).train(training)
    if isinstance(norm.bn, EstimatedBatchNorm2d):
        norm.bn.speed = 0.25
    x = torch.randn(2, 6, 2, 3, **DOUBLE)
    found, u = norm(x), norm.bn.eval()(x)
    if training and not estimate:
        u = F.batch_norm(x, None, None, norm.bn.weight, norm.bn.bias, training=True)
    gamma, beta = norm.channel.weight.flatten().tolist(), norm.channel.bias.flatten().tolist()
    assert_close(found, literal.batch_channel_norm(rows(u), 3, gamma, beta, 1e-5))


@pytest.mark.parametrize(("channels", "ratio", "half"), [(6, 0.5, 3), (5, 0.5, 2), (4, 0.25, 1)])
def test_ibn(channels: int, ratio: float, half: int) -> None:
    norm: IBN = random(IBN(channels, ratio)).eval()
    x = torch.randn(2, channels, 2, 3, **DOUBLE)
    first = literal.instance_norm(rows(x[:, :half]), norm.IN.weight.tolist(), norm.IN.bias.tolist(), 1e-5)
    assert norm.BN.running_mean is not None
    assert norm.BN.running_var is not None
    statistics = [t.tolist() for t in (norm.BN.running_mean, norm.BN.running_var, norm.BN.weight, norm.BN.bias)]
    rest = literal.normalized(rows(x[:, half:]), *statistics, norm.BN.eps)
    assert_close(norm(x), [a + b for a, b in zip(first, rest, strict=True)])
    assert {name.split(".")[0] for name in norm.state_dict()} == {"IN", "BN"}


def test_adaptive_deviation() -> None:
    layer: AdaptiveDeviation = random(AdaptiveDeviation(3, nn.Conv2d(3, 3, 1))).eval()
    assert AdaptiveDeviation(3, nn.Identity()).phi.weight.item() == 1.5
    x, skip = torch.randn(2, 2, 3, 4, 4, **DOUBLE)
    w, b = layer.phi.weight.item(), layer.phi.bias.item()  # type: ignore[union-attr]
    inner = layer.block(layer.bn(x))
    for n in range(2):
        values = skip[n].flatten().tolist()
        deviation = math.sqrt(literal.var(values) * len(values) / (len(values) - 1))
        assert error(((w * deviation + b) * inner[n] + skip[n]).detach(), layer(x, skip)[n].detach()) <= EXACT
    assert torch.equal(layer(x), layer(x, x))


@pytest.mark.parametrize(("p", "k"), [(None, 8), (1.0, 8), (0.5, 4), (0.3, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_partial_rms_norm(p: float | None, k: int, bias: bool) -> None:
    norm: PartialRMSNorm = random(PartialRMSNorm(8, p, eps=0.1, bias=bias))
    x = torch.randn(3, 8, **DOUBLE) * torch.tensor([[1.0], [0.1], [0.0]])
    shift = norm.bias.tolist() if norm.bias is not None else [0.0] * 8
    assert_close(norm(x), [literal.prms_norm(row, k, norm.weight.tolist(), shift, 0.1) for row in x.tolist()])


def test_scale_norm() -> None:
    norm = ScaleNorm(8, eps=0.5, **DOUBLE)
    assert norm.weight.item() == math.sqrt(8)
    nn.init.constant_(norm.weight, -1.3)
    x = torch.randn(3, 8, **DOUBLE) * torch.tensor([[1.0], [0.01], [0.0]])
    assert_close(norm(x), [literal.scale_norm(row, -1.3, 0.5) for row in x.tolist()])


def test_qk_norm() -> None:
    norm = QKNorm(10, **DOUBLE)
    assert norm.weight.item() == pytest.approx(math.log2(90))
    nn.init.constant_(norm.weight, 1.7)
    q, k = torch.randn(5, 4, **DOUBLE), torch.randn(6, 4, **DOUBLE)
    scaled, unit = norm(q, k)
    assert_close((scaled @ unit.T).softmax(-1), literal.qk_attention(q.tolist(), k.tolist(), 1.7))
    again = norm(3 * q, 0.2 * k)
    assert error(scaled.detach(), again[0].detach()) <= EXACT
    assert error(unit, again[1]) <= EXACT


@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2, 2), (2, 3)])
def test_gdn(inverse: bool, shape: tuple[int, ...]) -> None:
    norm = GDN(3, inverse=inverse, **DOUBLE)
    nn.init.uniform_(norm.beta, 0.1, 2)
    nn.init.uniform_(norm.gamma, 0, 1)
    x = torch.randn(*shape, **DOUBLE)
    values = rows(x if len(shape) > 2 else x.unsqueeze(2))
    assert_close(norm(x), literal.gdn(values, norm.beta.tolist(), norm.gamma.tolist(), inverse=inverse))
    nn.init.constant_(norm.beta, -1)
    assert torch.isfinite(norm(torch.zeros(shape, **DOUBLE))).all()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_region_norm(share: float) -> None:
    x, mask = torch.randn(2, 3, 4, 4, **DOUBLE), (torch.rand(2, 1, 4, 4) < share).double()
    normed = literal.region_norm(rows(x), mask.flatten(1).tolist(), 1e-5)
    assert_close(normalize_regions(x, mask), normed)
    norm: RegionNorm = random(RegionNorm(3))
    expected = torch.tensor(normed, **DOUBLE).reshape(x.shape)
    gains = (mask * (1 + norm.foreground_gamma[:, None, None]), (1 - mask) * (1 + norm.background_gamma[:, None, None]))
    shift = (norm.foreground_beta + norm.background_beta)[:, None, None]
    assert error((expected * sum(gains) + shift).detach(), norm(x, mask).detach()) <= EXACT


def test_region_norm_resizes_its_mask_and_depends_on_the_batch() -> None:
    norm, x = RegionNorm(3, **DOUBLE).eval(), torch.randn(2, 3, 4, 4, **DOUBLE)
    coarse = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).reshape(1, 1, 2, 2).repeat(2, 1, 1, 1)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(norm(x, coarse), norm(x, fine))
    assert error(norm(x, fine)[:1], norm(x[:1], fine[:1])) > 0.01


@pytest.mark.parametrize("kernel", [3, 7])
def test_learned_region_norm(kernel: int) -> None:
    norm: LearnedRegionNorm = random(LearnedRegionNorm(kernel, threshold=0.5))
    x = torch.randn(2, 3, 8, 8, **DOUBLE)
    s = torch.sigmoid(norm.map(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)))
    mask = (s >= 0.5).double()
    assert 0 < mask.mean() < 1
    normed = torch.tensor(literal.region_norm(rows(x), mask.flatten(1).tolist(), 1e-5), **DOUBLE).reshape(x.shape)
    assert error((normed * (1 + norm.gamma(s)) + norm.beta(s)).detach(), norm(x).detach()) <= EXACT


LAYERS = [
    (lambda: BatchChannelNorm(4, 2), (2, 4, 3, 3)),
    (lambda: IBN(4), (2, 4, 3, 3)),
    (lambda: PartialRMSNorm(4, 0.5), (3, 4)),
    (lambda: ScaleNorm(4), (3, 4)),
    (lambda: GDN(4), (2, 4, 3, 3)),
    (lambda: LearnedRegionNorm(3), (2, 4, 3, 3)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_state(make: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm, other, x = make().to(dtype), make().to(dtype), torch.randn(*shape, dtype=dtype)
    y = norm(x)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other.eval()(x), norm.eval()(x))


@pytest.mark.parametrize(("make", "shape"), [layer for layer in LAYERS if layer[1] == (3, 4)] + LAYERS[4:5])
def test_gradients(make: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, requires_grad=True, **DOUBLE)
    assert torch.autograd.gradcheck(make().double(), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BatchChannelNorm(6, 4),
        lambda: IBN(2, 0.1),
        lambda: PartialRMSNorm(4, 0.1),
        lambda: PartialRMSNorm(4, 2.0),
        lambda: QKNorm(1),
        lambda: GDN(4, beta_min=0.0),
        lambda: LearnedRegionNorm(5),
    ],
)
def test_bad_arguments(make: Any) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        make()
