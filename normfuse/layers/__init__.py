"""Layers that torch does not ship; the public ones are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normfuse.layers.l1_batch_norm import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d
    from normfuse.layers.l1_layer_norm import L1LayerNorm, L1RMSNorm
    from normfuse.layers.power_norm import PowerNorm
    from normfuse.layers.recomputation import replayed_statistics
    from normfuse.layers.unified_norm import UnifiedNorm

__all__ = [
    "L1BatchNorm1d",
    "L1BatchNorm2d",
    "L1BatchNorm3d",
    "L1LayerNorm",
    "L1RMSNorm",
    "PowerNorm",
    "UnifiedNorm",
    "replayed_statistics",
]

_HOMES = {
    "L1BatchNorm1d": "l1_batch_norm",
    "L1BatchNorm2d": "l1_batch_norm",
    "L1BatchNorm3d": "l1_batch_norm",
    "L1LayerNorm": "l1_layer_norm",
    "L1RMSNorm": "l1_layer_norm",
    "PowerNorm": "power_norm",
    "UnifiedNorm": "unified_norm",
    "replayed_statistics": "recomputation",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
