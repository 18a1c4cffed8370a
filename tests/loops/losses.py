"""Ways to take a step: what is computed between a batch and the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.loops.sides import Side


def plain(side: Side, x: Tensor, seed: int) -> Tensor:
    return side.values(x, seed).square().mean()


def two_batches(side: Side, x: Tensor, seed: int) -> Tensor:
    return plain(side, x, seed) + plain(side, 0.5 * x, seed + 1)


def reentrant_checkpoint(side: Side, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return checkpoint(side.model, x.clone().requires_grad_(), use_reentrant=True).square().mean()  # type: ignore[union-attr]


def checkpointed(side: Side, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return checkpoint(side.model, x.clone(), use_reentrant=False).square().mean()  # type: ignore[union-attr]


def gradient_penalty(side: Side, x: Tensor, seed: int) -> Tensor:
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    value = side.model(x * 1).square().mean()
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    return value + first.square().mean()


def moved_parameters(side: Side, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    moved = {name: 0.9 * parameter for name, parameter in side.model.named_parameters()}
    return functional_call(side.model, moved, (x.clone(),)).square().mean()


def through_func_grad(side: Side, x: Tensor, seed: int) -> Tensor:
    """By the gradient of torch.func, as a linear loss whose gradient that is; not with backward hooks."""
    if side.handles:
        return plain(side, x, seed)
    named = {name: p.detach() for name, p in side.model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(side.model, parameters, (x.clone(),)).square().mean()

    torch.manual_seed(seed)
    grads = torch.func.grad(loss)(named) if named else {}
    trained = dict(side.model.named_parameters())
    return sum(((g * trained[name]).sum() for name, g in grads.items()), torch.zeros((), dtype=torch.float64))


def counted(side: Side, x: Tensor, seed: int) -> Tensor:
    with FlopCounterMode(display=False):
        return plain(side, x, seed)


def saved_by_hooks(side: Side, x: Tensor, seed: int) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return plain(side, x, seed)


def under_anomaly(side: Side, x: Tensor, seed: int) -> Tensor:
    with torch.autograd.set_detect_anomaly(True):
        return plain(side, x, seed)


LOSSES: dict[str, Callable[[Side, Tensor, int], Tensor]] = {
    function.__name__.replace("_", " "): function
    for function in (
        plain,
        two_batches,
        checkpointed,
        reentrant_checkpoint,
        gradient_penalty,
        moved_parameters,
        through_func_grad,
        counted,
        saved_by_hooks,
        under_anomaly,
    )
}
