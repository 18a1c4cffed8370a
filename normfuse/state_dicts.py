"""State dicts as they are found in files, and how to put one into a model strictly.

Training scripts nest the state dict in a checkpoint (under ``state_dict``, ``model``, ``ema``) and wrappers prefix its
keys (``module.``, ``_orig_mod.``). Both are undone here, and said. A folded model lacks some tensors of its
architecture and has others (a convolution gains a bias); :func:`fit` creates and removes them by name before the strict
load.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import LoadError

StateDict = Mapping[str, Any]

NESTS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "ema", "net", "module")
PREFIXES = ("module.", "_orig_mod.")
NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def unnest(checkpoint: Mapping[str, Any], path: object, notes: list[str]) -> nn.Module | StateDict:
    """Return the model or the state dict in a checkpoint; what was chosen is added to ``notes``.

    Raises:
        LoadError: It holds neither.
    """
    if is_state_dict(checkpoint):
        return checkpoint
    for key in NESTS:
        inner = checkpoint.get(key)
        if isinstance(inner, nn.Module) or (isinstance(inner, Mapping) and is_state_dict(inner)):
            others = [other for other in NESTS if other != key and checkpoint.get(other) is not None]
            notes.append(f"used the entry {key!r}" + (f", not {', '.join(map(repr, others))}" if others else ""))
            return inner
    held = ", ".join(map(str, list(checkpoint)[:5])) or "nothing"
    raise LoadError(f"{path}: no state_dict in it; it holds {held}")


def is_state_dict(value: Mapping[str, Any]) -> bool:
    """Whether a mapping goes from names to tensors; extra state, which modules may add, is allowed beside them."""
    named = [key for key in value if isinstance(key, str) and not key.endswith("_extra_state")]
    return len(value) > 0 and bool(named) and all(isinstance(value[key], Tensor) for key in named)


def strip_prefixes(state: StateDict, keys: Collection[str], notes: list[str]) -> StateDict:
    """Return the state dict without the prefix that a wrapper gave to every key, unless the model has it too."""
    for prefix in PREFIXES * 2:
        if state and all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in keys):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            notes.append(f"stripped the prefix {prefix!r} from every key")
    return state


def load_strictly(model: nn.Module, state: StateDict, path: object) -> None:
    """Load a state dict into the architecture it was saved from.

    Raises:
        LoadError: Keys or shapes differ; the text says so if the file holds a folded model.
    """
    own = model.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if looks_folded(missing, unexpected):
        raise LoadError(
            f"{path}: this checkpoint is folded ({_some(missing)} missing, {_some(unexpected)} added) and carries no "
            "manifest: use normfuse.load on the file that normfuse.save wrote, or the unfolded checkpoint"
        )
    if missing or unexpected:
        raise LoadError(
            f"{path} does not fit the architecture: {len(missing)} keys missing ({_some(missing)}), "
            f"{len(unexpected)} unexpected ({_some(unexpected)})"
        )
    copy_in(model, state, path)


def looks_folded(missing: Iterable[str], unexpected: Iterable[str]) -> bool:
    """Whether norms vanished (their statistics are missing) and nothing but biases came instead."""
    statistics = any(key.rpartition(".")[2] in NORM_STATISTICS for key in missing)
    return statistics and all(key.rpartition(".")[2] == "bias" for key in unexpected)


def copy_in(model: nn.Module, state: StateDict, path: object) -> None:
    """Copy a state dict with exactly the model's keys into it; the tensors of the model take the saved dtypes.

    Parameters that the model ties but the file holds with different values are separated first.

    Raises:
        LoadError: A shape differs.
    """
    _untie(model, state)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and isinstance(state[key], Tensor) and tensor.dtype != state[key].dtype:
            tensor.data = tensor.data.to(state[key].dtype)
    try:
        model.load_state_dict(dict(state), strict=True)
    except (RuntimeError, TypeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise LoadError(f"{path} does not fit the architecture: {(lines[1:] or lines)[0]}") from error


def fit(model: nn.Module, state: StateDict, buffers: Collection[str], path: object) -> None:
    """Create and remove parameters and buffers so that the model has the keys of a folded state dict.

    Args:
        model: The architecture, with the structure of the folded model.
        state: The saved tensors.
        buffers: Those of its keys that are buffers.
        path: The file, for errors.

    Raises:
        LoadError: A key belongs to a module that the model does not have.
    """
    own = model.state_dict()
    for key in own.keys() - state.keys():
        owner, name = owner_of(model, key, path)
        (owner._buffers if name in owner._buffers else owner._parameters)[name] = None
    for key in state.keys() - own.keys():
        owner, name = owner_of(model, key, path)
        new = torch.empty_like(state[key])
        if key in buffers:
            owner.register_buffer(name, new)
        else:
            owner.register_parameter(name, nn.Parameter(new, requires_grad=new.is_floating_point()))


def owner_of(model: nn.Module, key: str, path: object) -> tuple[nn.Module, str]:
    """Return the module that a key of a state dict belongs to, and the name of the tensor in it.

    Raises:
        LoadError: There is no such module.
    """
    parent, _, name = key.rpartition(".")
    try:
        return model.get_submodule(parent), name
    except AttributeError as error:
        raise LoadError(f"{path} does not fit the architecture: it has no module {parent!r} for {key!r}") from error


def _untie(model: nn.Module, state: StateDict) -> None:
    """Give a key a parameter of its own where the model ties it to another key whose saved value differs."""
    first: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        source = first.setdefault(id(tensor), key)
        if isinstance(tensor, nn.Parameter) and source != key and not _same(state[source], state[key]):
            parent, _, name = key.rpartition(".")
            untied = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            model.get_submodule(parent)._parameters[name] = untied


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "") if keys else "none"
