"""Count the norms of a network without any help from the library under test.

Three counts: the norm modules by name, the evaluations of a batch norm on stored statistics in one run (seen below the
dispatcher, so modules, functional calls and exported graphs all count alike), and the norms whose input is the very
tensor that a convolution or linear layer returned, both called once.
"""

from __future__ import annotations

import collections
import hashlib
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_calibrate import has_statistics
from zoo_outputs import call

_TORCH_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NAMED_NORM = re.compile(r"(Batch|Layer|Group|Instance|RMS|Rms|Simple)Norm")


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the normalization layers by qualified name: torch's classes, and leaves that are named after a norm."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _TORCH_NORMS) or _is_norm_by_name(m)}


def batch_norms(model: nn.Module) -> set[str]:
    """Return the names of the norms whose inference form is a fixed affine map: those with stored statistics."""
    return {name for name, module in norm_modules(model).items() if has_statistics(module)}


def fingerprint(model: nn.Module) -> str:
    """Return a digest of everything that must not change in the user's model: names, classes, modes, every bit."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__} {module.training}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *model.state_dict().items()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _BatchNormCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        on_stored = name in ("native_batch_norm", "cudnn_batch_norm") and not args[5] and args[3] is not None
        self.calls += on_stored or name == "_native_batch_norm_legit_no_training"
        return func(*args, **(kwargs or {}))


def evaluations(model: nn.Module, inputs: Any) -> int:
    """Return how many batch norms on stored statistics one run evaluates, ``FrozenBatchNorm`` modules included."""
    with _BatchNormCounter() as counter:
        return frozen_evaluations(model, inputs) + counter.calls


def frozen_evaluations(model: nn.Module, inputs: Any) -> int:
    """Return how many ``FrozenBatchNorm`` modules one run calls: they multiply and add, so no operator shows them."""
    calls: list[nn.Module] = []
    frozen = [m for m in model.modules() if has_statistics(m) and type(m).__name__.startswith("Frozen")]
    handles = [m.register_forward_hook(lambda module, _args, _out: calls.append(module)) for m in frozen]
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return len(calls)


def adjacent(model: nn.Module, inputs: Any) -> set[str]:
    """Return the norms called once on the very tensor that a convolution or linear layer, called once, returned."""
    made_by: dict[int, tuple[Tensor, nn.Module]] = {}
    calls: collections.Counter[nn.Module] = collections.Counter()
    fed: dict[str, nn.Module] = {}

    def made(module: nn.Module, _args: Any, output: Any) -> None:
        calls[module] += 1
        if isinstance(module, _ConvNd) or output.dim() == 2:
            made_by[id(output)] = (output, module)

    def taken(name: str) -> Any:
        def take(module: nn.Module, args: Any) -> None:
            calls[module] += 1
            if id(args[0]) in made_by:
                fed[name] = made_by[id(args[0])][1]

        return take

    handles = [m.register_forward_hook(made) for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear))]
    norms = {name: m for name, m in norm_modules(model).items() if has_statistics(m)}
    handles += [m.register_forward_pre_hook(taken(name)) for name, m in norms.items()]
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, layer in fed.items() if calls[norms[name]] == 1 and calls[layer] == 1}


def _is_norm_by_name(module: nn.Module) -> bool:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    below = sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in module.parameters(recurse=False))
    return bool(own) and below == 0 and bool(_NAMED_NORM.search(type(module).__name__))
