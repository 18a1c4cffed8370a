"""One of several processes that fine-tune a model in Tune mode, replicated (DDP) or sharded (FSDP2), each on its share.

Usage: python -m torch.distributed.run --nproc-per-node 2 -m tests.tune_mode_worker OUTPUT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import normfuse
from tests.gradients import hard_norms

SHARE = 3  # samples of each process


class Block(nn.Module):
    """A convolution and its norm, which have to lie in one unit; and a norm that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.alone = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alone(self.bn(self.conv(x)).tanh())


def network() -> nn.Sequential:
    """Return the model under test, not in Tune mode."""
    torch.manual_seed(0)
    pool = (nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Block(), Block(), *pool, nn.Linear(16, 4))
    return hard_norms(model.double().eval())  # type: ignore[return-value]


def batch(step: int) -> Tensor:
    """Return the samples of all processes in one step."""
    return torch.randn(2 * SHARE, 4, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(model: nn.Module, share: slice) -> dict[str, Any]:
    """Return the gradients of the first of two steps, and the state and outputs after them; all tensors whole."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    first: dict[str, Tensor] = {}
    for step in range(2):
        optimizer.zero_grad()
        model(batch(step)[share]).square().sum(1).mean().backward()
        first = first or {plain(name): whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
    with torch.no_grad():
        outputs = [model(batch(2)[share]).clone() for _ in range(2)]
    state = {plain(name): whole(value) for name, value in model.state_dict().items()}
    return {"gradients": first, "state": state, "outputs": dict(enumerate(outputs))}


def plain(name: str) -> str:
    return name.removeprefix("module.")


def whole(tensor: Any) -> Tensor:
    """Return a tensor with the parts of all processes, apart from the model."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def replicated(*, before: bool) -> nn.Module:
    """Return the model under DDP, put into Tune mode before or after it is wrapped."""
    model = network()
    if before:
        return DistributedDataParallel(normfuse.tune_mode(model)).train()
    return normfuse.tune_mode(DistributedDataParallel(model)).train()


def sharded() -> nn.Module:
    """Return the model under FSDP2: each block, and the rest, is a unit."""
    model = normfuse.tune_mode(network()).train()
    for block in model:
        if isinstance(block, Block):
            fully_shard(block)
    fully_shard(model)
    return model


def main(output: str) -> None:
    """Train every way and save what the first process has."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    share = slice(rank * SHARE, (rank + 1) * SHARE)
    ways = {"DDP after": replicated(before=True), "DDP before": replicated(before=False), "FSDP2": sharded()}
    results = {name: train(model, share) for name, model in ways.items()}
    if rank == 0:
        torch.save(results, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
