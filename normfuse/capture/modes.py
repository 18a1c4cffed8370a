"""Put a model in eval mode for a moment, and look through wrappers."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from normfuse.errors import CaptureError
from normfuse.exported_modules import as_module, is_exported
from normfuse.structure import Structure
from normfuse.torchscript import require_python


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
    """Run ``model`` in a block that leaves its attributes and buffers, and the random number generators, as they were.

    A ``forward`` may count its calls, keep a cache, update what it stores or draw numbers, even while it is traced.
    Every such block starts from the same random state, so that two runs of a model draw the same numbers.
    """
    kept = [(buffer, _version(buffer), buffer.clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    before = Structure(model, holders=False)
    try:
        with seeded(model):
            yield
    finally:
        before.put_back()
        for buffer, version, value in kept:
            # the kernel of a batch norm writes to running statistics without counting it
            if version is None or _version(buffer) != version or not torch.equal(buffer, value):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run a block from a seed, and put the generators back: Python's, NumPy's, torch's of the CPU and the model."""
    numpy: Any = sys.modules.get("numpy")
    devices = sorted({tensor.device.index for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda})
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices):
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def _version(tensor: torch.Tensor) -> int | None:
    """Return how often a tensor was written to; None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def readable(model: Any) -> Any:
    """Return a model, or of an exported program a module, new at each call, on the tensors of the program."""
    return as_module(model) if is_exported(model) else model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's model inside DDP, DataParallel and ``torch.compile`` wrappers, in any nesting.

    Raises:
        CaptureError: It is TorchScript, or an exported program, which :func:`readable` makes a module of.
    """
    while True:
        if is_exported(model):
            text = "an ExportedProgram cannot be trained or edited in place: pass the Python module it came from"
            raise CaptureError(f"{text}, or what normfuse.fold makes of it")
        require_python(model)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule) if "_orig_mod" in model._modules else False:
            model = model.get_submodule("_orig_mod")
        else:
            return model
