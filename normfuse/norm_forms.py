"""Recognise a layer that computes LayerNorm or RMSNorm over one axis, whatever its class, by what it computed.

    layer:  y = g (x - E[x]) / sqrt(Var[x] + eps) + b          rms:  y = g x / sqrt(E[x^2] + eps) + b

with E and Var over the channels of a token; ``g`` is the weight of the layer, ``1 + weight`` (Gemma) or 1, and ``b``
its bias or 0. Both are computed in float64 on an input that the layer was given, and compared with what it returned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normfuse import adapters
from normfuse.base import Reason, Refused
from normfuse.layers.affine_inference import AffineInference

_OTHERS = (_NormBase, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, AffineInference)
_EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
_TOKENS = 256
"""Tokens on which the formula is compared."""

Kind = Literal["layer", "rms"]


@dataclass(frozen=True, slots=True)
class Form:
    """What a norm over one axis computes.

    Attributes:
        kind: ``"layer"`` for LayerNorm, ``"rms"`` for RMSNorm.
        dim: The axis of the channels: -1, or 1 for channel-first layers.
        size: Number of channels.
        eps: Added inside the root.
        gain: ``(size,)``, float64 on the CPU.
        shift: ``(size,)``, float64 on the CPU.
    """

    kind: Kind
    dim: int
    size: int
    eps: float
    gain: Tensor
    shift: Tensor

    def normalise(self, x: Tensor) -> Tensor:
        """Return the norm of tokens ``(n, size)``, in float64."""
        centred = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        return self.gain * centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps) + self.shift


def may_be_token_norm(module: nn.Module) -> bool:
    """Whether a norm could be LayerNorm or RMSNorm, judged by its class and attributes."""
    if isinstance(module, _OTHERS) or adapters.is_known(module):
        return False
    tensors = (getattr(module, "weight", None), getattr(module, "bias", None))
    return hasattr(module, _eps_name(module)) and all(t is None or isinstance(t, Tensor) for t in tensors)


def as_tokens(values: Tensor, dim: int, padding: Tensor | None = None) -> Tensor:
    """Return an activation as ``(tokens, channels)`` in float64, without padding where the mask fits its tokens."""
    values = values.cpu() if values.device.type == "mps" else values  # which has no float64
    values = values.movedim(dim, -1)
    if padding is not None and values.shape[:-1] == padding.shape:
        return values[~padding.to(values.device)].double()
    return values.flatten(0, -2).double()


@torch.no_grad()
def recognise(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Form:
    """Return the form of a norm that made ``y`` of ``x``.

    Raises:
        Refused: It computes something else, or normalises over several axes.
    """
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, list | tuple | torch.Size) and len(shape) > 1:
        raise Refused(Reason.AXIS, f"{name} normalises over {len(shape)} axes")
    if not (x.is_floating_point() and x.shape == y.shape and x.numel()):
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{name} does not return a tensor of the shape it takes")
    for form in _candidates(module, x):
        tokens, found = (as_tokens(t, form.dim)[:_TOKENS].cpu() for t in (x, y))
        allowed = _rounding(y.dtype) * float(found.square().mean().sqrt())
        if bool(((form.normalise(tokens) - found).abs() <= allowed).all()):
            return form
    raise Refused(Reason.UNSUPPORTED_LAYER, f"{name} ({type(module).__name__}) computes neither LayerNorm nor RMSNorm")


def _rounding(dtype: torch.dtype) -> float:
    """Return what rounding may do to an element, relative to the root mean square; some classes compute in float32."""
    return 0.1 if dtype in (torch.float16, torch.bfloat16) else 1e-3


def _candidates(module: nn.Module, x: Tensor) -> Iterator[Form]:
    eps = getattr(module, _eps_name(module))
    eps = float(torch.finfo(x.dtype).eps if eps is None else eps)
    weight, bias = (_vector(getattr(module, name, None)) for name in ("weight", "bias"))
    kinds: tuple[Kind, ...] = ("layer", "rms")
    for dim, kind in itertools.product((-1, 1) if x.dim() > 2 else (-1,), kinds):
        size = x.shape[dim]
        for gain in _gains(weight, size):
            if all(v is None or v.numel() == size for v in (weight, bias)):
                yield Form(kind, dim, size, eps, gain, torch.zeros(size).double() if bias is None else bias)


def _gains(weight: Tensor | None, size: int) -> list[Tensor]:
    one = torch.ones(size, dtype=torch.float64)
    return [one] if weight is None else [weight, 1 + weight]


def _vector(value: Any) -> Tensor | None:
    return value.detach().double().cpu().flatten() if isinstance(value, Tensor) else None


def _eps_name(module: nn.Module) -> str:
    return next((name for name in _EPS_NAMES if hasattr(module, name)), _EPS_NAMES[0])
