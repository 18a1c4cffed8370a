"""One of several processes that train norms with synchronised statistics, each on its share of every batch.

Usage: python -m tests.layers.synchronized_worker RANK PROCESSES RENDEZVOUS OUTPUT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normfuse import layers

STEPS = 12
SHARES = (slice(0, 2), slice(2, 5))
"""Which sequences of the batch belong to which process: unequal numbers."""


def make(name: str, process_group: Any = None) -> nn.Module:
    """Return the norm under test, past its warm-up after a few steps."""
    options: dict[str, Any] = {"warmup_steps": 4, "dtype": torch.float64, "process_group": process_group}
    if name == "UnifiedNorm":
        options |= {"window": 2, "scaling_start": 5, "outlier_filtration": True}
    norm = getattr(layers, name)(3, **options)
    nn.init.uniform_(norm.weight, -1, 1, generator=torch.Generator().manual_seed(1))
    return norm


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x`` and the gradient of the output, ``(5, 4, 3)``, and the padding mask, ``(5, 4)``, of one step."""
    generator = torch.Generator().manual_seed(step)
    x, grad = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([4, 1, 3, 2, 4])
    return x * (30 if step == 9 else 1), grad, torch.arange(4) >= lengths[:, None]


def train(norm: nn.Module, share: slice) -> dict[str, Any]:
    """Return what training on a share of every batch gives."""
    outputs, x_grads = [], []
    for step in range(STEPS):
        x, grad, mask = (values[share] for values in batch(step))
        x.requires_grad_()
        y = norm(x, mask)
        y.backward(grad)
        outputs.append(y.detach())
        x_grads.append(x.grad)
    grads = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return {"outputs": outputs, "x_grads": x_grads, "grads": grads, "buffers": dict(norm.named_buffers())}


def main(rank: str, processes: str, rendezvous: str, output: str) -> None:
    """Train and save the result."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(processes))
    groups = {"world": "world", "group": dist.new_group(list(range(int(processes))))}
    share = SHARES[int(rank)]
    trained = {
        name: {key: train(make(name, group), share) for key, group in groups.items()}
        for name in ("UnifiedNorm", "PowerNorm")
    }
    torch.save(trained, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
