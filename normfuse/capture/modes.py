"""Put a model in eval mode for a moment, and look through wrappers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy


def eval_mode(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Run a block with every module of ``model`` in eval mode; each gets its own mode back afterwards."""
    return in_mode(model, training=False)


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a block with every module of ``model`` in one mode, norms with running statistics always in eval mode.

    Each gets its own mode back afterwards. The flag is set directly: a class may override ``train`` to do more.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = training and not isinstance(module, _NormBase)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Run a block that leaves the buffers of ``model`` and the random number generators of the CPU as they were.

    In training mode a module may update what it stores, or draw numbers, even while it is only traced.
    """
    kept = [(buffer, _version(buffer), buffer.clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
        for buffer, version, value in kept:
            if version is None or _version(buffer) != version:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)


def _version(tensor: torch.Tensor) -> int | None:
    """Return how often a tensor was written to; None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's model inside DDP, DataParallel and ``torch.compile`` wrappers, in any nesting."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule) if "_orig_mod" in model._modules else False:
            model = model.get_submodule("_orig_mod")
        else:
            return model
