"""Put Conv/Linear + BatchNorm pairs into Tune mode: trained, on fixed statistics, at the cost of the product alone.

    z = a (W x + b - mean) + beta = (a W) x + a (b - mean) + beta,    a = gamma / sqrt(var + eps)

evaluated at every call from the parameters as they are (arXiv 2305.11624). The gradients are those of eval mode; what
is computed and kept is what a folded model would. Only classes change, so nothing is lost and all can be undone.

:mod:`normfuse.pairs` says which layers can apply which norm. A norm that is not paired runs as in eval mode too. A
ReLU6 between paired layers keeps its output for backward, not its input as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from normfuse import adapters, moving_statistics, norms, pairs
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.capture.leaves import base_layer
from normfuse.graph import ModelGraph, has_hooks, is_uninitialized
from normfuse.layers.affine_inference import AffineInference
from normfuse.layers.change_of_class import enter
from normfuse.layers.handshake import Pair, Seat
from normfuse.layers.normalized_layer import Pairing
from normfuse.layers.tuned import Applied, FixedNorm, TunedNorm, TunedProduct, TunedReLU6


class TuneMode(Pass):
    """BatchNorm of every kind on fixed statistics, applied by the layer before it where there is one."""

    name = "tune-mode"
    exactness = Exactness.EXACT
    reversible = True

    def __init__(self) -> None:
        self._readings: list[pairs.Reading] = []

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every norm with running statistics, reached or not, and each ReLU6 between products."""
        if not self._readings or self._readings[0].graph is not graph:  # read once, while all layers are as they were
            self._readings = pairs.readings(graph)
        for norm in self._readings[0].norms.values():
            fixable = (
                norm.module is not None and norms.has_affine_form(norm, graph) and not _is_ours(norm.module, graph)
            )
            if fixable or moving_statistics.of_norm(norm, self._readings) is not None:
                yield Match(norm.name, norm.layer)
        reported = {name.partition(":")[0] for name in self._readings[0].norms}
        for name, module in graph.root.named_modules():
            if name not in reported and moving_statistics.of_layer(name, module) is not None:
                yield Match(name, type(module).__name__, norm=False)
        for name in _clamps([reading.graph for reading in self._readings]):
            yield Match(name, type(graph.module(name)).__name__, norm=False, payload=name)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Find the layers that make the norm's input; without them the norm only gets its statistics fixed."""
        if not match.norm:
            return moving_statistics.of_layer(match.subject, graph.module(match.subject)) or match
        moving = moving_statistics.of_norm(self._readings[0].norms[match.subject], self._readings)
        if moving is not None:
            return moving
        name, module = match.subject, graph.module(match.subject)
        if is_uninitialized(module):
            return Refusal(Reason.UNINITIALIZED, f"{name} has no values yet", "run the model once")
        if getattr(module, "running_mean", None) is None:
            return Refusal(Reason.BATCH_STATISTICS, f"{name} has no running statistics", "recalibrate it, or leave it")
        try:
            pair = pairs.find_pair(name, self._readings)
            pairs.require_range(pair, module, graph)
        except Refused as refused:
            return replace(match, remains=True, kept=refused.refusal, payload=None)
        return replace(match, partners=tuple(pair.products), payload=pair)

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Change the classes."""
        module = graph.module(match.subject)
        if not match.norm:
            enter(module, TunedReLU6)
        elif match.payload is None:
            if not adapters.is_known(module):  # a frozen norm has nothing to fix
                enter(module, FixedNorm)
        else:
            _join(match.subject, match.payload, graph)


def _is_ours(name: str, graph: ModelGraph) -> bool:
    return isinstance(graph.module(name), AffineInference)


def _join(name: str, found: pairs.FoundPair, graph: ModelGraph) -> None:
    """Let products apply a norm."""
    norm = graph.module(name)
    seats = [_seat(product, graph) for product in found.products]
    pair = Pair(_seat(name, graph), seats, found.direct, found.rank)
    for seat, channels in zip(pair.seats[1:], found.products.values(), strict=True):
        product = graph.module(seat.name)
        enter(product, TunedProduct, Pairing(pair, seat, _indices(channels, norm), adapters.pads_same(product)))
    enter(norm, TunedNorm, Applied(pair, pair.norm, found.tail))


def _seat(name: str, graph: ModelGraph) -> Seat:
    return Seat(name, graph.module(name.rpartition(".")[0]) if name else None)


def _indices(channels: tuple[int, ...], norm: nn.Module) -> slice | list[int] | None:
    """Return the shortest way to write channels down: None for all in order, a slice, or a list."""
    start, size = channels[0], len(channels)
    if channels != tuple(range(start, start + size)):
        return list(channels)
    running_mean: torch.Tensor = norm.running_mean  # type: ignore[assignment]
    return None if size == running_mean.numel() else slice(start, start + size)


def _clamps(graphs: list[ModelGraph]) -> list[str]:
    """Return the names of ReLU6 layers, called like that, whose value only convolutions and linear layers read."""
    readers: dict[str, list[nn.Module | None]] = {}
    for graph in graphs:
        for node in graph.nodes:
            module = graph.module_of(node)
            if module is not None and base_layer(module) in (nn.ReLU6, nn.Hardtanh) and not has_hooks(module):
                users = [None] if graph.partial else [graph.module_of(user) for user in node.users]
                readers.setdefault(str(node.target), []).extend(users)
    return [name for name, found in readers.items() if found and all(_keeps_its_input(m) for m in found)]


def _keeps_its_input(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and base_layer(module) is not None
