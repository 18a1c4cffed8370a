"""The adaptation methods as their equations say, one norm at a time, with loops and no shared code."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def norm(x: Tensor, mean: Tensor, var: Tensor, layer: nn.Module) -> Tensor:
    """Return gamma (x - mean) / sqrt(var + eps) + beta for ``(N, C, *)``; statistics ``(C,)`` or ``(N, C)``."""
    rows = []
    for b in range(x.shape[0]):
        m, v = (mean, var) if mean.dim() == 1 else (mean[b], var[b])
        shape = (-1, *[1] * (x.dim() - 2))
        z = (x[b] - m.reshape(shape)) / torch.sqrt(v.reshape(shape) + layer.eps)
        rows.append(layer.weight.reshape(shape) * z + layer.bias.reshape(shape))
    return torch.stack(rows)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    axes = [0, *range(2, x.dim())]
    mean = x.mean(axes)
    return mean, x.square().mean(axes) - mean**2


class Alpha:
    """mu = (1 - w) mu_hat + w mu_B; var likewise."""

    def __init__(self, layer: nn.Module, weight: float) -> None:
        self.layer, self.weight = layer, weight

    def __call__(self, x: Tensor) -> Tensor:
        mean, var = batch_moments(x)
        w = self.weight
        mean = (1 - w) * self.layer.running_mean + w * mean
        var = (1 - w) * self.layer.running_var + w * var
        return norm(x, mean, var, self.layer)


class UnMix:
    """The equations of arXiv 2401.08328, component by component and sample by sample."""

    def __init__(self, layer: nn.Module, noise: Tensor, batch_max: int) -> None:
        self.layer, self.batch_max = layer, batch_max
        k = len(noise)
        a0 = 0.5 if k > 1 else 0.0
        deviation = math.sqrt(a0 * k / (k - 1)) * layer.running_var.sqrt() if k > 1 else 0.0
        self.means = [layer.running_mean + deviation * xi for xi in noise]
        self.vars = [(1 - a0) * layer.running_var for _ in noise]

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return norm(x, self.layer.running_mean, self.layer.running_var, self.layer)
        count, parts = x.shape[0], range(len(self.means))
        center, spread, shares, each = [], [], [], []
        for b in range(count):
            mean = x[b].mean((1, 2))
            var = x[b].square().mean((1, 2)) - mean**2
            cosine = [mean @ m / (mean.norm() * m.norm()) for m in self.means]
            total = sum(torch.exp(c / 0.07) for c in cosine)
            p = [torch.exp(c / 0.07) / total for c in cosine]
            m_k = [(1 - p[k]) * self.means[k] + p[k] * mean for k in parts]
            s_k = [(1 - p[k]) * self.vars[k] + p[k] * var for k in parts]
            center.append(sum(m_k) / len(m_k))
            spread.append(sum(s_k) / len(s_k) + sum(m**2 for m in m_k) / len(m_k) - center[-1] ** 2)
            shares.append(p)
            each.append((mean, var))
        rho = 1 - (1 - self.layer.momentum) ** (count / self.batch_max)
        for k in parts:
            step = [sum(shares[b][k] * (each[b][i] - old[k]) for b in range(count)) / count
                    for i, old in ((0, self.means), (1, self.vars))]  # fmt: skip
            self.means[k] = self.means[k] + rho * step[0].detach()
            self.vars[k] = self.vars[k] + rho * step[1].detach()
        return norm(x, torch.stack(center), torch.stack(spread), self.layer)


class Balanced:
    """The equations of arXiv 2310.08855."""

    def __init__(self, layer: nn.Module, logits: Tensor, kappa: float) -> None:
        self.layer, self.logits, self.kappa = layer, logits, kappa
        self.mean, self.var = layer.running_mean.clone(), layer.running_var.clone()
        self.eta = 0.0
        self.penalty: Any = None

    def __call__(self, x: Tensor, tasks: Tensor | None, seen: int) -> Tensor:
        if tasks is None or seen == 1:
            mean, var = batch_moments(x)
        else:
            n = [int((tasks == j).sum()) for j in range(seen)]
            e = [self.logits[j].exp() for j in range(seen)]
            w = [(e[j] + n[j]) / (sum(e) + sum(n)) for j in range(seen)]
            weight = [w[int(t)] / n[int(t)] for t in tasks]
            space = tuple(range(1, x.dim() - 1))
            over = (lambda v: v.mean(space)) if space else (lambda v: v)
            mean = sum(weight[i] * over(x[i]) for i in range(len(x)))
            var = sum(weight[i] * over((x[i] - mean.reshape(-1, *[1] * len(space))) ** 2) for i in range(len(x)))
        m = self.layer.momentum
        self.eta = self.eta / (self.eta + (1 - m) ** self.kappa) if self.eta else m**self.kappa
        self.mean = self.mean + self.eta * (mean.detach() - self.mean)
        self.var = (1 - self.eta) * self.var + self.eta * var.detach()
        self.penalty = (mean - self.mean).square().mean() + (var - self.var).square().mean()
        return norm(x, mean, var, self.layer)


class Decaying:
    """The reconstruction of arXiv 2106.12497."""

    def __init__(self, layer: nn.Module, initial: float, decay: float) -> None:
        self.layer, self.initial, self.decay, self.k = layer, initial, decay, 0
        self.mean, self.var = layer.running_mean.clone(), layer.running_var.clone()
        self.start = self.mean.clone(), self.var.clone(), layer.weight.detach().clone(), layer.bias.detach().clone()
        self.penalty: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        mean, var = batch_moments(x)
        mean_0, var_0, gain_0, shift_0 = self.start
        eps = self.layer.eps
        d = (mean_0 / torch.sqrt(var_0 + eps) - mean / torch.sqrt(var + eps)).abs().detach()
        w = 1 / (1 + d)
        w = w / w.sum() * len(w)
        self.penalty = (w * (self.layer.weight - gain_0).abs()).mean() + (w * (self.layer.bias - shift_0).abs()).mean()
        eta = self.initial * math.exp(-self.decay * self.k)
        self.k += 1
        self.mean, self.var = (1 - eta) * mean + eta * self.mean, (1 - eta) * var + eta * self.var
        return norm(x, self.mean, self.var, self.layer)


def run(model: nn.Sequential, make: Callable[[nn.Module], Any]) -> tuple[Callable[..., Tensor], list[Any]]:
    """Return a sequence as a function, with each BatchNorm replaced by what ``make`` returns for a copy of it."""
    model = copy.deepcopy(model)
    is_norm = [isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model]
    made = [make(module) if found else module for module, found in zip(model, is_norm, strict=True)]

    def forward(x: Tensor, *args: Any) -> Tensor:
        for module, found in zip(made, is_norm, strict=True):
            x = module(x, *args) if found else module(x)
        return x

    return forward, [module for module, found in zip(made, is_norm, strict=True) if found]


def sar_steps(
    forward: Callable[[Tensor], Tensor],
    parameters: list[Tensor],
    batches: list[Tensor],
    *,
    margin: float,
    radius: float,
    reset_below: float,
    lr: float,
    momentum: float,
) -> tuple[list[Tensor], list[float | None], int]:
    """Return the logits and moving averages of SAR (arXiv 2302.12400) over a stream, and how often it was reset."""
    start = [p.detach().clone() for p in parameters]
    velocity: list[Tensor | None] = [None for _ in parameters]
    average: float | None = None
    logits, averages, resets = [], [], 0

    def losses(x: Tensor) -> tuple[Tensor, Tensor]:
        out = forward(x)
        q = torch.softmax(out, 1)
        return out, -(q * torch.log(q)).sum(1)

    for x in batches:
        out, h = losses(x)
        s1 = [i for i in range(len(x)) if h[i] < margin]
        loss = sum(h[i] for i in s1) / len(s1) if s1 else 0.0 * h.sum()
        g = torch.autograd.grad(loss, parameters)
        size = math.sqrt(sum(float(t.square().sum()) for t in g))
        saved = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, t in zip(parameters, g, strict=True):
                p += radius * t / (size + 1e-12)
        _, h2 = losses(x)
        s2 = [i for i in s1 if h2[i] < margin]
        loss = sum(h2[i] for i in s2) / len(s2) if s2 else 0.0 * h2.sum()
        g = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for i, (p, t, old) in enumerate(zip(parameters, g, saved, strict=True)):
                v = velocity[i]
                velocity[i] = t.clone() if v is None else momentum * v + t
                p.copy_(old - lr * velocity[i])
        if s2:
            average = float(loss.detach()) if average is None else 0.9 * average + 0.1 * float(loss.detach())
        logits.append(out.detach())
        averages.append(average)
        if average is not None and average < reset_below:
            with torch.no_grad():
                for p, old in zip(parameters, start, strict=True):
                    p.copy_(old)
            velocity = [None for _ in parameters]
            average, resets = None, resets + 1
    return logits, averages, resets
