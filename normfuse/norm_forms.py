"""Recognise a layer that computes LayerNorm or RMSNorm over one axis, whatever its class, by what it computed.

    layer:  y = g (x - E[x]) / sqrt(Var[x] + eps) + b          rms:  y = g x / r + b

with E and Var over the channels of a token; ``g`` is the weight of the layer, ``1 + weight`` (Gemma) or 1, and ``b``
its bias or 0. Of ``r``, over the d channels of a token or the first of them (pRMSNorm), there are three conventions:

    inside    r = sqrt(E[x^2] + eps)                    torch, ONNX, most models
    outside   r = sqrt(E[x^2]) + eps                    the code of the RMSNorm paper (1910.07467)
    clamped   r = max(|x|, eps) / sqrt(d)               ScaleNorm (1910.05895), ``F.normalize``

All are computed in float64 on an input that the layer was given, and compared with what it returned.
"""

from __future__ import annotations

import copy as copying
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
_GAIN_NAMES = ("weight", "scale", "gamma", "g")
_SHIFT_NAMES = ("bias", "offset", "beta")
_TOKENS = 256
"""Tokens on which the formula is compared."""

Kind = Literal["layer", "rms"]
Root = Literal["inside", "outside", "clamped"]
_KINDS: tuple[tuple[Kind, Root], ...] = (
    ("layer", "inside"),
    ("rms", "inside"),
    ("rms", "outside"),
    ("rms", "clamped"),
)


@dataclass(frozen=True, slots=True)
class Form:
    """What a norm over one axis computes.

    Attributes:
        kind: ``"layer"`` for LayerNorm, ``"rms"`` for RMSNorm.
        dim: The axis of the channels: -1, or 1 for channel-first layers.
        size: Number of channels.
        eps: The constant of ``root``.
        gain: ``(size,)``, float64 on the CPU.
        shift: ``(size,)``, float64 on the CPU.
        root: Where ``eps`` stands: one of the three conventions.
        leading: How many channels the statistics are of, the first ones; None for all.
        one_plus: Whether the gain is one plus the weight.
    """

    kind: Kind
    dim: int
    size: int
    eps: float
    gain: Tensor
    shift: Tensor
    root: Root = "inside"
    leading: int | None = None
    one_plus: bool = False

    def normalise(self, x: Tensor) -> Tensor:
        """Return the norm of tokens ``(n, size)``, in float64."""
        centred = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        return self.gain * centred / self._divisor(centred[:, : self.leading]) + self.shift

    def _divisor(self, x: Tensor) -> Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        if self.root == "inside":
            return (mean_square + self.eps).sqrt()
        if self.root == "outside":
            return mean_square.sqrt() + self.eps
        return mean_square.sqrt().clamp(min=self.eps / x.shape[-1] ** 0.5)

    def __str__(self) -> str:
        """Say what it computes: ``"RMSNorm, eps outside the root, gain 1 + weight"``."""
        parts = ["LayerNorm" if self.kind == "layer" else "RMSNorm"]
        if self.leading is not None:
            parts[0] = f"pRMSNorm over {self.leading} of {self.size} channels"
        where = {
            "inside": "inside the root",
            "outside": "outside the root",
            "clamped": "as the least length of a token",
        }
        parts.append(f"eps {where[self.root]}")
        return ", ".join([*parts, "gain 1 + weight"] if self.one_plus else parts)


def may_be_token_norm(module: nn.Module) -> bool:
    """Whether a norm could be LayerNorm or RMSNorm, judged by its class and attributes."""
    if isinstance(module, _OTHERS) or adapters.is_known(module):
        return False
    values = (getattr(module, "weight", None), getattr(module, "bias", None))
    return hasattr(module, _eps_name(module)) and all(v is None or isinstance(v, Tensor | bool) for v in values)


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


@torch.no_grad()
def identify(module: nn.Module) -> Form | None:
    """Return the form of a norm over the last axis or axis 1, None for a norm of another kind.

    A copy of it is run in float64 on made-up tokens, of which some are as small as its eps, so that the three
    conventions differ.
    """
    if not may_be_token_norm(module):
        return None
    try:
        trial = copying.deepcopy(module).double().cpu().eval()
    except Exception:  # what a module of the user holds may refuse to be copied
        return None
    size = _size(trial)
    eps = float(getattr(trial, _eps_name(trial)) or torch.finfo(torch.float64).eps)
    tokens = torch.randn(9, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = tokens * torch.tensor([1.0, max(eps, 1e-30) ** 0.5, eps], dtype=torch.float64).repeat(3)[:, None]
    for x in (tokens, tokens.reshape(3, 3, size).movedim(-1, 1).unsqueeze(-1)):
        try:
            y = trial(x)
        except Exception:  # a forward of the user, of any kind
            continue
        if isinstance(y, Tensor) and y.shape == x.shape:
            form = next((form for form in _candidates(trial, x) if _computes(form, x, y)), None)
            if form is not None:
                return form
    return None


def _computes(form: Form, x: Tensor, y: Tensor) -> bool:
    """Whether a form agrees with the output to float32 precision, which some classes compute in, token by token."""
    tokens, found = (as_tokens(t, form.dim) for t in (x, y))
    expected = form.normalise(tokens)
    return bool(((expected - found).abs() <= 1e-4 * found.abs().amax(-1, keepdim=True) + 1e-12).all())


def _size(module: nn.Module) -> int:
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, list | tuple | torch.Size) and len(shape):
        return int(shape[-1])
    gain = _vector(module, _GAIN_NAMES)
    return gain.numel() if gain is not None and gain.numel() > 1 else 16


def _candidates(module: nn.Module, x: Tensor) -> Iterator[Form]:
    eps = getattr(module, _eps_name(module))
    eps = float(torch.finfo(x.dtype).eps if eps is None else eps)
    weight, bias = _vector(module, _GAIN_NAMES), _vector(module, _SHIFT_NAMES)
    for dim, (kind, root) in itertools.product((-1, 1) if x.dim() > 2 else (-1,), _KINDS):
        size = x.shape[dim]
        if (weight is not None and weight.numel() not in (1, size)) or (bias is not None and bias.numel() != size):
            continue
        shift = torch.zeros(size).double() if bias is None else bias
        for gain, one_plus in _gains(weight, size, root):
            yield Form(kind, dim, size, eps, gain, shift, root, _leading(module, size, kind), one_plus)


def _gains(weight: Tensor | None, size: int, root: Root) -> list[tuple[Tensor, bool]]:
    """Return the gains to try, ``(size,)``; that of ScaleNorm is of a token of length one."""
    one = torch.ones(size, dtype=torch.float64)
    if weight is None:
        return [(one, False)]
    if weight.numel() == 1 < size:
        return [(weight * one / size**0.5 if root == "clamped" else weight * one, False)]
    return [(weight, False), (1 + weight, True)]


def _leading(module: Any, size: int, kind: Kind) -> int | None:
    p = getattr(module, "p", None)
    if kind != "rms" or not isinstance(p, float):
        return None
    return int(size * p) if 0 < int(size * p) < size else None


def _vector(module: nn.Module, names: tuple[str, ...]) -> Tensor | None:
    value = next((v for name in names if isinstance(v := getattr(module, name, None), Tensor)), None)
    return value.detach().double().cpu().flatten() if value is not None else None


def _eps_name(module: nn.Module) -> str:
    return next((name for name in _EPS_NAMES if hasattr(module, name)), _EPS_NAMES[0])
