"""Modules that were scripted or traced to TorchScript: their code can be neither read nor changed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from normfuse.errors import CaptureError
from normfuse.norm_classes import is_norm_name

REMEDY = "pass a model built with the Python module that it was made from"


def require_python(model: nn.Module) -> None:
    """Refuse a model that is TorchScript as a whole.

    Raises:
        CaptureError: It is.
    """
    if isinstance(model, torch.jit.ScriptModule):
        text = f"the model is TorchScript, made from {class_of(model)}, whose code can be neither read nor changed"
        raise CaptureError(f"{text}: pass the Python module that it was made from")


def parts(model: nn.Module) -> list[str]:
    """Return the names of the parts of a model that are TorchScript, without the parts of these."""
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    return [name for name in scripted if not any(name.startswith(f"{outer}.") for outer in scripted)]


def norms_in(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield ``(name, class, part)`` of the normalization layers inside of the TorchScript parts of a model."""
    for part in parts(model):
        for name, module in model.get_submodule(part).named_modules(prefix=part):
            if is_norm_name(class_of(module)):
                yield name, class_of(module), part


def class_of(module: nn.Module) -> str:
    """Return the name of the class that a TorchScript module was made from."""
    return str(getattr(module, "original_name", type(module).__name__))
