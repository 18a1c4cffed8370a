"""The blocks of a model with swapped norms: where they are, what they return, how far that is from the original."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import norms
from normfuse.calibration import Batch, Enough
from normfuse.outputs import arguments, flatten


def outputs_of(model: nn.Module, name: str, batch: Batch, calls: int | None, *, grad: bool) -> list[Any]:
    """Return what the first calls of a block return; gradients reach no further back than the block."""
    block, results = model.get_submodule(name), []

    def enter(*_: Any) -> None:
        torch.set_grad_enabled(grad)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        torch.set_grad_enabled(False)
        results.append(output)
        if calls is not None and len(results) >= calls:
            raise Enough

    handles = [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    args, kwargs = arguments(batch.inputs)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return results


def float_pairs(wanted: Any, found: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the floating-point tensors that stand at the same place of two outputs."""
    others = dict(flatten(found))
    for name, value in flatten(wanted):
        other = others.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.is_floating_point():
            yield value, other


def distance(wanted: Tensor, found: Tensor, padding: Tensor | None) -> Tensor:
    """Return the mean squared difference over the variance of what is wanted, padding left out."""
    if padding is not None and wanted.shape[:2] == padding.shape:
        wanted, found = wanted[~padding], found[~padding]
    spread = wanted.var(correction=0).clamp(min=torch.finfo(wanted.dtype).tiny)
    return (found - wanted).square().mean() / spread


def find_blocks(original: nn.Module, swapped: nn.Module, globs: Sequence[str] | None) -> list[str]:
    """Return the names of the blocks to fit, in the order of the model.

    Args:
        original: The model before its norms were swapped.
        swapped: The model after.
        globs: Names; by default the innermost children of a ``ModuleList`` or ``Sequential`` with a swapped norm.

    Raises:
        ValueError: No norm was swapped, or no module has such a name.
    """
    before = {name: type(module) for name, module in original.named_modules()}
    new = [n for n, m in swapped.named_modules() if norms.is_norm(m) and type(m) is not before.get(n)]
    if not new:
        raise ValueError("no norm of this model was swapped: normfuse.swap_norms does that")
    names = [name for name, _ in swapped.named_modules() if name]
    if globs is not None:
        found = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
        if not found:
            raise ValueError(f"no module of the model is called {' or '.join(globs)}")
        return found
    holders = [name for name in names if any(norm.startswith(f"{name}.") for norm in new)]
    children = [name for name in holders if _is_block(name, swapped)]
    return [name for name in children if not any(other.startswith(f"{name}.") for other in children)]


def _is_block(name: str, model: nn.Module) -> bool:
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    called = not isinstance(module, nn.ModuleList | nn.ModuleDict) and not norms.is_norm(module)
    return called and isinstance(parent, nn.ModuleList | nn.Sequential)
