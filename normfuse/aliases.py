"""Where an identity in the place of a norm would let somebody write into a value that others read.

A norm returns a new tensor; an identity returns what it is given. An in-place operation behind it, ``relu_`` or
``y += z``, then writes into the input of the norm.
"""

from __future__ import annotations

from torch import fx

from normfuse.base import Reason, Refused
from normfuse.graph import ModelGraph
from normfuse.operations import describe


def require_unwritten(name: str, value: fx.Node, returned: fx.Node, graph: ModelGraph) -> None:
    """Refuse to let an identity stand for a norm whose result is written to, where others hold its input.

    Args:
        name: Qualified name of the norm.
        value: What it is given.
        returned: What it returns.
        graph: The model.

    Raises:
        Refused: An operation writes to it, and the input is one of the model, or is read elsewhere as well.
    """
    write = next((node for node in graph.writers if any(_storage(t, graph) is returned for t in _written(node))), None)
    holder = _holder(value, graph) if write is not None else ""
    if write is not None and holder:
        text = f"{describe(write, graph).label} writes into what {name} returns; without it that would be {holder}"
        raise Refused(Reason.EXTRA_CONSUMER, text)


def _written(node: fx.Node) -> tuple[fx.Node, ...]:
    return node.meta.get("writes", ())


def _holder(value: fx.Node, graph: ModelGraph) -> str:
    """Return who else holds a value, in words; empty where nobody does."""
    while True:
        if value.op == "placeholder":
            return "an input of the model"
        if value.op == "get_attr":
            return f"{value.target}, a tensor of the model"
        if len(graph.consumers(value)) > 1:
            return f"{describe(value, graph).label}, which is also read elsewhere"
        source = _source(value, graph)
        if source is None:
            return ""
        value = source


def _storage(node: fx.Node, graph: ModelGraph) -> fx.Node:
    """Return the value whose storage a value shares, as far as its operations may show one of another."""
    while (source := _source(node, graph)) is not None:
        node = source
    return node


def _source(node: fx.Node, graph: ModelGraph) -> fx.Node | None:
    if _written(node):
        return _written(node)[0]
    operation = describe(node, graph)
    return operation.inputs[0] if operation.name in ("identity", "gather") and operation.inputs else None
