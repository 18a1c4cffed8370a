"""Which names a pickled model may ask for.

Allowed without asking: every ``torch.nn.Module`` class that torch, torchvision, timm, transformers and normfuse define
in the packages of :data:`MODULE_PACKAGES`, the configuration classes of transformers, and the harmless helpers of
:data:`HELPERS`. A name is looked up only if it lies in one of those packages, so a file cannot make any other module be
imported. ``functools.partial``, ``getattr`` and everything else that can call what the file chooses are not allowed.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from normfuse.errors import LoadError

MODULE_PACKAGES = (
    "torch.nn.modules",
    "torch.nn.utils",
    "torch.nn.parallel.data_parallel",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "timm.layers",
    "timm.models",
    "transformers.models",
    "transformers.activations",
    "transformers.modeling_layers",
    "transformers.modeling_utils",
    "transformers.pytorch_utils",
    "normfuse.layers",
    "normfuse.quantization",
    "normfuse.deploy",
)
"""Where a class may be defined; torch.jit, torch.fx and torch.distributed hold modules that compile code or open
connections, and are left out."""

HOOKS = (
    "torch.nn.utils.weight_norm.WeightNorm",
    "torch.nn.utils.spectral_norm.SpectralNorm",
    "torch.nn.utils.spectral_norm.SpectralNormLoadStateDictPreHook",
    "torch.nn.utils.spectral_norm.SpectralNormStateDictHook",
)
"""Hooks that torch itself registers on a module: objects that hold a name and a dimension."""

ACTIVATIONS = (
    *("celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_softmax", "logsigmoid"),
    *("mish", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softmax", "softmin", "softplus", "softshrink"),
    *("softsign", "tanh", "tanhshrink", "threshold"),
)

HELPERS = frozenset(
    {
        *HOOKS,
        "torch.nn.modules.module._WrappedHook",
        *(f"torch.nn.functional.{name}" for name in ACTIVATIONS),
        *(f"torch._C._nn.{name}" for name in ("gelu", "log_sigmoid", "softplus", "softshrink")),
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
        "timm.layers.format.Format",
        "normfuse.deploy.RefuseTraining",
        "normfuse.layers.deployed.NotReached",
        "normfuse.quantization.quantizing_layer.Precision",
        "argparse.Namespace",
    }
)
"""Not modules, and harmless whatever they are called with: plain records, an enum, and functions of tensors."""

UNBOUNDED = frozenset(
    {
        *("builtins", "codecs", "copyreg", "ctypes", "functools", "importlib", "marshal", "nt", "operator", "os"),
        *("pickle", "posix", "runpy", "shutil", "socket", "subprocess", "sys", "types", "webbrowser"),
    }
)
"""Modules of the standard library out of which a file could build any call; not even ``--allow-global`` opens them."""

SAFE_CONSTRUCTORS = ("torch.nn.modules.", "torchvision.ops.", "timm.layers.")
"""A class of these packages may stay callable on a loaded model: its constructor only builds layers."""


def resolve(name: str) -> Any | None:
    """Return the object that a pickle may have under this name, or None if it is not allowed.

    Args:
        name: ``"module.name"``, as the file spells it.
    """
    if name in HELPERS:
        return _lookup(name)
    if not _in_allowed_package(name):
        return None
    found = _lookup(name)
    return found if _is_allowed_class(found) else None


def resolve_named_by_user(name: str) -> Any:
    """Return the object that the user allowed by name; imports its module.

    Raises:
        LoadError: There is no such object, or it could call anything, so that allowing it would be to trust the file.
    """
    if calls_anything(name):
        raise LoadError(f"--allow-global {name}: it can run anything; that is what --trust-pickle is for")
    found = _lookup(name)
    if found is None:
        raise LoadError(f"--allow-global {name}: there is no such name; write it as package.module.Class")
    return found


def calls_anything(name: str) -> bool:
    """Whether a name lies in a module of the standard library that can run whatever its caller asks for."""
    return name.partition(".")[0] in UNBOUNDED


def _in_allowed_package(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    private = any(part.startswith("__") or not part.isidentifier() for part in [*module.split("."), attribute])
    return not private and any(f"{module}.".startswith(f"{package}.") for package in MODULE_PACKAGES)


def _lookup(name: str) -> Any | None:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except (ImportError, ValueError):
        return None


def _is_allowed_class(found: Any) -> bool:
    if not isinstance(found, type) or not _in_allowed_package(f"{found.__module__}.{found.__name__}"):
        return False
    return issubclass(found, nn.Module) or is_transformers_config(found)


def is_transformers_config(found: type) -> bool:
    """Whether a class is a configuration of transformers: plain data, which every model of that package carries."""
    names = {base.__name__ for base in found.__mro__ if base.__module__ == "transformers.configuration_utils"}
    return found.__module__.startswith("transformers.") and bool(names & {"PretrainedConfig", "PreTrainedConfig"})
