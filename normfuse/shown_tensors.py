"""Which tensor of the model a constant of the graph shows: read through ``.data`` or ``.detach()``, or transposed."""

from __future__ import annotations

from typing import Any

from torch import fx

from normfuse.computed import makers
from normfuse.graph import ModelGraph, function_name

_UNCHANGED = ("data", "detach", "alias", "contiguous", "clone", "lift_fresh")
_TRANSPOSES = ("t", "T", "mT", "numpy_T", "transpose", "swapaxes", "swapdims", "permute")


def shown_tensor(node: fx.Node, graph: ModelGraph) -> tuple[str | None, bool]:
    """Return the name of the tensor of the model that a constant is, as it is or transposed; None if it is computed."""
    flipped = False
    while node.op != "get_attr":
        name, source = function_name(node), next(iter(node.all_input_nodes), None)
        if source is None or not (name in _UNCHANGED or _transposes(node, name, graph)):
            return None, False
        flipped, node = flipped != (name in _TRANSPOSES), source
    return str(node.target), flipped


def materializing(node: fx.Node, graph: ModelGraph) -> str:
    """Return what helps where a constant is computed: a parametrization can be made plain, other code cannot."""
    names = [str(origin.target) for origin in _origins(node)]
    made = any(".parametrizations." in f".{name}" or makers(graph.module(name.rpartition(".")[0])) for name in names)
    return "materialize it first" if made else ""


def _origins(node: fx.Node) -> list[fx.Node]:
    return [node] if node.op == "get_attr" else [origin for n in node.all_input_nodes for origin in _origins(n)]


def _transposes(node: fx.Node, name: str, graph: ModelGraph) -> bool:
    """Whether a node swaps the two axes of a matrix."""
    if name not in _TRANSPOSES or graph.value(node.all_input_nodes[0]).dim() != 2:
        return False
    parts = (*node.args[1:], *node.kwargs.values()) if node.target is not getattr else ()
    given = [axis % 2 for part in parts for axis in _flat(part)]
    return not given or given == [1, 0] or (name != "permute" and given == [0, 1])


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
