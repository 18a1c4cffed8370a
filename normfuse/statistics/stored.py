"""The norms that store statistics of data: which they are, and how the statistics are read and written.

BatchNorm of every kind     running_mean, running_var     E[x], Var[x]
UnifiedNorm                 running_second_moment         E[x^2]
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normfuse import adapters
from normfuse.graph import is_uninitialized
from normfuse.layers.affine_inference import AffineInference
from normfuse.layers.unified_norm import UnifiedNorm
from normfuse.statistics.moments import ChannelMoments
from normfuse.structure import restored_on_error

Snapshot = dict[str, dict[str, Tensor]]
"""The statistics of each norm, by its qualified name and the name of the buffer."""


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module, of whatever class, is the map of BatchNorm by its stored mean and variance in eval mode."""
    corrected = isinstance(module, AffineInference) and not hasattr(module, "ghost_size")  # ours, but no ghost norm
    if corrected or is_uninitialized(module):
        return False
    known = isinstance(module, _BatchNorm) or adapters.is_known(module)
    return known and getattr(module, "running_mean", None) is not None and module.running_var is not None


def stores_statistics(module: nn.Module) -> bool:
    """Whether a module stores statistics that can be set from moments of its input."""
    return is_batch_norm(module) or isinstance(module, UnifiedNorm)


def batch_norms(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, Any]:
    """Return the BatchNorms of a model by name, those that globs choose."""
    return {name: m for name, m in model.named_modules() if is_batch_norm(m) and chosen(name, include, exclude)}


def chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether globs choose a name: one of ``include``, or any if there are none, and none of ``exclude``."""
    wanted = not include or any(fnmatch.fnmatchcase(name, glob) for glob in include)
    return wanted and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)


def channel_axis(norm: Any) -> int:
    """Return the axis of the channels in the input of a norm that stores statistics."""
    return norm.dim if isinstance(norm, UnifiedNorm) else 1


def size(norm: Any) -> int:
    """Return C, the number of channels."""
    return (norm.running_second_moment if isinstance(norm, UnifiedNorm) else norm.running_mean).numel()


def measured(norm: nn.Module, moments: ChannelMoments) -> dict[str, Tensor]:
    """Return the statistics of data by the names of the norm's buffers, in float64."""
    if isinstance(norm, UnifiedNorm):
        return {"running_second_moment": moments.second_moment}
    return {"running_mean": moments.mean, "running_var": moments.variance}


def mixed(norm: nn.Module, moments: ChannelMoments, weight: float) -> dict[str, Tensor]:
    """Return ``(1 - weight)`` times the stored statistics and ``weight`` times those of data, in float64 on the CPU."""
    found = measured(norm, moments)
    return {key: (1 - weight) * getattr(norm, key).detach().double().cpu() + weight * found[key] for key in found}


@torch.no_grad()
def assign(norm: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Write statistics into the buffers of a norm, cast once to their dtype."""
    for key, value in statistics.items():
        getattr(norm, key).copy_(value)


def snapshot(model: nn.Module) -> Snapshot:
    """Return a copy of the statistics of every norm that stores some, such as those of one domain.

    AdaBN (arXiv 1603.04779) keeps one set of statistics for each domain and all weights in common:

        >>> statistics = {}
        >>> for domain, batches in loaders.items():  # doctest: +SKIP
        ...     statistics[domain] = normfuse.statistics.snapshot(normfuse.statistics.adabn(model, batches))
        >>> normfuse.statistics.restore(model, statistics["night"])  # doctest: +SKIP
    """
    return {
        name: {key: getattr(module, key).detach().clone() for key in _buffers(module)}
        for name, module in model.named_modules()
        if stores_statistics(module)
    }


def restore(model: nn.Module, statistics: Snapshot) -> nn.Module:
    """Write statistics that :func:`snapshot` returned into a model of the same architecture; returns it.

    Raises:
        ValueError: A norm is missing, or has another number of channels; nothing is written.
    """
    norms = {name: module for name, module in model.named_modules() if stores_statistics(module)}
    for name, values in statistics.items():
        if name not in norms or any(getattr(norms[name], k).shape != v.shape for k, v in values.items()):
            raise ValueError(f"the statistics are of another model: this one has no such norm as {name}")
    with restored_on_error(model, model.buffers()):
        for name, values in statistics.items():
            assign(norms[name], values)
    return model


def _buffers(norm: nn.Module) -> tuple[str, ...]:
    return ("running_second_moment",) if isinstance(norm, UnifiedNorm) else ("running_mean", "running_var")
