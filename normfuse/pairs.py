"""Which layers can apply a norm that follows them, whatever its statistics and parameters will be.

A norm is paired with the layers whose output it normalizes: directly, or along operations that keep each value with its
channel (reshape, permute, cat, averages). It must be so in every reading of the model, in eval mode and in training
mode, since a model may do in training what its eval mode does not show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from normfuse import adapters, norms, numerics
from normfuse.absorbers import Absorber
from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.call_arguments import arguments_of
from normfuse.capture import record, trace
from normfuse.capture.leaves import base_layer
from normfuse.errors import CaptureError
from normfuse.graph import ModelGraph, function_name
from normfuse.legality import require_no_hooks, require_plain, require_unwatched
from normfuse.norms import Norm
from normfuse.operations import describe
from normfuse.patches import patched
from normfuse.routes import Plan, Router
from normfuse.scopes import common_tail

_KEEPS_CHANNELS = ("identity", "gather", "gather_copy", "avg_pool", "adaptive_avg_pool", "mean", "interpolate", "cat")
_VALUES = ("running_mean", "running_var", "weight", "bias")
_FIRST = 2  # the probe's value for channel 0: neither 0 nor 1, which say "nothing to do"


@dataclass(frozen=True, slots=True)
class Reading:
    """The model as read in one mode, and its norms by name."""

    graph: ModelGraph
    norms: dict[str, Norm]

    def reaches(self, name: str) -> bool:
        """Whether the norm of this name is called."""
        return name in self.norms and bool(self.norms[name].nodes)


@dataclass(frozen=True, slots=True)
class FoundPair:
    """How the layers before a norm apply it.

    Attributes:
        products: The layers that apply it, with the channels each makes.
        tail: What remains of the norm's own module.
        direct: Whether each call of the norm reads the value of one call of a layer, which nothing else reads.
        rank: How many axes a value must have at a call for that; None where the layers' values come another way.
    """

    products: dict[str, tuple[int, ...]]
    tail: tuple[str, ...]
    direct: bool
    rank: int | None


def readings(graph: ModelGraph) -> list[Reading]:
    """Return the captured model, and beside it the model in training mode where that can be read."""
    return [Reading(one, {norm.name: norm for norm in norms.find_norms(one)}) for one in (graph, *_in_training(graph))]


def _in_training(graph: ModelGraph) -> list[ModelGraph]:
    """Return the model as it is read in training mode, by a run on the same inputs or else by tracing, if it can be."""
    with contextlib.suppress(CaptureError):
        if graph.inputs is not None:
            return [record(graph.root, graph.inputs, training=True)]
    with contextlib.suppress(CaptureError):
        return [trace(graph.root, training=True)]
    return []


def find_pair(name: str, readings: list[Reading]) -> FoundPair:
    """Return how the norm is applied by the layers before it, the same in every reading that reaches it.

    Raises:
        Refused: It is not.
    """
    found: list[FoundPair] = []
    for reading in readings:
        if reading.reaches(name):
            norm, graph = reading.norms[name], reading.graph
            require_no_hooks(name, graph)
            _require_unpatched(name, graph)
            _require_own_values(norm, graph)
            products = _products(norm, graph)
            direct, rank = _is_direct(norm, products, graph), _rank_at_call(norm, graph)
            found.append(FoundPair(products, _tail(norm, graph), direct, rank))
    if not found:
        raise Refused(Reason.PARTIAL_CAPTURE, f"what calls {name} could not be traced", "pass example_inputs")
    if any(pair != found[0] for pair in found):
        raise Refused(Reason.OPAQUE_OPERATION, f"what leads to {name} is another in training mode than in eval mode")
    for product in found[0].products:
        if any(one.graph.uses(f"{product}.weight") and not one.reaches(name) for one in readings):
            raise Refused(Reason.SHARED_MODULE, f"{product} is called without {name} in training mode or in eval mode")
    return found[0]


def require_range(pair: FoundPair, norm: nn.Module, graph: ModelGraph) -> None:
    """Refuse where an effective weight could leave the range of a dtype of 16 bits.

    Raises:
        Refused: It could.
    """
    stored: Any = norm
    scale, _ = numerics.norm_affine(stored.running_mean, stored.running_var, stored.weight, None, stored.eps)
    for name in pair.products:
        weight: torch.Tensor = graph.module(name).weight  # type: ignore[assignment]
        largest = float(scale.abs().max()) * float(weight.detach().abs().max())
        if weight.dtype in (torch.float16, torch.bfloat16) and largest > torch.finfo(weight.dtype).max:
            raise Refused(
                Reason.RANGE, f"the effective weight of {name} could reach {largest:.3g}, beyond {weight.dtype}"
            )


def _require_unpatched(name: str, graph: ModelGraph) -> None:
    method = patched(graph.module(name))
    if method is not None:
        text = f"{name} computes by a {method} that was put on the instance, not by that of its class"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text, "undo the patch")


def _require_own_values(norm: Norm, graph: ModelGraph) -> None:
    """Refuse a norm whose own forward normalizes by anything but what the module stores, as it stores it."""
    assert norm.module is not None
    module = graph.module(norm.module)
    for node in norm.nodes:
        if node.op == "call_module" and (base_layer(module) is not None or adapters.is_known(module)):
            continue
        given = arguments_of(node) if function_name(node) == "batch_norm" else {"training": True}
        plain = all(_is(given.get(key), getattr(module, key), graph) for key in _VALUES)
        if given.get("training") or not plain or given.get("eps", 1e-5) != getattr(module, "eps", None):
            text = f"{norm.name} ({norm.layer}) does not normalize by its own running statistics, gain and shift"
            raise Refused(Reason.FORWARD_OVERRIDDEN, text)


def _is(argument: object, tensor: torch.Tensor | None, graph: ModelGraph) -> bool:
    if not isinstance(argument, fx.Node):
        return argument is tensor
    return argument.op == "get_attr" and graph.tensor(str(argument.target)) is tensor


def _products(norm: Norm, graph: ModelGraph) -> dict[str, tuple[int, ...]]:
    """Return the layers that make the norm's input, and which of its channels each makes.

    A map that has another value for every channel is sent along the route; where it arrives, it tells the channels.
    """
    plan, router = Plan(), Router(graph)
    running_mean: torch.Tensor = graph.module(norm.name).running_mean  # type: ignore[assignment]
    for node in norm.nodes:
        value, rank = _input_of(norm, node, graph)
        ids = torch.arange(running_mean.numel(), dtype=torch.float64) + _FIRST
        plan = router.backward(value, AffineMap.along(1, rank, ids, ids), node, plan)
    _require_keeping(plan, graph)
    require_unwatched(plan, graph)
    return {absorber.name: _channels(absorber, calls, graph) for (absorber, _), calls in plan.maps.items()}


def _input_of(norm: Norm, node: fx.Node, graph: ModelGraph) -> tuple[fx.Node, int]:
    """Return the value that a call normalizes and its rank; of a linear layer's value, 2 where no reading shows it."""
    try:
        return norms.input_of(norm, node, graph)
    except Refused as refused:
        made = [value for value in node.all_input_nodes if isinstance(graph.module_of(value), nn.Linear)]
        if refused.refusal.reason is not Reason.RANK_UNKNOWN or made != node.all_input_nodes[:1]:
            raise
        return made[0], 2


def _rank_at_call(norm: Norm, graph: ModelGraph) -> int | None:
    """Return how many axes the values have that the norm normalizes, where the layers that make them have as many."""
    read = [_input_of(norm, node, graph) for node in norm.nodes]
    made = all(isinstance(graph.module_of(value), nn.Linear | nn.modules.conv._ConvNd) for value, _ in read)
    ranks = {rank for _, rank in read}
    return ranks.pop() if made and len(ranks) == 1 else None


def _is_direct(norm: Norm, products: Collection[str], graph: ModelGraph) -> bool:
    calls = [node for name in products for node in graph.call_sites(name)]
    readers = [user for node in calls for user in node.users]
    read = [_input_of(norm, node, graph)[0] for node in norm.nodes]
    return set(read) == set(calls) and len(read) == len(calls) and set(readers) <= set(norm.nodes)


def _require_keeping(plan: Plan, graph: ModelGraph) -> None:
    """Refuse a route on which a value could lose its channel, change by a trained amount, or be dropped."""
    for node in plan.passed:
        operation, module = describe(node, graph), graph.module_of(node)
        drops = module.p > 0 if isinstance(module, _DropoutNd) else "drop" in operation.args.get("function", "")
        if operation.name not in _KEEPS_CHANNELS or drops or plan.pads:
            raise Refused(Reason.OPAQUE_OPERATION, f"{operation.label} lies between, which training can change")


def _require_called(absorber: Absorber, calls: Iterable[fx.Node], graph: ModelGraph) -> None:
    """Refuse a layer whose weight a function takes outside of its ``forward``: it would not see the norm."""
    for node in calls:
        inside = any(call.name == absorber.owner for call in node.meta.get("scope", ()))
        if node.op != "call_module" and not inside:
            text = f"{absorber.name} is not called: its weight is read by {describe(node, graph).label}"
            raise Refused(Reason.UNSUPPORTED_LAYER, text)


def _channels(absorber: Absorber, calls: dict[fx.Node, AffineMap], graph: ModelGraph) -> tuple[int, ...]:
    """Return the norm's channels in the order in which a layer makes them, if every call of it says the same."""
    module = graph.module(absorber.owner) if absorber.kind in ("conv", "linear") else None
    if module is None or not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{absorber.name} is not a convolution or linear layer")
    _require_unpatched(absorber.name, graph)
    if base_layer(module) is None and not adapters.pads_same(module):
        text = f"{absorber.name} ({type(module).__name__}) has a forward of its own"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text)
    _require_called(absorber, calls, graph)
    require_plain(absorber, graph)
    sites = graph.call_sites(absorber.name) or graph.uses(absorber.weight)
    first, *others = calls.values()
    if set(sites) != set(calls) or not all(m.equals(first) for m in others):
        raise Refused(Reason.SHARED_MODULE, f"{absorber.name} is called {len(sites)} times, not always by this norm")
    scale, shift = _vectors(absorber, first, module)
    if not torch.equal(scale, shift) or not torch.equal(scale, scale.round()):
        raise Refused(Reason.OPAQUE_OPERATION, f"the values of {absorber.name} are changed on the way to the norm")
    return tuple(int(value) - _FIRST for value in scale)


def _vectors(absorber: Absorber, m: AffineMap, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(module, nn.Linear):
        return m.vectors(-1, module.out_features, absorber.name)
    assert isinstance(module, nn.modules.conv._ConvNd)
    return m.vectors(-1 - len(module.kernel_size), module.out_channels, absorber.name)


def _tail(norm: Norm, graph: ModelGraph) -> tuple[str, ...]:
    """Return the layers inside the norm's module that run after the normalization, by their names in it."""
    assert norm.module is not None
    module = graph.module(norm.module)
    if adapters.is_known(module):
        known = adapters.frozen(module)
        return known.tail if known else ()
    if norm.nodes[0].op == "call_module":
        return ()
    names = common_tail(norm.nodes, norm.module, graph)
    prefix = f"{norm.module}." if norm.module else ""
    if names is None or not all(name.startswith(prefix) for name in names):
        raise Refused(Reason.FORWARD_OVERRIDDEN, f"{norm.name} ({norm.layer}) does more than normalize")
    return tuple(name.removeprefix(prefix) for name in names)
