"""Norms of the literature written out step by step on Python floats, as slowly as they read.

``x`` and the gradients are lists of N samples, each a list of C channels, each a list of P positions.
"""

# ruff: noqa: N803, N806
# The letters are those of the papers.

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

Batch = list[list[list[float]]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def var(values: list[float]) -> float:
    return mean([(v - mean(values)) ** 2 for v in values])


def channel(x: Batch, c: int) -> list[float]:
    return [value for sample in x for value in sample[c]]


@dataclass
class LiteralGhostBatchNorm:
    """arXiv 1705.08741; the ghosts of ``sizes`` enter the running statistics in order."""

    C: int
    momentum: float | None
    eps: float

    def __post_init__(self) -> None:
        self.mu_hat, self.v_hat, self.ghosts = [0.0] * self.C, [1.0] * self.C, 0

    def train(self, x: Batch, sizes: list[int], gamma: list[float], beta: list[float]) -> Batch:
        y: Batch = []
        start = 0
        for size in sizes:
            ghost = x[start : start + size]
            start += size
            self.ghosts += 1
            rho = 1 / self.ghosts if self.momentum is None else self.momentum
            mu = [mean(channel(ghost, c)) for c in range(self.C)]
            v = [var(channel(ghost, c)) for c in range(self.C)]
            y += normalized(ghost, mu, v, gamma, beta, self.eps)
            for c in range(self.C):
                n = len(channel(ghost, c))
                self.mu_hat[c] = (1 - rho) * self.mu_hat[c] + rho * mu[c]
                self.v_hat[c] = (1 - rho) * self.v_hat[c] + rho * v[c] * n / (n - 1)
        return y


def normalized(x: Batch, mu: list[float], v: list[float], gamma: list[float], beta: list[float], eps: float) -> Batch:
    return [
        [[gamma[c] * (p - mu[c]) / math.sqrt(v[c] + eps) + beta[c] for p in sample[c]] for c in range(len(mu))]
        for sample in x
    ]


@dataclass
class LiteralEstimatedBatchNorm:
    """arXiv 1911.09738, with the update of its ``EstBN``."""

    C: int
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.mu_hat, self.v_hat = [0.0] * self.C, [1.0] * self.C

    def train(self, x: Batch, s: float, gamma: list[float], beta: list[float]) -> Batch:
        for c in range(self.C):
            values, old = channel(x, c), self.mu_hat[c]
            self.mu_hat[c] = (1 - s) * old + s * mean(values)
            self.v_hat[c] = (1 - s) * self.v_hat[c] + s * mean([(p - old) ** 2 for p in values])
        return normalized(x, self.mu_hat, self.v_hat, gamma, beta, self.eps)


@dataclass
class LiteralOnlineNorm:
    """The core of arXiv 1905.05894, forward and backward, without gain and shift."""

    C: int
    f: float
    b: float
    eps: float
    saved: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mu, self.s2, self.U, self.V = [0.0] * self.C, [1.0] * self.C, [0.0] * self.C, [0.0] * self.C

    def forward(self, x: Batch) -> Batch:
        y: Batch = []
        self.saved = []
        for sample in x:
            s = [math.sqrt(self.s2[c] + self.eps) for c in range(self.C)]
            out = [[(p - self.mu[c]) / s[c] for p in sample[c]] for c in range(self.C)]
            y.append(out)
            self.saved.append((out, s))
            for c in range(self.C):
                m, v = mean(sample[c]), var(sample[c])
                self.s2[c] = self.f * self.s2[c] + (1 - self.f) * v + self.f * (1 - self.f) * (m - self.mu[c]) ** 2
                self.mu[c] += (1 - self.f) * (m - self.mu[c])
        return y

    def backward(self, G: Batch) -> Batch:
        dx: Batch = []
        for grad, (y, s) in zip(G, self.saved, strict=True):
            rows = []
            for c in range(self.C):
                g = [p - (1 - self.b) * self.V[c] * q for p, q in zip(grad[c], y[c], strict=True)]
                self.V[c] += mean([p * q for p, q in zip(g, y[c], strict=True)])
                row = [p / s[c] - (1 - self.b) * self.U[c] for p in g]
                self.U[c] += mean(row)
                rows.append(row)
            dx.append(rows)
        return dx


def batch_channel_norm(u: Batch, groups: int, gamma: list[float], beta: list[float], eps: float) -> Batch:
    """The second stage of arXiv 1903.10520: groups of channels of each sample, gain and shift per group."""
    y: Batch = []
    for sample in u:
        size, rows = len(sample) // groups, []
        for p in range(groups):
            part = sample[p * size : (p + 1) * size]
            values = [value for row in part for value in row]
            m, s = mean(values), math.sqrt(var(values) + eps)
            rows += [[gamma[p] * (value - m) / s + beta[p] for value in row] for row in part]
        y.append(rows)
    return y


def instance_norm(x: Batch, gamma: list[float], beta: list[float], eps: float) -> Batch:
    return [
        [
            [gamma[c] * (p - mean(row)) / math.sqrt(var(row) + eps) + beta[c] for p in row]
            for c, row in enumerate(sample)
        ]
        for sample in x
    ]


def prms_norm(token: list[float], k: int, gamma: list[float], beta: list[float], eps: float) -> list[float]:
    """arXiv 1910.07467 with the eps of its code."""
    rms = math.sqrt(sum(v**2 for v in token[:k])) / math.sqrt(k)
    return [g * v / (rms + eps) + b for v, g, b in zip(token, gamma, beta, strict=True)]


def scale_norm(token: list[float], g: float, eps: float) -> list[float]:
    """arXiv 1910.05895."""
    return [g * v / max(math.sqrt(sum(w**2 for w in token)), eps) for v in token]


def qk_attention(q: list[list[float]], k: list[list[float]], g: float) -> list[list[float]]:
    """The attention weights of arXiv 2010.04245."""
    unit = [[[v / math.sqrt(sum(w**2 for w in row)) for v in row] for row in rows] for rows in (q, k)]
    logits = [[g * sum(a * b for a, b in zip(row, col, strict=True)) for col in unit[1]] for row in unit[0]]
    sums = [sum(math.exp(v) for v in row) for row in logits]
    return [[math.exp(v) / total for v in row] for row, total in zip(logits, sums, strict=True)]


def gdn(x: Batch, beta: list[float], gamma: list[list[float]], *, inverse: bool) -> Batch:
    """arXiv 1511.06281 with its exponents at 2 and 1/2."""
    y: Batch = []
    for sample in x:
        C, P = range(len(sample)), range(len(sample[0]))
        root = [[math.sqrt(beta[i] + sum(gamma[i][j] * sample[j][p] ** 2 for j in C)) for p in P] for i in C]
        y.append([[sample[i][p] * root[i][p] if inverse else sample[i][p] / root[i][p] for p in P] for i in C])
    return y


def region_norm(x: Batch, mask: list[list[float]], eps: float) -> Batch:
    """``x_hat`` of arXiv 1911.10375; the mask is a list of N samples of P positions."""
    N, C, P = range(len(x)), range(len(x[0])), range(len(mask[0]))
    total = [[[0.0 for _ in P] for _ in C] for _ in N]
    for region in (1.0, 0.0):
        inside = [[float(mask[n][p] == region) for p in P] for n in N]
        count = sum(sum(row) for row in inside)
        for c in C:
            mu = sum(x[n][c][p] * inside[n][p] for n in N for p in P) / (count or 1)
            filled = [[x[n][c][p] if inside[n][p] else mu for p in P] for n in N]
            values = [value for row in filled for value in row]
            m, s = mean(values), math.sqrt(var(values) + eps)
            for n in N:
                for p in P:
                    total[n][c][p] += (filled[n][p] - m) / s * math.sqrt((count or 1) / len(values))
    return total


def weight_standardization(row: list[float], variant: str) -> list[float]:
    """arXiv 1903.10520, one output; unbiased but for timm."""
    m, n = mean(row), len(row)
    unbiased = sum((w - m) ** 2 for w in row) / (n - 1)
    roots = {
        "reference": math.sqrt(unbiased) + 1e-5,
        "bcn": math.sqrt(unbiased + 1e-5),
        "timm": math.sqrt(var(row) + 1e-6),
    }
    return [(w - m) / roots[variant] for w in row]


def scaled_weight_standardization(row: list[float], gain: float, gamma: float, variant: str) -> list[float]:
    """arXiv 2101.08692, one output."""
    m, n = mean(row), len(row)
    if variant == "deepmind":
        return [(w - m) * gain * gamma / math.sqrt(max(var(row) * n, 1e-4)) for w in row]
    return [(w - m) * gain * gamma / math.sqrt(n) / math.sqrt(var(row) + 1e-6) for w in row]
