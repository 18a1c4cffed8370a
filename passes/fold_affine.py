"""Move fixed gains and shifts, which end a norm or stand on their own, into the layers around them.

    y = gamma n(x) + beta,  z = W y + b    =>    W' = W gamma,  b' = b + W beta,   y' = n(x)        (forwards)
    y = gamma (W x + b)                    =>    W' = gamma W,  b' = gamma b                        (backwards)

The first is a LayerNorm, RMSNorm, GroupNorm or InstanceNorm: its statistics stay, its gain and shift leave. The second
is a LayerScale, or any other product of an activation and a parameter. What was moved is dropped where the norm does
without, and is one and zero where it does not.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from normfuse import norms, surgery
from normfuse.affine import AffineMap
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.graph import ModelGraph, function_name
from normfuse.norms import Norm
from normfuse.operations import describe
from normfuse.routes import Plan, Router, finish, joined, require_no_hooks
from normfuse.scopes import common_tail

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_ARGUMENTS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias"),
    "rms_norm": ("input", "normalized_shape", "weight"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias"),
}
_READS_THE_NORMS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # of its children, in a fused kernel


@dataclass(slots=True)
class _Gain:
    """A gain and a shift that are parameters, and where they act.

    Attributes:
        module: Qualified name of the module that they belong to.
        gain: Qualified name of the parameter that multiplies; None for a norm that only adds.
        shift: Qualified name of the parameter that is added.
        calls: Per call: the values in and out, the nodes that read the parameters, and the map.
        is_norm: Whether a norm comes before, so that only the way forwards is open.
    """

    module: str
    gain: str | None
    shift: str | None
    is_norm: bool
    calls: list[_Call] = field(default_factory=list)

    @property
    def tensors(self) -> list[str]:
        """The names of the parameters."""
        return [name for name in (self.gain, self.shift) if name is not None]


@dataclass(frozen=True, slots=True)
class _Call:
    value: fx.Node
    node: fx.Node
    output: fx.Node


@dataclass(frozen=True, slots=True)
class _Fold:
    """What ``apply`` does."""

    tensors: dict[str, Tensor]
    edits: list[surgery.Edit]
    removed: list[fx.Node]


class FoldAffine(Pass):
    """Gains and shifts of norms forwards, LayerScale backwards."""

    name = "fold-affine"
    exactness = Exactness.EXACT

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield the products of activations and parameters, then the norms, that change anything."""
        found = norms.find_norms(graph)
        by_module = {norm.module: norm for norm in found if norm.module is not None}
        for gain in _products(graph, by_module):
            norm = by_module.get(gain.module)
            subject, layer = (norm.name, norm.layer) if norm and gain.is_norm else _described(gain, graph)
            yield Match(subject, layer, norm=gain.is_norm, payload=gain)
        for norm in found:
            gain = _of_norm(norm, graph)
            if gain is not None and not _is_trivial(gain, graph):
                yield Match(norm.name, norm.layer, payload=gain)
