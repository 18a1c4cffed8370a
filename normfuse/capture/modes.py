"""Put a model in eval mode for a moment, and look through wrappers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a block with every module of ``model`` in eval mode; each gets its own mode back afterwards.

    The flag is set directly: a class may override ``train`` to do more than that.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's model inside DDP, DataParallel and ``torch.compile`` wrappers, in any nesting."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule) if "_orig_mod" in model._modules else False:
            model = model.get_submodule("_orig_mod")
        else:
            return model
