"""Layers that torch does not ship; the public ones are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normfuse.layers.act_norm import ActNorm
    from normfuse.layers.adaptive_deviation import AdaptiveDeviation
    from normfuse.layers.batch_channel_norm import BatchChannelNorm
    from normfuse.layers.estimated_batch_norm import EstimatedBatchNorm1d, EstimatedBatchNorm2d, EstimatedBatchNorm3d
    from normfuse.layers.fix_norm import FixNorm
    from normfuse.layers.gdn import GDN
    from normfuse.layers.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
    from normfuse.layers.ibn import IBN
    from normfuse.layers.l1_batch_norm import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d
    from normfuse.layers.l1_layer_norm import L1LayerNorm, L1RMSNorm
    from normfuse.layers.normalizer_free import ConstantScale, activation_gain, residual_betas
    from normfuse.layers.online_norm import OnlineNorm
    from normfuse.layers.partial_rms_norm import PartialRMSNorm
    from normfuse.layers.power_norm import PowerNorm
    from normfuse.layers.qk_norm import QKNorm
    from normfuse.layers.recomputation import replayed_statistics
    from normfuse.layers.region_norm import LearnedRegionNorm, RegionNorm
    from normfuse.layers.scale_norm import ScaleNorm
    from normfuse.layers.unified_norm import UnifiedNorm
    from normfuse.layers.weight_conditioning import RowEquilibration, WeightCompander
    from normfuse.layers.weight_standardization import ScaledWeightStandardization, WeightStandardization

__all__ = [
    "GDN",
    "IBN",
    "ActNorm",
    "AdaptiveDeviation",
    "BatchChannelNorm",
    "ConstantScale",
    "EstimatedBatchNorm1d",
    "EstimatedBatchNorm2d",
    "EstimatedBatchNorm3d",
    "FixNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "L1BatchNorm1d",
    "L1BatchNorm2d",
    "L1BatchNorm3d",
    "L1LayerNorm",
    "L1RMSNorm",
    "LearnedRegionNorm",
    "OnlineNorm",
    "PartialRMSNorm",
    "PowerNorm",
    "QKNorm",
    "RegionNorm",
    "RowEquilibration",
    "ScaleNorm",
    "ScaledWeightStandardization",
    "UnifiedNorm",
    "WeightCompander",
    "WeightStandardization",
    "activation_gain",
    "replayed_statistics",
    "residual_betas",
]

_HOMES = {
    "ActNorm": "act_norm",
    "AdaptiveDeviation": "adaptive_deviation",
    "BatchChannelNorm": "batch_channel_norm",
    "ConstantScale": "normalizer_free",
    "EstimatedBatchNorm1d": "estimated_batch_norm",
    "EstimatedBatchNorm2d": "estimated_batch_norm",
    "EstimatedBatchNorm3d": "estimated_batch_norm",
    "FixNorm": "fix_norm",
    "GDN": "gdn",
    "GhostBatchNorm1d": "ghost_batch_norm",
    "GhostBatchNorm2d": "ghost_batch_norm",
    "GhostBatchNorm3d": "ghost_batch_norm",
    "IBN": "ibn",
    "L1BatchNorm1d": "l1_batch_norm",
    "L1BatchNorm2d": "l1_batch_norm",
    "L1BatchNorm3d": "l1_batch_norm",
    "L1LayerNorm": "l1_layer_norm",
    "L1RMSNorm": "l1_layer_norm",
    "LearnedRegionNorm": "region_norm",
    "OnlineNorm": "online_norm",
    "PartialRMSNorm": "partial_rms_norm",
    "PowerNorm": "power_norm",
    "QKNorm": "qk_norm",
    "RegionNorm": "region_norm",
    "RowEquilibration": "weight_conditioning",
    "ScaleNorm": "scale_norm",
    "ScaledWeightStandardization": "weight_standardization",
    "UnifiedNorm": "unified_norm",
    "WeightCompander": "weight_conditioning",
    "WeightStandardization": "weight_standardization",
    "activation_gain": "normalizer_free",
    "replayed_statistics": "recomputation",
    "residual_betas": "normalizer_free",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
