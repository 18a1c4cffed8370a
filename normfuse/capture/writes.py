"""What a traced model writes into a value: readers that come later read what was written.

    x.mul_(2)    x += y    torch.add(x, y, out=z)    F.relu(x, inplace=True)    nn.ReLU(inplace=True)(x)

A trace has a node for each operation, and names none for what an operation does to its operands. So, as in a recorded
run, the written value has the node of the operation from there on, and every view of the same storage an opaque one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from normfuse.call_arguments import arguments_of
from normfuse.capture.following import opaque
from normfuse.graph import function_name

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
_VIEWS = frozenset(
    name
    for line in (
        "view view_as reshape reshape_as flatten unflatten ravel transpose t T mT permute squeeze unsqueeze narrow",
        "select getitem pick chunk split tensor_split unbind hsplit vsplit expand expand_as movedim moveaxis swapaxes",
        "swapdims diagonal unfold real atleast_1d detach data alias contiguous to double float type type_as",
        "identity dropout",
    )
    for name in line.split()
)
"""Functions whose result may share the storage of their input."""


class Value(fx.Proxy):
    """A traced value whose augmented assignments are in-place operations, as those of tensors are."""


def _augmented(name: str) -> Callable[[Value, Any], fx.Proxy]:
    function = getattr(operator, f"i{name}")

    def assign(self: Value, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return assign


for _name in _OPERATORS:
    setattr(Value, f"__i{_name}__", _augmented(_name))


def follow(graph: fx.Graph) -> None:
    """Let every node that reads a value after an operation wrote to it read what was written, in place."""
    for node in list(graph.nodes):
        written = _written(node)
        if written is not None:
            node.meta["writes"] = (written,)
            _replace_later(written, node, graph)


def _written(node: fx.Node) -> fx.Node | None:
    """Return the value that an operation writes to, None for one that makes a new value."""
    target: Any = None
    if node.op == "call_module":
        target = node.args[0] if node.args and node.meta.get("inplace") else None
    elif node.op == "call_method":
        name = str(node.target)
        target = node.args[0] if name.endswith("_") and not name.endswith("__") else None
    elif node.op == "call_function":
        target = _written_by_function(node)
    return target if isinstance(target, fx.Node) else None


def _written_by_function(node: fx.Node) -> Any:
    name = str(getattr(node.target, "__name__", ""))
    if node.kwargs.get("out") is not None:
        return node.kwargs["out"]
    if (
        getattr(node.target, "__module__", "") == "_operator"
        and name.removeprefix("i") in _OPERATORS
        and name[0] == "i"
    ):
        return node.args[0]
    inplace = (name.endswith("_") and not name.endswith("__")) or arguments_of(node).get("inplace") is True
    return arguments_of(node).get("input", node.args[0] if node.args else None) if inplace else None


def _replace_later(written: fx.Node, by: fx.Node, graph: fx.Graph) -> None:
    order = {node: index for index, node in enumerate(graph.nodes)}
    storage = _storage(written)
    for node in [node for node in graph.nodes if order[node] < order[by] and _storage(node) is storage]:
        later = [user for user in node.users if order[user] > order[by]]
        if not later:
            continue
        new = by
        if node is not written:
            with graph.inserting_after(by):
                new = graph.create_node("call_function", opaque, (node, by), {})
            new.meta["scope"] = by.meta.get("scope", ())
        for user in later:
            user.replace_input_with(node, new)


def _storage(node: fx.Node) -> fx.Node:
    """Return the value whose storage a value shares, as far as operations may show one of another."""
    while True:
        source = _written(node) or (node.args[0] if node.args and _shows(node) else None)
        if not isinstance(source, fx.Node):
            return node
        node = source


def _shows(node: fx.Node) -> bool:
    return node.meta.get("identity", False) if node.op == "call_module" else function_name(node) in _VIEWS
