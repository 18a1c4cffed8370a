"""What tells a folded (Deploy mode) model apart: its manifest, and that it does not go back to training.

Training folded weights is unstable: their gradient lacks the factor that the norm's scale gave it (arXiv 2305.11624).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normfuse.errors import DeployedModelError

MANIFEST = "normfuse_manifest"
TRAINABLE = frozenset(
    {"materialize", "prune-constant", "recalibrate", "swap-unified", "swap-l1", "shiftquant", "shiftquant-off"}
)
"""Passes whose result is made to be trained further."""


class RefuseTraining:
    """Stands in for ``model.train`` on a folded model: ``train(False)`` works, ``train()`` raises."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, mode: bool = True) -> nn.Module:
        """Put the model in eval mode.

        Raises:
            DeployedModelError: Training was asked for.
        """
        if mode and "quantize" in (manifest_of(self.model) or {}).get("passes", ()):
            raise DeployedModelError(
                "this model is quantized: its weights are fixed integers. Train the model it was made from; to train "
                "on integers, quantize that one without calibration data"
            )
        if mode:
            raise DeployedModelError(
                "this model is folded: its norms are gone and training it is unstable. Fine-tune the unfolded model "
                "and fold it afterwards; torch.nn.Module.train(model) overrides this"
            )
        return nn.Module.train(self.model, False)


def guard(model: nn.Module, manifest: dict[str, Any]) -> nn.Module:
    """Attach its manifest to a model and refuse ``.train()``, unless its norms were only swapped. Returns the model."""
    vars(model)[MANIFEST] = manifest
    if not TRAINABLE.issuperset(manifest.get("passes", ("",))):
        vars(model)["train"] = RefuseTraining(model)
    return model


def has_other_keys(manifest: Mapping[str, Any]) -> bool:
    """Whether passes changed what the model holds: its layers, or which of them have a bias."""
    return bool(manifest["edits"]) or set(manifest["keys"]["before"]) != set(manifest["keys"]["after"])


def manifest_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the manifest of a folded model, None for any other."""
    return vars(model).get(MANIFEST)
