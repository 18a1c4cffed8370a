"""Unified Normalization (arXiv 2208.01313) written out step by step on Python floats, as slowly as it reads.

``x`` and the gradients are lists of S tokens, each a list of C floats.
"""

# ruff: noqa: N803, N806, SIM108
# The letters and the branches are those of the paper.

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

Rows = list[list[float]]


@dataclass
class LiteralUnifiedNorm:
    channels: int
    window: int = 4
    warmup: int = 4000
    momentum: float = 0.9
    eps: float = 1e-5
    filtration: bool = False
    start: int = 1000

    t: int = 0
    skipped: int = 0
    nu_hat: list[float] = field(default_factory=list)
    psi: list[float] = field(default_factory=list)
    F: Rows = field(default_factory=list)
    Q: Rows = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nu_hat = [1.0] * self.channels
        self.psi = [0.0] * self.channels
        self.F = [[0.0] * self.channels for _ in range(self.window)]
        self.Q = [[0.0] * self.channels for _ in range(self.window)]

    def forward(self, x: Rows, gamma: list[float], beta: list[float]) -> Rows:
        self.t += 1
        C = range(self.channels)
        nu_t = [sum(token[c] ** 2 for token in x) / len(x) for c in C]
        roots = [math.sqrt(entry) for row in self.F for entry in row]
        V = statistics.variance(roots) if len(roots) > 1 else math.nan
        slot = self.t % self.window
        self.F[slot] = list(nu_t)
        skip = self.window <= 1
        if self.t >= self.warmup and self.filtration and self.window > 1:
            exceeds = False
            for c in C:
                am = sum(row[c] for row in self.F) / self.window
                if am - self.geometric_mean(c) > self.window * V:
                    exceeds = True
            if exceeds:
                self.F[slot] = list(self.nu_hat)
                skip = True
                self.skipped += 1
        if self.t <= self.window or self.t < self.warmup or skip:
            nu = nu_t
        else:
            nu = [self.geometric_mean(c) for c in C]
        if self.t <= max(self.start, self.warmup) or skip:
            r = [1.0 for _ in C]
        else:
            r = [math.sqrt(nu[c] + self.eps) / math.sqrt(self.nu_hat[c] + self.eps) for c in C]
            r = [min(max(value, 1 / 5), 5.0) for value in r]
        z = [[token[c] / math.sqrt(nu[c] + self.eps) for c in C] for token in x]
        for c in C:
            self.nu_hat[c] = self.momentum * self.nu_hat[c] + (1 - self.momentum) * nu[c]
        self.saved = (z, nu, r, skip, list(gamma))
        return [[gamma[c] * token[c] + beta[c] for c in C] for token in z]

    def geometric_mean(self, c: int) -> float:
        if any(row[c] == 0 for row in self.F):
            return 0.0
        return math.exp(sum(math.log(row[c]) for row in self.F) / self.window)

    def backward(self, G: Rows) -> tuple[Rows, list[float], list[float]]:
        """Return the gradients of x, gamma and beta."""
        z, nu, r, skip, gamma = self.saved
        C, S = range(self.channels), range(len(G))
        g = [[G[s][c] * gamma[c] * r[c] for c in C] for s in S]
        q = [sum(g[s][c] * z[s][c] for s in S) / len(G) for c in C]
        self.Q[self.t % self.window] = list(self.psi) if skip else list(q)
        if self.t <= self.window or self.t < self.warmup or skip:
            q_bar = q
        else:
            q_bar = [sum(row[c] for row in self.Q) / self.window for c in C]
        for c in C:
            self.psi[c] = self.momentum * self.psi[c] + (1 - self.momentum) * q_bar[c]
        pull = q_bar if skip else self.psi
        dx = [[(g[s][c] - pull[c] * z[s][c]) / math.sqrt(nu[c] + self.eps) for c in C] for s in S]
        dgamma = [sum(G[s][c] * r[c] * z[s][c] for s in S) for c in C]
        dbeta = [sum(G[s][c] for s in S) for c in C]
        return dx, dgamma, dbeta
