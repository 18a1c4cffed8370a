"""The layers of timm that normfuse recognises, and does not write again, are the equations of their paper.

EvoNorm, arXiv 2004.02967; timm takes statistics in float32.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.layers.literal_families import mean, var
from tests.parity import error

FLOAT32 = 1e-6
Image = list[list[list[float]]]


def batch_series(kind: str, x: Image, norm: Any, variance: list[float]) -> Image:
    """``x`` is N samples of C channels of P positions; ``variance`` is of each channel, over batch and positions."""
    y: Image = []
    for sample in x:
        out = []
        for c, row in enumerate(sample):
            left = math.sqrt(variance[c] + norm.eps)
            square = math.sqrt(mean([p * p for p in row]) + norm.eps)
            right = {
                "B0": lambda p, r=row, c=c: norm.v[c].item() * p + math.sqrt(var(r) + norm.eps),
                "B1": lambda p, s=square: (p + 1) * s,
                "B2": lambda p, s=square: s - p,
            }[kind]
            gain, shift = norm.weight[c].item(), norm.bias[c].item()
            out.append([gain * p / max(left, right(p)) + shift for p in row])
        y.append(out)
    return y


def sample_series(kind: str, x: Image, norm: Any) -> Image:
    y: Image = []
    for sample in x:
        size, out = len(sample) // norm.groups, []
        for c, row in enumerate(sample):
            group = [p for other in sample[c // size * size : (c // size + 1) * size] for p in other]
            spread = mean([p * p for p in group]) if kind == "S2" else var(group)
            rate = norm.v[c].item() if kind == "S0" else 1.0
            gain, shift = norm.weight[c].item(), norm.bias[c].item()
            out.append([gain * p / (1 + math.exp(-rate * p)) / math.sqrt(spread + norm.eps) + shift for p in row])
        y.append(out)
    return y


def made(kind: str) -> Any:
    from timm.layers import evo_norm

    norm = getattr(evo_norm, f"EvoNorm2d{kind}")(4, **({"group_size": 2} if kind[0] == "S" else {}))
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.double()


def assert_close(found: Tensor, expected: Image) -> None:
    assert error(torch.tensor(expected, dtype=torch.float64).reshape(found.shape), found.detach()) <= FLOAT32


@pytest.mark.parametrize("kind", ["B0", "B1", "B2"])
def test_batch_series(kind: str) -> None:
    norm, running = made(kind), [1.0] * 4
    for step in range(3):
        x = torch.randn(2, 4, 2, 3, dtype=torch.float64) * (1 + step)
        rows = x.flatten(2).tolist()
        channels = [[p for sample in rows for p in sample[c]] for c in range(4)]
        assert_close(norm.train()(x), batch_series(kind, rows, norm, [var(values) for values in channels]))
        n = len(channels[0])
        running = [0.9 * r + 0.1 * var(values) * n / (n - 1) for r, values in zip(running, channels, strict=True)]
        assert error(torch.tensor(running, dtype=torch.float64), norm.running_var) <= FLOAT32
        assert_close(norm.eval()(x), batch_series(kind, rows, norm, norm.running_var.tolist()))


@pytest.mark.parametrize("kind", ["S0", "S1", "S2"])
def test_sample_series(kind: str) -> None:
    norm, x = made(kind), torch.randn(2, 4, 2, 3, dtype=torch.float64)
    expected = sample_series(kind, x.flatten(2).tolist(), norm)
    for mode in (True, False):
        assert_close(norm.train(mode)(x), expected)


def test_selu_keeps_mean_zero_and_variance_one() -> None:
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    y = nn.functional.selu(z)
    assert error(scale * torch.where(z > 0, z, alpha * (z.exp() - 1)), y) <= 1e-10
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    moments = [float(torch.trapezoid(y**k * density, z)) for k in (1, 2)]
    assert moments == pytest.approx([0, 1], abs=1e-6)
