"""The core of PowerNorm (arXiv 2003.07845) written out step by step on Python floats, as slowly as it reads.

``x`` and the gradients are lists of S tokens, each a list of C floats.
"""

# ruff: noqa: N803, N806
# The letters are those of the paper.

from __future__ import annotations

import math
from dataclasses import dataclass, field

Rows = list[list[float]]


@dataclass
class LiteralPowerNorm:
    channels: int
    warmup: int = 10000
    momentum: float = 0.9
    eps: float = 1e-5

    t: int = 0
    phi_hat: list[float] = field(default_factory=list)
    Lambda: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.phi_hat = [1.0] * self.channels
        self.Lambda = [0.0] * self.channels

    def forward(self, x: Rows, gamma: list[float], beta: list[float]) -> Rows:
        self.t += 1
        C, t = range(self.channels), self.t
        phi_t = [sum(token[c] ** 2 for token in x) / len(x) for c in C]
        phi = phi_t if t <= self.warmup else list(self.phi_hat)
        z = [[token[c] / math.sqrt(phi[c] + self.eps) for c in C] for token in x]
        for c in C:
            if t < self.warmup:
                self.phi_hat[c] = self.phi_hat[c] * (t - 1) / t + phi_t[c] / t
            self.phi_hat[c] = self.momentum * self.phi_hat[c] + (1 - self.momentum) * phi_t[c]
        self.saved = (z, phi_t, list(gamma))
        return [[gamma[c] * token[c] + beta[c] for c in C] for token in z]

    def backward(self, G: Rows) -> tuple[Rows, list[float], list[float]]:
        """Return the gradients of x, gamma and beta."""
        z, phi_t, gamma = self.saved
        C, S = range(self.channels), range(len(G))
        h = [[G[s][c] * gamma[c] - (1 - self.momentum) * self.Lambda[c] * z[s][c] for c in C] for s in S]
        for c in C:
            self.Lambda[c] += sum(h[s][c] * z[s][c] for s in S) / len(G)
        dx = [[h[s][c] / math.sqrt(phi_t[c] + self.eps) for c in C] for s in S]
        dgamma = [sum(G[s][c] * z[s][c] for s in S) for c in C]
        dbeta = [sum(G[s][c] for s in S) for c in C]
        return dx, dgamma, dbeta
