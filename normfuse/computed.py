"""Tensors of a module that are computed from others at every call, and how they become plain ones.

Two kinds: what ``torch.nn.utils.parametrize`` holds, and what the forward pre-hooks of ``torch.nn.utils.weight_norm``,
``spectral_norm`` and ``prune`` assign.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Hook = WeightNorm | SpectralNorm | prune.BasePruningMethod


def makers(module: nn.Module) -> dict[str, str]:
    """Return what computes each computed tensor of a module itself: tensor name to class names."""
    held: Any = module.parametrizations if is_parametrized(module) else {}
    found = {name: "+".join(type(part).__name__.strip("_") for part in held[name]) for name in held}
    return found | {_tensor_name(hook): type(hook).__name__ for hook in _hooks(module)}


def originals(module: nn.Module, name: str) -> tuple[int, ...]:
    """Return the identities of the tensors that a parametrized tensor is computed from; empty for another tensor."""
    held: Any = module.parametrizations if is_parametrized(module, name) else None
    return tuple(id(tensor) for tensor in held[name].parameters(recurse=False)) if held is not None else ()


def make_plain(module: nn.Module, name: str) -> None:
    """Replace a computed tensor of a module by a parameter, or a buffer if that is what it stems from, of its value.

    Raises:
        ValueError: The tensor is not computed.
    """
    if is_parametrized(module, name):
        _remove_parametrizations(module, name)
    else:
        _remove_hook(module, name)
    setattr(module, name, getattr(module, name))  # a recurrent layer keeps a second list of its weights


def _hooks(module: nn.Module) -> list[Hook]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Hook)]


def _tensor_name(hook: Hook) -> str:
    return hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name


def _remove_parametrizations(module: Any, name: str) -> None:
    held = module.parametrizations[name]
    module.__class__ = _duplicate(type(module))
    if held.is_tensor:
        _own(held, "original")
    with torch.enable_grad():  # torch asks whether the value requires a gradient
        remove_parametrizations(module, name, leave_parametrized=True)


def _duplicate(cls: type) -> type:
    """Return a copy of the class that torch made for a parametrized module.

    Copies of the module share the class, and torch deletes from it the property that computes the tensor.
    """
    members = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, cls.__bases__, members)


def _remove_hook(module: nn.Module, name: str) -> None:
    hook = next((hook for hook in _hooks(module) if _tensor_name(hook) == name), None)
    if hook is None:
        raise ValueError(f"{type(module).__name__}.{name} is not computed from other tensors")
    source = getattr(module, f"{name}_g" if isinstance(hook, WeightNorm) else f"{name}_orig")
    if isinstance(hook, prune.BasePruningMethod):
        _own(module, f"{name}_orig")
        prune.remove(module, name)
    else:
        remove = nn.utils.remove_weight_norm if isinstance(hook, WeightNorm) else nn.utils.remove_spectral_norm
        remove(module, name)
        _remove_state_dict_hooks(module, hook)
    getattr(module, name).requires_grad_(source.requires_grad)


def _remove_state_dict_hooks(module: nn.Module, hook: Hook) -> None:
    """Remove what spectral norm hung on saving and loading; torch leaves the second, which it has wrapped."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, held in list(hooks.items()):
            if getattr(getattr(held, "hook", held), "fn", None) is hook:
                del hooks[key]


def _own(module: nn.Module, name: str) -> None:
    """Give a module a copy of a tensor, which others may share, before torch writes into it."""
    old = getattr(module, name)
    new = old.detach().clone()
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
