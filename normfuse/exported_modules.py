"""Exported programs as modules that can be read and edited: with layers, and with the mode that is baked in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from normfuse import exported_layers
from normfuse.errors import DeployedModelError

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class BakedMode:
    """Stands in for ``train`` on the module of an exported program: ``eval()`` works, ``train()`` raises."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        """Do nothing for eval mode.

        Raises:
            DeployedModelError: Training was asked for.
        """
        if mode:
            raise DeployedModelError("an ExportedProgram has its mode baked in; train the python model it came from")
        return self.module


def is_exported(model: Any) -> bool:
    """Whether something is an exported program; its class is not imported, which takes a second."""
    return type(model).__module__ == "torch.export.exported_program" and type(model).__name__ == "ExportedProgram"


def as_module(program: ExportedProgram) -> nn.Module:
    """Return a program as a module with the layers it was exported from, on the same tensors.

    Its ``eval()`` works, where torch's own raises.
    """
    module = program.module()
    exported_layers.restore(module)
    for part in module.modules():
        part.training = False
    vars(module).pop("eval", None)
    vars(module)["train"] = BakedMode(module)
    return module
