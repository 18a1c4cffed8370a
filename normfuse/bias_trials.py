"""Whether a call that adds no bias would add the one that its layer could be given.

A ``forward`` that hands on ``self.bias``, and one that passes None, look alike where ``self.bias`` is None. So the
model is read twice: as it is, and with zeros in place of the None. The layer has a place for a bias if the second
reading is the first with the bias passed in every call on the layer's weight, and nothing else.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from normfuse import product_calls
from normfuse.base import Refused
from normfuse.call_arguments import arguments_of
from normfuse.capture import capture
from normfuse.errors import CaptureError
from normfuse.graph import ModelGraph
from normfuse.product_calls import ProductCall, shape_of_bias
from normfuse.shown_tensors import shown_tensor

_FOUND: weakref.WeakKeyDictionary[ModelGraph, dict[str, str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Place:
    """A bias that a layer lacks whose weight a function is called on, by their qualified names."""

    weight: str
    bias: str
    shape: tuple[int, ...]


def place_of_bias(weight: str, graph: ModelGraph) -> str | None:
    """Return the name of the bias that the calls on a weight would add if the layer had it, None if there is none."""
    if graph not in _FOUND:
        _FOUND[graph] = {place.weight: place.bias for place in _read(_places(graph), graph)}
    return _FOUND[graph].get(weight)


def filled_place(weight: str, graph: ModelGraph) -> str | None:
    """Return the name of the bias that a fold has given to the calls on a weight since the model was read."""
    bias = _FOUND.get(graph, {}).get(weight)
    return bias if bias is not None and isinstance(graph.tensor(bias), Tensor) else None


def _places(graph: ModelGraph) -> list[_Place]:
    found = {}
    for call in _calls(graph).values():
        bias = _missing_bias(call.weight, graph)
        if call.bias is None and bias is not None:
            found[bias] = _Place(call.weight, bias, shape_of_bias(call, graph))
    return list(found.values())


def _calls(graph: ModelGraph) -> dict[fx.Node, ProductCall]:
    found = {}
    for node in graph.nodes:
        with contextlib.suppress(Refused):
            call = product_calls.read(node, graph)
            if call is not None:
                found[node] = call
    return found


def _missing_bias(weight: str, graph: ModelGraph) -> str | None:
    """Return the name of the parameter ``bias`` beside a weight, if it is None."""
    owner = weight.rpartition(".")[0]
    held = graph.module(owner)._parameters
    return f"{owner}.bias".lstrip(".") if "bias" in held and held["bias"] is None else None


def _read(places: list[_Place], graph: ModelGraph) -> list[_Place]:
    """Return the places whose bias is read where it should be, halving the list where some are not."""
    if not places or _agree(places, graph):
        return places
    middle = len(places) // 2
    return [one for half in (places[:middle], places[middle:]) for one in _read(half, graph)] if middle else []


def _agree(places: list[_Place], graph: ModelGraph) -> bool:
    """Whether the model does the same with zeros for these biases, but that every call on the weights adds them."""
    try:
        as_it_is = _steps(capture(graph.root, graph.inputs), {place.weight: None for place in places})
        with _zeros(places, graph):
            tried = _steps(capture(graph.root, graph.inputs), {place.weight: place.bias for place in places})
    except CaptureError:
        return False
    return as_it_is == tried


@contextlib.contextmanager
def _zeros(places: list[_Place], graph: ModelGraph) -> Iterator[None]:
    """Give layers biases of zeros, for as long as the model is read."""
    held = [(graph.module(place.weight.rpartition(".")[0])._parameters, place) for place in places]
    try:
        for parameters, place in held:
            zeros = graph.tensor(place.weight).detach().new_zeros(place.shape)
            parameters[place.bias.rpartition(".")[2]] = nn.Parameter(zeros, requires_grad=False)
        yield
    finally:
        for parameters, place in held:
            parameters[place.bias.rpartition(".")[2]] = None


def _steps(graph: ModelGraph, biases: Mapping[str, str | None]) -> list[Any]:
    """Return what a reading did, step by step, in values that compare.

    Args:
        graph: The reading.
        biases: The bias that the calls on a weight should add, by the name of the weight; it is left out of their
            arguments, and whether it is the one is noted instead.
    """
    calls, index, steps = _calls(graph), {}, []
    for node in graph.nodes:
        call = calls.get(node)
        if node.op == "get_attr":
            index[node] = str(node.target)
        elif not _shows_any(node, {bias for bias in biases.values() if bias is not None}, graph):
            given: Any = (node.args, dict(node.kwargs))
            if call is not None and call.weight in biases:
                rest = {key: value for key, value in arguments_of(node).items() if key != "bias"}
                given = (rest, call.bias == biases[call.weight])
            index[node] = len(steps)
            steps.append((node.op, node.target, fx.map_arg(given, lambda n: ("value", index.get(n)))))
    return steps


def _shows_any(node: fx.Node, biases: set[str], graph: ModelGraph) -> bool:
    return bool(biases) and graph.is_constant(node) and shown_tensor(node, graph)[0] in biases
