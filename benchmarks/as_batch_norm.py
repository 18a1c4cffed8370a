"""BatchNorm in the place of UnifiedNorm, computing the same function in eval mode.

The map ``a x + c`` of a channel, whose values have mean ``m`` and variance ``v`` on calibration data, is BatchNorm with
these statistics, ``gamma = a sqrt(v + eps)`` and ``beta = c + a m``. What differs is how the two train.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from pre_norm import OverTokens
from torch import Tensor, nn

from normfuse.calibration import Batches, Listener, Moments, listen
from normfuse.layers import UnifiedNorm
from normfuse.norm_forms import as_tokens


def as_batch_norm(model: nn.Module, calibration: Sequence[Tensor]) -> nn.Module:
    """Return a copy with a BatchNorm over tokens in the place of each UnifiedNorm."""
    model = copy.deepcopy(model)
    seen = {module: Moments(module.num_features) for module in model.modules() if isinstance(module, UnifiedNorm)}
    listen(model, {norm: _listener(moments) for norm, moments in seen.items()}, Batches(calibration, model))
    for name, module in list(model.named_modules()):
        if isinstance(module, UnifiedNorm):
            model.set_submodule(name, _batch_norm(module, seen[module]))
    return model


def _listener(moments: Moments) -> Listener:
    def listener(x: Tensor, y: Tensor, padding: Tensor | None) -> None:
        moments.add(as_tokens(x, -1, padding), as_tokens(y, -1, padding))

    return listener


@torch.no_grad()
def _batch_norm(norm: UnifiedNorm, moments: Moments) -> OverTokens:
    """Return a norm with ``gamma = a sqrt(var + eps)`` and ``beta = c + a mean`` for the map ``a x + c``."""
    made = OverTokens(norm.num_features).eval()
    slope, shift = norm.affine_map()
    variance, inner = moments.var_x / moments.count, made.norm
    assert inner.running_mean is not None
    assert inner.running_var is not None
    inner.running_mean.copy_(moments.mean_x)
    inner.running_var.copy_(variance)
    inner.weight.copy_(slope * (variance + inner.eps).sqrt())
    inner.bias.copy_(shift + slope * moments.mean_x)
    return made
