"""Which modules are normalization layers, judged by their class alone."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normfuse import adapters
from normfuse.layers.affine_inference import AffineInference

_TORCH_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
_NORM_NAME = re.compile(r"(Norm|Normalization)\w{0,6}$|[a-z]BN$|^(I?GDN\w{0,2}|RN_(B|L|binarylabel)|LayerScaling)$")
_HOLDS_LAYERS = ("LearnedRegionNorm", "RN_L")  # norms that make their gain and shift with layers of their own


def is_norm_name(name: str) -> bool:
    """Whether a class of this name is likely to be a normalization layer."""
    return bool(_NORM_NAME.search(name))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer, judged by its class."""
    if isinstance(module, (*_TORCH_NORMS, AffineInference)) or adapters.is_known(module):
        return True
    if type(module).__module__.startswith("torch.nn.utils.") or not is_norm_name(type(module).__name__):
        return False
    holds_layers = any(True for child in module.children() for _ in child.parameters())
    return type(module).__name__ in _HOLDS_LAYERS or not holds_layers
