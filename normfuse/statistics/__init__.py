"""Statistics of norms: from data, by adaptation at test time and in training. What belongs before folding.

Public names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normfuse.statistics.adapting import freeze, leave
    from normfuse.statistics.alpha import alpha_bn, batch_statistics
    from normfuse.statistics.balance import AdaB2N
    from normfuse.statistics.data_free import adaptive_batch_norm, matched_inputs, peak_activations, peak_inputs
    from normfuse.statistics.moments import ChannelMoments
    from normfuse.statistics.reestimation import adabn, reestimate
    from normfuse.statistics.sar import SAR, entropy, sar_parameters
    from normfuse.statistics.simulated import correct_bias, simulated_integers
    from normfuse.statistics.source_free import SourceFree
    from normfuse.statistics.stored import restore, snapshot
    from normfuse.statistics.unmix import unmix_tns

__all__ = [
    "SAR",
    "AdaB2N",
    "ChannelMoments",
    "SourceFree",
    "adabn",
    "adaptive_batch_norm",
    "alpha_bn",
    "batch_statistics",
    "correct_bias",
    "entropy",
    "freeze",
    "leave",
    "matched_inputs",
    "peak_activations",
    "peak_inputs",
    "reestimate",
    "restore",
    "sar_parameters",
    "simulated_integers",
    "snapshot",
    "unmix_tns",
]

_NAMES = {
    "adapting": ("freeze", "leave"),
    "alpha": ("alpha_bn", "batch_statistics"),
    "balance": ("AdaB2N",),
    "data_free": ("adaptive_batch_norm", "matched_inputs", "peak_activations", "peak_inputs"),
    "moments": ("ChannelMoments",),
    "reestimation": ("adabn", "reestimate"),
    "sar": ("SAR", "entropy", "sar_parameters"),
    "simulated": ("correct_bias", "simulated_integers"),
    "source_free": ("SourceFree",),
    "stored": ("restore", "snapshot"),
    "unmix": ("unmix_tns",),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
