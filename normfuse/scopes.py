"""What a module that was read through does, as a chain of its parts.

A norm may be written as a function call inside a module that does more (timm's ``BatchNormAct2d``: ``F.batch_norm``,
then its ``drop`` and ``act`` modules). If everything after one value of a module's body is a chain of module calls, the
module can be replaced by that chain without tracing its ``forward`` away.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from normfuse.graph import ModelGraph, ModuleCall, occurrences


def tail_after(value: fx.Node, call: ModuleCall, graph: ModelGraph) -> list[str] | None:
    """Return the names of the modules that turn ``value`` into the output of ``call``, in order.

    Returns:
        None where anything but a chain of module calls with one argument lies between.
    """
    names: list[str] = []
    while True:
        if call.single_output and call.outputs == (value,):
            return names
        step = _next_module(value, call, graph)
        if step is None:
            return None
        name, value = step
        names.append(name)


def common_tail(nodes: Iterable[fx.Node], module: str, graph: ModelGraph) -> list[str] | None:
    """Return the chain of modules that a module becomes if its operation ``nodes``, one per call, are taken out.

    Returns:
        None where a call does anything else, before or after, or the calls differ.
    """
    tails = [_tail_of_call(node, module, graph) for node in nodes]
    return tails[0] if tails and all(tail == tails[0] for tail in tails) else None


def _tail_of_call(node: fx.Node, module: str, graph: ModelGraph) -> list[str] | None:
    call = next((c for c in reversed(node.meta.get("scope", ())) if c.name == module), None)
    if call is None or call.inputs != tuple(n for n in node.all_input_nodes if not graph.is_constant(n)):
        return None
    return tail_after(node, call, graph)


def _next_module(value: fx.Node, call: ModuleCall, graph: ModelGraph) -> tuple[str, fx.Node] | None:
    """Return the one module, called directly by ``call``, that reads ``value``, and what it returns."""
    units = {unit_of(reader, call) for reader in value.users}
    if len(units) != 1:
        return None
    unit = units.pop()
    if isinstance(unit, fx.Node):
        plain = unit.op == "call_module" and occurrences(unit, value) == 1 and len(unit.args) == 1 and not unit.kwargs
        return (str(unit.target), unit) if plain else None
    if isinstance(unit, ModuleCall) and unit.inputs == (value,) and unit.single_output and len(unit.outputs) == 1:
        return unit.name, unit.outputs[0]
    return None


def unit_of(node: fx.Node, call: ModuleCall) -> fx.Node | ModuleCall | None:
    """Return what ``call`` itself runs that holds ``node``: the node, or the call of a child; None outside of it."""
    scope = node.meta.get("scope", ())
    if call not in scope:
        return None
    depth = scope.index(call)
    return node if depth == len(scope) - 1 else scope[depth + 1]


def head_before(value: fx.Node, call: ModuleCall, readers: list[fx.Node]) -> list[str] | None:
    """Return the names of the modules that turn the one input of ``call`` into ``value``, in order.

    Args:
        value: The last value of the chain; nothing but ``readers`` may read it, unless it is the input itself.
        call: The module call.
        readers: Nodes of the call.

    Returns:
        None where anything but a chain of module calls lies between, or something else reads a value of it.
    """
    names: list[str] = []
    allowed: set[fx.Node | ModuleCall | None] = {unit_of(reader, call) for reader in readers}
    while call.inputs != (value,):
        unit = unit_of(value, call)
        source = _only_input(unit, value)
        if source is None or {unit_of(user, call) for user in value.users} - allowed:
            return None
        names.insert(0, unit.name if isinstance(unit, ModuleCall) else str(unit.target))  # type: ignore[union-attr]
        value, allowed = source, {unit}
    return names


def _only_input(unit: fx.Node | ModuleCall | None, value: fx.Node) -> fx.Node | None:
    """Return the one value from which a module call makes ``value`` alone."""
    if isinstance(unit, ModuleCall):
        single = unit.outputs == (value,) and unit.single_output and len(unit.inputs) == 1
        return unit.inputs[0] if single else None
    if unit is None or unit.op != "call_module" or len(unit.all_input_nodes) != 1:
        return None
    return unit.all_input_nodes[0]
