"""What a pickle may name, and what each name stands for.

The classes of modules are an enumerated list, ``inert_classes.json``, which ``benchmarks/list_inert_classes.py`` makes
from the installed packages: classes of torch, torchvision, timm, transformers and normfuse whose methods run nothing
that their attributes could choose (no ``exec``, no import, no file, no attribute called by a name that is kept in the
state). Beside them stand the few records, hooks and functions below, each read by a person. A name that is not listed
is never looked up, so a file cannot make any module be imported.

A user may add classes of modules by name. Nothing else can be added: what is not a class of ``nn.Module`` is code.
"""

from __future__ import annotations

import enum
import functools
import importlib
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from normfuse.errors import LoadError
from normfuse.names import is_plain

HOOKS = (
    "torch.nn.utils.weight_norm.WeightNorm",
    "torch.nn.utils.spectral_norm.SpectralNorm",
    "torch.nn.utils.spectral_norm.SpectralNormLoadStateDictPreHook",
    "torch.nn.utils.spectral_norm.SpectralNormStateDictHook",
    *(f"normfuse.layers.tied_calls.{name}" for name in ("TiedCalls", "BeginRun", "CountCall", "EndRun")),
    *(f"normfuse.layers.padding.{name}" for name in ("NotePadding", "ForgetPadding")),
)
"""Hooks that torch itself registers on a module, objects that hold a name and a dimension; and those of folded models,
that count calls, and of swapped ones, that note masks."""

WRAPPED_HOOK = "torch.nn.modules.module._WrappedHook"

_ACTIVATIONS = (
    *("celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_softmax", "logsigmoid"),
    *("mish", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softmax", "softmin", "softplus", "softshrink"),
    *("softsign", "tanh", "tanhshrink", "threshold"),
)

FUNCTIONS = frozenset(
    {
        *(f"torch.nn.functional.{name}" for name in _ACTIVATIONS),
        *(f"torch._C._nn.{name}" for name in ("gelu", "log_sigmoid", "softplus", "softshrink")),
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
    }
)
"""Functions of tensors, harmless whatever they are called with."""

RECORDS = frozenset(
    {
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "transformers.generation.configuration_utils.GenerationConfig",
        "normfuse.deploy.RefuseTraining",
        "normfuse.layers.deployed.NotReached",
        "normfuse.quantization.quantizing_layer.Precision",
        "argparse.Namespace",
    }
)
"""Objects that hold plain values and compute with tensors; those of the list, configurations, are of this kind too."""

ENUMS = frozenset({"timm.layers.format.Format"})

TENSORS = frozenset(
    {
        *(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "qtensor", "sparse_tensor")),
        *(f"torch._utils._rebuild_{kind}" for kind in ("parameter", "parameter_with_state", "meta_tensor_no_storage")),
        "torch._tensor._rebuild_from_type_v2",
        "torch.nn.parameter.UninitializedParameter",
        "torch.nn.parameter.UninitializedBuffer",
    }
)
CONTAINERS = frozenset(
    {
        *(f"collections.{name}" for name in ("OrderedDict", "Counter", "defaultdict", "deque")),
        *(
            f"builtins.{name}"
            for name in ("set", "frozenset", "list", "dict", "tuple", "bytearray", "complex", "slice")
        ),
        "_codecs.encode",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
    }
)
PARTIAL = "functools.partial"
RECONSTRUCTOR = "copyreg._reconstructor"
"""How pickles of protocols 0 and 1 make an instance."""

SAFE_CONSTRUCTORS = ("torch.nn.modules.", "torchvision.ops.", "timm.layers.")
"""A class of these packages may stay callable on a loaded model: its constructor only builds layers."""


class Kind(enum.Enum):
    """What a name in a pickle stands for."""

    MODULE = "module"
    RECORD = "record"
    HOOK = "hook"
    FUNCTION = "function"
    TENSOR = "tensor"
    CONTAINER = "container"
    ATOM = "atom"
    ENUM = "enum"
    PARTIAL = "partial"
    RECONSTRUCTOR = "reconstructor"


_KINDS = (
    (TENSORS, Kind.TENSOR),
    (CONTAINERS, Kind.CONTAINER),
    (FUNCTIONS, Kind.FUNCTION),
    (RECORDS, Kind.RECORD),
    (ENUMS, Kind.ENUM),
    (frozenset({*HOOKS, WRAPPED_HOOK}), Kind.HOOK),
    (frozenset({PARTIAL}), Kind.PARTIAL),
    (frozenset({RECONSTRUCTOR}), Kind.RECONSTRUCTOR),
)


class Allowed:
    """What one file may name: the lists of this module, and the classes that the user added.

    Args:
        added: Classes of modules, ``"package.module.Class"``; their modules are imported.

    Raises:
        LoadError: An added name is not that of a class of ``nn.Module``.
    """

    def __init__(self, added: Sequence[str] = ()) -> None:
        self._added = {name: added_class(name) for name in added}

    def kind(self, path: str) -> Kind | None:
        """Return what a name stands for, None if it is not allowed. Imports nothing but the class that is listed."""
        if path in self._added:
            return Kind.MODULE
        for names, kind in _KINDS:
            if path in names:
                return kind
        if is_atom(path):
            return Kind.ATOM
        module, _, name = path.rpartition(".")
        for kind in (Kind.MODULE, Kind.RECORD):
            if name in listed()[kind].get(module, ()):
                return kind
        return None

    def find(self, path: str) -> Any:
        """Return what an allowed name stands for.

        Raises:
            LoadError: This version of its package does not have it, or it is another thing there.
        """
        if path in self._added:
            return self._added[path]
        found = atom(path) if is_atom(path) else look_up(path)
        wrong = self.kind(path) is Kind.MODULE and not is_plain_module_class(found)
        if found is None or wrong:
            package = path.partition(".")[0]
            raise LoadError(f"names {path}, which the {package} that is installed here does not have")
        return found


@functools.cache
def listed() -> dict[Kind, dict[str, frozenset[str]]]:
    """Return the enumerated classes, by the module that defines them."""
    text = importlib.resources.files("normfuse.pickles").joinpath("inert_classes.json").read_text(encoding="utf-8")
    lists = json.loads(text)
    kinds = {Kind.MODULE: lists["modules"], Kind.RECORD: lists["records"]}
    return {kind: {module: frozenset(names) for module, names in those.items()} for kind, those in kinds.items()}


def added_class(name: str) -> type[nn.Module]:
    """Return the class that the user allowed by name; imports its module.

    Raises:
        LoadError: There is no such class, or it is not one of modules.
    """
    found = look_up(name) if is_plain(name) and "." in name else None
    if found is None:
        raise LoadError(f"--allow-global {name}: there is no such name; write it as package.module.Class")
    if not is_plain_module_class(found):
        raise LoadError(
            f"--allow-global {name}: not a class of torch.nn.Module, or one that compiles code; to run what else a "
            "file asks for is what --trust-pickle is for"
        )
    return found


def is_plain_module_class(found: Any) -> bool:
    """Whether an object is a class of modules, and none that compiles or runs code it carries."""
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        return False
    return not any(base.__module__.startswith(("torch.fx.", "torch.jit.", "torch._dynamo.")) for base in found.__mro__)


def look_up(path: str) -> Any | None:
    """Return what stands under a name that is allowed, None if nothing does."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def is_atom(path: str) -> bool:
    """Whether a name is that of a dtype, a quantization scheme, a memory format or a plain type of tensors."""
    return path.startswith("torch.") and atom(path) is not None


def atom(path: str) -> Any | None:
    """Return the constant of torch under a name, None if it has none of this kind."""
    if path == "torch.nn.parameter.Parameter":
        return nn.Parameter
    found = vars(torch).get(path.removeprefix("torch."))
    known = isinstance(found, (torch.dtype, torch.qscheme, torch.memory_format, torch.layout)) or found is torch.Tensor
    return found if known else None
