"""Which tokens of a running call are padding, as the mask arguments of the modules around a norm say it.

A norm reads one tensor, and the mask of its batch stands in the arguments of a module around it. Hooks of those modules
note the masks of each training call while it runs, innermost last. Read as padding, True at padding, are

    attention_mask, (B, T)                                         0 or False; of floats that are added, what is below 0
    key_padding_mask, src_key_padding_mask, tgt_key_padding_mask   True; of floats, which are added, what is below 0

for an ``x`` of tokens ``(B, T)``, or ``(T, B)`` where the sequence comes first. Masks of more axes say which token sees
which, and are passed over. In a compiled graph nothing is noted: pass ``padding_mask`` to the norm there.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_TRUE_AT_PADDING = {
    "attention_mask": False,
    "key_padding_mask": True,
    "src_key_padding_mask": True,
    "tgt_key_padding_mask": True,
}


class _Noted(NamedTuple):
    """A mask of a call that is running: True at padding, and the module that it was given to."""

    padding: Tensor
    module: nn.Module


class _Calls(threading.local):
    """The masks of the calls that are running in this thread."""

    def __init__(self) -> None:
        self.stack: list[list[_Noted]] = []


_CALLS = _Calls()


class NotePadding:
    """Forward pre-hook of a module that takes a mask."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the masks of a call in training mode."""
        if not torch.compiler.is_compiling():
            _CALLS.stack.append(_masks(module, args, kwargs) if module.training else [])


class ForgetPadding:
    """Forward hook of the same module, which runs whether the call succeeds or not."""

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        """Forget what the call noted."""
        if not torch.compiler.is_compiling() and _CALLS.stack:
            _CALLS.stack.pop()


def notes_padding(hook: object) -> bool:
    """Whether a hook does nothing but note masks."""
    return isinstance(hook, NotePadding | ForgetPadding)


def note_padding(model: nn.Module) -> None:
    """Let every module of a model that takes a mask note it, once."""
    for module in model.modules():
        if _takes_mask(module) and not any(map(notes_padding, module._forward_pre_hooks.values())):
            module.register_forward_pre_hook(NotePadding(), with_kwargs=True)
            module.register_forward_hook(ForgetPadding(), always_call=True)


def noted_padding(x: Tensor, axis: int) -> Tensor | None:
    """Return the padding of the batch that is running, of the shape of ``x`` without its channel axis; None for none.

    A padded batch whose masks all fit other tokens is warned of.
    """
    tokens = x.shape[:axis] + x.shape[axis + 1 :]
    noted = [each for call in reversed(_CALLS.stack) for each in call]
    for padding, module in noted:
        if padding.shape == tokens and not (padding.shape == padding.T.shape and _sequence_first(module)):
            return padding
        if padding.T.shape == tokens:
            return padding.T
    if any(bool(each.padding.any()) for each in noted):
        warnings.warn(
            "a norm with running statistics reads a padded batch, and no mask around it has the shape of its tokens: "
            "padding is in its statistics; pass padding_mask to it",
            stacklevel=2,
        )
    return None


def _takes_mask(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name in _TRUE_AT_PADDING or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _masks(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[_Noted]:
    signature = inspect.signature(module.forward)
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:  # the call itself says so
        return []
    further = next((p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), "")
    given = {**given.get(further, {}), **given}
    found = ((given.get(name), padded) for name, padded in _TRUE_AT_PADDING.items())
    return [_Noted(_as_padding(m, padded), module) for m, padded in found if isinstance(m, Tensor) and m.dim() == 2]


def _as_padding(mask: Tensor, true_at_padding: bool) -> Tensor:
    if not mask.is_floating_point():
        return mask.bool() if true_at_padding else ~mask.bool()
    added = mask < 0
    return added if true_at_padding else torch.where(added.any(), added, mask == 0)


def _sequence_first(module: nn.Module) -> bool:
    """Whether tokens are ``(T, B)``, where the sizes do not tell it: as attention layers of torch are told."""
    layer = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None)
    return layer is not None and not layer.batch_first
