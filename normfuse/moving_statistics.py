"""Stored statistics that Tune mode does not reach, so that training mode goes on moving them.

Tune mode fixes layers of torch's classes, where the layer itself is called. Two kinds are left: statistics that a
function is given (``F.batch_norm(x, bn.running_mean, ..., self.training)``), and those of layers of other classes.
Whether a function moves them is read from its arguments, in the model as it is in training mode.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from normfuse import adapters
from normfuse.base import Reason, Refusal
from normfuse.call_arguments import arguments_of
from normfuse.graph import function_name
from normfuse.layers.affine_inference import AffineInference
from normfuse.norms import Norm
from normfuse.pairs import Reading

_SWITCHES = {"batch_norm": ("training", False), "instance_norm": ("use_input_stats", True)}  # with their defaults
_BUFFERS = ("running_", "moving_")  # how the names of statistics begin


def of_norm(norm: Norm, readings: Sequence[Reading]) -> Refusal | None:
    """Return why the statistics of a norm are not fixed, if Tune mode does not reach them."""
    calls = [_calls(norm.name, reading) for reading in readings]
    if not any(calls):
        return None if norm.module is None else of_layer(norm.name, readings[0].graph.module(norm.module))
    if len(readings) > 1 and all(_switch(node) is False for node in calls[-1]):
        return None
    function = function_name(next(filter(None, calls))[0])
    owner = norm.name.partition(":")[0] or "the model"
    moves = "moves" if any(map(_switch, calls[-1])) else "may move"
    detail = f"F.{function} is given the statistics of {owner} and {moves} them in training mode"
    return Refusal(Reason.BATCH_STATISTICS, detail, "call a torch.nn layer in its place, or pass training=False")


def _calls(name: str, reading: Reading) -> list[fx.Node]:
    """Return the functions that are given the statistics of a norm, but for those that a layer of torch's calls."""
    if not reading.reaches(name):
        return []
    norm, graph = reading.norms[name], reading.graph
    own = norm.module is not None and isinstance(graph.module(norm.module), _NormBase)
    return [
        node
        for node in norm.nodes
        if function_name(node) in _SWITCHES
        and arguments_of(node).get("running_mean") is not None
        and not (own and any(call.name == norm.module for call in node.meta.get("scope", ())))
    ]


def _switch(node: fx.Node) -> object:
    """Return the argument of a function that says whether it normalizes by the batch, and moves statistics."""
    key, default = _SWITCHES[function_name(node)]
    return arguments_of(node).get(key, default)


def of_layer(name: str, layer: nn.Module) -> Refusal | None:
    """Return why the statistics of a layer are not fixed, if its class is not known and it stores some."""
    ours = isinstance(layer, AffineInference)
    if layer.fixed_in_training if ours else isinstance(layer, _NormBase) or adapters.is_known(layer):
        return None
    if not any(key.startswith(_BUFFERS) for key, buffer in layer._buffers.items() if buffer is not None):
        return None
    detail = f"{name} ({type(layer).__name__}) stores statistics of its own, which may move in training mode"
    return Refusal(Reason.BATCH_STATISTICS, detail, "call .eval() on it after .train()")
