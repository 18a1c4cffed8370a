"""Equalize the ranges of channels between layers, so that eight bits for all of them lose less.

    z = W2 f(W1 x + b1) + b2,   f(s y) = s f(y) for s > 0        (ReLU, pooling, no activation at all, ...)

    W1' = W1 / s,   b1' = b1 / s,   W2' = W2 s                    (s per channel between the layers)

An activation has one scale for all channels, so a channel of small range keeps few of its bits. With ``r1`` the range
of a channel of the activation and ``r2`` that of the weights that read it,

    s = sqrt(r1 / r2)        makes both equal, r1 / s = r2 s = sqrt(r1 r2)     (DFQ, arXiv 1906.04721)
    s = r1                   where each channel has weights of its own (depthwise), whose scale is free

DFQ has no data and takes the range of ``W1``'s rows for ``r1``; with data it is what the activation reaches. ReLU6 is
not homogeneous. DFQ makes it a ReLU, which is another function; here its bound becomes ``6 / s``, one per channel,
which is exact. The map travels by :mod:`normfuse.routes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse import absorbers
from normfuse.affine import AffineMap
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.calibration import Batches, Calibration
from normfuse.capture import eval_mode
from normfuse.graph import ModelGraph
from normfuse.legality import finish, require_replaceable
from normfuse.operations import describe
from normfuse.outputs import arguments
from normfuse.routes import Plan, Router

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LARGEST = 2.0**10
"""The most that a channel is scaled against another; channels of next to no range would otherwise leave float32."""


@dataclass(frozen=True, slots=True)
class _Rescale:
    """What ``apply`` does at one layer."""

    tensors: dict[str, Tensor]
    clamp: str | None
    bound: Tensor
    dim: int
    changed: set[fx.Node]


class EqualizeRanges(Pass):
    """Conv and Linear layers whose output channels other layers can scale back.

    Args:
        calibration: What the ranges of the activations are taken from: an item, or an iterable of items, each as
            example inputs are. Without it, the ranges of the weights stand for them.
    """

    name = "equalize-ranges"
    exactness = Exactness.EXACT

    def __init__(self, calibration: Calibration | None = None) -> None:
        self.calibration = calibration
        self._reached: dict[str, tuple[Tensor, Tensor]] = {}

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every Conv and Linear, in order of execution."""
        if self.calibration is not None and not self._reached:
            self._reached = _reach(graph.root, self.calibration)
        for node in graph.nodes:
            if isinstance(graph.module_of(node), (*CONVOLUTIONS, nn.Linear)):
                name = str(node.target)
                yield Match(name, type(graph.module(name)).__name__, norm=False, payload=node)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Find who reads the channels, and work out scales and new tensors."""
        node: fx.Node = match.payload
        try:
            clamp = _clamp(node, graph)
            axis, rank = _axis(node, graph)
            readers = _readers(clamp or node, axis, rank, graph)
            scale = self._scale(node, clamp, readers, graph)
            plan = _plan(node, clamp or node, AffineMap.along(axis, rank, scale, torch.zeros_like(scale)), graph)
            tensors = finish(plan, graph)
        except Refused as refused:
            return refused.refusal
        partners = tuple(name for name in plan.partners if name != match.subject)
        highest = float(graph.module_of(clamp).max_val) if clamp is not None else 0.0  # type: ignore[union-attr, arg-type]
        path = str(clamp.target) if clamp is not None else None
        return replace(match, partners=partners, payload=_Rescale(tensors, path, highest / scale, axis, plan.changed))

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Assign the new tensors, and give a ReLU6 between the layers a bound for each channel."""
        rescale: _Rescale = match.payload
        graph.note_changed(rescale.changed)
        graph.assign(rescale.tensors)
        if rescale.clamp is not None:
            kwargs = {"channels": rescale.bound.numel(), "dim": rescale.dim}
            spec = {"class": "normfuse.layers.deployed.ChannelClamp", "kwargs": kwargs}
            graph.perform({"op": "replace", "path": rescale.clamp, "module": spec})
            graph.assign({f"{rescale.clamp}.bound": rescale.bound})

    def _scale(self, node: fx.Node, clamp: fx.Node | None, readers: Sequence[nn.Module], graph: ModelGraph) -> Tensor:
        """Return s, ``(C,)``, such that the largest range stays as it is."""
        own = self._range(node, clamp, graph)
        weights = torch.stack([_columns(layer, own.numel()) for layer in readers]).amax(0)
        alive = (own > 0) & (weights > 0)
        if not bool(alive.any()):
            raise Refused(Reason.NOT_CHEAPER, f"no channel of {node.target} is used")
        free = bool(self._reached) and all(_depthwise(layer) for layer in readers)
        scale = own.clone() if free else (own / weights).sqrt()
        scale = scale.where(alive, scale[alive].max())
        scale = scale.clamp(min=float(scale.max()) / LARGEST)
        scale = scale * float((own / scale)[alive].max() / own[alive].max())
        return scale.where(alive, 1.0)

    def _range(self, node: fx.Node, clamp: fx.Node | None, graph: ModelGraph) -> Tensor:
        """Return the range of each channel, as what reads it sees it."""
        module: Any = graph.module_of(node)
        if str(node.target) not in self._reached:
            return module.weight.detach().double().flatten(1).abs().amax(1)
        low, high = self._reached[str(node.target)]
        user = _next(node, graph)
        rectified = clamp is not None or (user is not None and describe(user, graph).name == "relu")
        values = high.clamp(min=0) if rectified else torch.maximum(high.abs(), low.abs())
        return values.clamp(max=float(graph.module_of(clamp).max_val)) if clamp is not None else values  # type: ignore[union-attr, arg-type]


def _reach(model: nn.Module, calibration: Calibration) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the least and the largest value of each output channel of every Conv and Linear on the data."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, _args: Any, output: Tensor) -> None:
            axis = 1 if isinstance(module, CONVOLUTIONS) and output.dim() == len(module.kernel_size) + 2 else -1
            rows = output.detach().double().movedim(axis, 0).flatten(1)
            low, high = rows.amin(1).cpu(), rows.amax(1).cpu()
            old = found.get(name, (low, high))
            found[name] = torch.minimum(low, old[0]), torch.maximum(high, old[1])

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))}
    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        with torch.no_grad(), eval_mode(model):
            for batch in Batches(calibration, model):
                args, kwargs = arguments(batch.inputs)
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _axis(node: fx.Node, graph: ModelGraph) -> tuple[int, int]:
    """Return the axis of the channels of a layer's output, and its rank."""
    module: Any = graph.module_of(node)
    if isinstance(module, CONVOLUTIONS):
        return 1, len(module.kernel_size) + 2
    shape = graph.shape(node)
    if shape is None:
        raise Refused(
            Reason.RANK_UNKNOWN, f"the rank of the output of {node.target} is not known", "pass example_inputs"
        )
    return len(shape) - 1, len(shape)


def _clamp(node: fx.Node, graph: ModelGraph) -> fx.Node | None:
    """Return the ReLU6 that alone reads a layer, None where something else does."""
    user = _next(node, graph)
    if user is None or type(graph.module_of(user)) is not nn.ReLU6:
        return None
    name = str(user.target)
    require_replaceable(name, graph)
    if len(graph.call_sites(name)) > 1:
        text = f"{name} is called {len(graph.call_sites(name))} times, and would need bounds of its own each time"
        raise Refused(Reason.SHARED_MODULE, text, "pass duplicate_shared=True")
    return user


def _next(node: fx.Node, graph: ModelGraph) -> fx.Node | None:
    """Return what alone reads a value, past what hands it on as it is; None where several do."""
    users = graph.consumers(node)
    while len(users) == 1 and users[0].op != "output" and describe(users[0], graph).name == "identity":
        users = graph.consumers(users[0])
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _readers(value: fx.Node, axis: int, rank: int, graph: ModelGraph) -> Sequence[nn.Module]:
    """Return the layers that would scale the channels back.

    Raises:
        Refused: Something else reads them as well.
    """
    probe = AffineMap.along(axis, rank, torch.full((1,), 2.0), torch.zeros(1))
    plan = Router(graph).forward(value, probe, Plan())
    found = [graph.module(absorber.name) for absorber, _ in plan.maps]
    plain = [layer for layer in found if isinstance(layer, (*CONVOLUTIONS, nn.Linear))]
    if len(plain) < len(found) or not plain:
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{plan.partners} take no ranges of channels")
    return plain


def _plan(node: fx.Node, value: fx.Node, m: AffineMap, graph: ModelGraph) -> Plan:
    """Return the plan in which a layer writes less by the map, and all readers undo it."""
    absorber = absorbers.output_side(node, graph)
    if absorber is None:
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{node.target} takes no scale")
    if m.is_identity:
        raise Refused(Reason.NOT_CHEAPER, f"the channels of {node.target} are equal already")
    plan = Plan()
    plan.add(absorber, "output", node, AffineMap(1 / m.scale, torch.zeros_like(m.shift)))
    return Router(graph).forward(value, m, plan)


def _depthwise(layer: Any) -> bool:
    """Whether each input channel has weights, and so a weight scale, of its own."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels


def _columns(layer: Any, channels: int) -> Tensor:
    """Return the largest weight of each of the channels that a layer reads.

    Raises:
        Refused: The layer reads the channels as something else, such as a flattened picture.
    """
    weight = layer.weight.detach().double().abs()
    if isinstance(layer, nn.Linear):
        found = weight.amax(0)
        found = found.reshape(channels, -1).amax(1) if found.numel() % channels == 0 else found
    else:  # (out, in/groups, *kernel) -> (groups, out/groups, in/groups, rest)
        grouped = weight.reshape(layer.groups, -1, weight.shape[1], weight[0, 0].numel())
        found = grouped.amax((1, 3)).flatten()
    if found.numel() != channels:
        raise Refused(Reason.AXIS, f"a layer reads {found.numel()} channels where {channels} were written")
    return found
