"""Which modules are read as one operation, and which are read through.

A module is a leaf if it runs the ``forward`` of a ``torch.nn`` layer unchanged, whatever its own class is called. A
subclass that overrides ``forward`` (timm's ``Conv2dSame`` and ``BatchNormAct2d``) is read through: its calls of
``F.conv2d`` and ``F.batch_norm`` on its own parameters say what it does.
So is a norm of :mod:`normfuse.layers` that is a fixed map of each channel in eval mode, and an L1 norm of tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from normfuse import adapters
from normfuse.layers.affine_inference import AffineInference
from normfuse.layers.l1_layer_norm import L1TokenNorm
from normfuse.patches import is_torchs, patched

_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_BEHAVIOUR = ("forward", "_conv_forward", "__call__")


def base_layer(module: nn.Module) -> type[nn.Module] | None:
    """Return the ``torch.nn`` class whose ``forward`` the module runs unchanged, if there is one."""
    if patched(module) or isinstance(module, torch.jit.ScriptModule):
        return None
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules."):
            return None if cls is nn.Module or issubclass(cls, _CONTAINERS) or not is_torchs(cls) else cls
        if any(name in vars(cls) for name in _BEHAVIOUR):
            return None
    return None


def affine_inference(module: nn.Module | None) -> AffineInference | None:
    """Return the module if it is a fixed map in eval mode, and neither it nor a subclass has another ``forward``."""
    return module if isinstance(module, AffineInference) and _runs_our_forward(module) else None


def l1_token_norm(module: nn.Module | None) -> L1TokenNorm | None:
    """Return the module if it is an L1LayerNorm or L1RMSNorm, and neither it nor a subclass has another ``forward``."""
    return module if isinstance(module, L1TokenNorm) and _runs_our_forward(module) else None


def _runs_our_forward(module: nn.Module) -> bool:
    """Whether the ``forward`` of a module is one of :mod:`normfuse.layers`."""
    classes = (cls for cls in type(module).__mro__ if any(name in vars(cls) for name in _BEHAVIOUR))
    return not patched(module) and next(classes).__module__.startswith("normfuse.layers.")


def is_leaf(module: nn.Module) -> bool:
    """Whether the readers take a call of the module as one operation."""
    if isinstance(module, torch.jit.ScriptModule) or adapters.is_known(module) or adapters.token_norm(module):
        return True
    return base_layer(module) is not None or affine_inference(module) is not None or l1_token_norm(module) is not None
