"""Third-party layers described in torch terms, by qualified class name, so that none is imported.

An adapter is needed only where reading a layer's ``forward`` does not show what it is: a frozen BatchNorm written as a
multiplication and an addition of buffers. Subclasses of torch layers that call ``F.conv2d`` or ``F.batch_norm`` on
their own parameters need none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from normfuse.patches import patched


@dataclass(frozen=True, slots=True)
class Frozen:
    """A BatchNorm on buffers ``weight, bias, running_mean, running_var`` and ``eps``.

    Attributes:
        tail: Names of the child modules that run after the normalization, in order.
    """

    tail: tuple[str, ...] = ()


_FROZEN = {
    "torchvision.ops.misc.FrozenBatchNorm2d": Frozen(),
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": Frozen(),
    "timm.layers.norm_act.FrozenBatchNormAct2d": Frozen(tail=("drop", "act")),
}


def frozen(module: nn.Module) -> Frozen | None:
    """Return the adapter of a frozen BatchNorm whose class is known and keeps its ``forward``."""
    for cls in type(module).__mro__:
        adapter = _FROZEN.get(f"{cls.__module__}.{cls.__qualname__}")
        if adapter is not None:
            return adapter
        if "forward" in vars(cls):
            return None
    return None


@dataclass(frozen=True, slots=True)
class TokenNorm:
    """A LayerNorm or RMSNorm over trailing axes, in a kernel of its own: ``weight``, perhaps ``bias``.

    Attributes:
        kind: ``"LayerNorm"`` or ``"RMSNorm"``.
        neutral: The value of ``weight`` with which the gain is one.
    """

    kind: str
    neutral: float = 1.0


_TOKEN_NORMS = {
    "apex.normalization.fused_layer_norm.FusedLayerNorm": "LayerNorm",
    "apex.normalization.fused_layer_norm.FusedRMSNorm": "RMSNorm",
    "apex.normalization.fused_layer_norm.MixedFusedLayerNorm": "LayerNorm",
    "apex.normalization.fused_layer_norm.MixedFusedRMSNorm": "RMSNorm",
    "apex.contrib.layer_norm.layer_norm.FastLayerNorm": "LayerNorm",
    "megatron.core.fusions.fused_layer_norm.FusedLayerNorm": "LayerNorm",
    "megatron.legacy.model.fused_layer_norm.MixedFusedLayerNorm": "LayerNorm",
    "megatron.model.fused_layer_norm.MixedFusedLayerNorm": "LayerNorm",
    "transformer_engine.pytorch.module.layernorm.LayerNorm": "LayerNorm",
    "transformer_engine.pytorch.module.rmsnorm.RMSNorm": "RMSNorm",
}
_ZERO_CENTRED = ("zero_centered_gamma", "apply_layernorm_1p")  # attributes that make the gain one plus the weight


def token_norm(module: nn.Module) -> TokenNorm | None:
    """Return the adapter of a norm of Apex, Megatron or Transformer Engine that keeps its ``forward``."""
    if patched(module):
        return None
    for cls in type(module).__mro__:
        kind = _TOKEN_NORMS.get(f"{cls.__module__}.{cls.__qualname__}")
        if kind is not None:
            return TokenNorm(kind, float(not any(getattr(module, name, False) for name in _ZERO_CENTRED)))
        if "forward" in vars(cls):
            return None
    return None


def is_known(module: nn.Module) -> bool:
    """Whether an adapter describes the module, so that the readers take it as one operation."""
    return not patched(module) and frozen(module) is not None


def pads_same(module: nn.Module) -> bool:
    """Whether the module is a convolution that pads by the size of its input, as TensorFlow's ``SAME`` does."""
    cls = type(module)
    return not patched(module) and f"{cls.__module__}.{cls.__qualname__}" == "timm.layers.conv2d_same.Conv2dSame"
