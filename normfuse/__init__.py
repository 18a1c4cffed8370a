"""normfuse: fold every normalization layer that has a home into its neighbours, exactly.

The public names are loaded on first use, so that ``import normfuse`` (and ``normfuse --help``) costs nothing and needs
neither torch nor an optional package.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normfuse import layers as layers
    from normfuse import quantization as quantization
    from normfuse import statistics as statistics
    from normfuse.api import apply, export, fold, fold_bn, inspect
    from normfuse.base import Reason, Refusal
    from normfuse.compilation import Compiled, compile
    from normfuse.errors import (
        CalibrationError,
        CaptureError,
        DeployedModelError,
        LoadError,
        LoweringError,
        MissingDependencyError,
        NormfuseError,
        OrderError,
        RequirementError,
        TuneModeError,
        VerificationError,
    )
    from normfuse.examples import Examples
    from normfuse.kernels import build_kernels
    from normfuse.parameters import parameter_groups
    from normfuse.pipeline import Result
    from normfuse.quantizing import quantize
    from normfuse.reconstruction import reconstruct
    from normfuse.report import Outcome, Report, Status
    from normfuse.serialize import load, save
    from normfuse.swapping import swap_norms
    from normfuse.tuning import tune_mode, tuned
    from normfuse.verify import Comparison, Tolerance, verify

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CaptureError",
    "Comparison",
    "Compiled",
    "DeployedModelError",
    "Examples",
    "LoadError",
    "LoweringError",
    "MissingDependencyError",
    "NormfuseError",
    "OrderError",
    "Outcome",
    "Reason",
    "Refusal",
    "Report",
    "RequirementError",
    "Result",
    "Status",
    "Tolerance",
    "TuneModeError",
    "VerificationError",
    "apply",
    "build_kernels",
    "compile",
    "export",
    "fold",
    "fold_bn",
    "inspect",
    "load",
    "parameter_groups",
    "quantize",
    "reconstruct",
    "save",
    "swap_norms",
    "tune_mode",
    "tuned",
    "verify",
]

_NAMES = {
    "api": ("apply", "export", "fold", "fold_bn", "inspect"),
    "base": ("Reason", "Refusal"),
    "compilation": ("Compiled", "compile"),
    "errors": (
        "CalibrationError",
        "CaptureError",
        "DeployedModelError",
        "LoadError",
        "LoweringError",
        "MissingDependencyError",
        "NormfuseError",
        "OrderError",
        "RequirementError",
        "TuneModeError",
        "VerificationError",
    ),
    "examples": ("Examples",),
    "kernels": ("build_kernels",),
    "parameters": ("parameter_groups",),
    "pipeline": ("Result",),
    "quantizing": ("quantize",),
    "reconstruction": ("reconstruct",),
    "report": ("Outcome", "Report", "Status"),
    "serialize": ("load", "save"),
    "swapping": ("swap_norms",),
    "tuning": ("tune_mode", "tuned"),
    "verify": ("Comparison", "Tolerance", "verify"),
}
_SUBPACKAGES = ("layers", "quantization", "statistics")
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it, or a subpackage (PEP 562)."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package as a module whose ``verify`` is always the function.

    Importing the submodule ``normfuse.verify`` would otherwise put that module where the function belongs.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
