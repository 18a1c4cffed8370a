"""Which calls of torch's norm functions are calls of one norm: those with the same arguments, but for their input.

    F.batch_norm(x, mean, var, gain_a)      F.batch_norm(y, mean, var, gain_b)      two norms on one set of statistics

A call on the parameters of a norm module, or inside its ``forward``, is one of that module, if there is but one such
norm; of several, the module is the one that it calls itself, or else the first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import fx

from normfuse.call_arguments import arguments_of
from normfuse.graph import ModelGraph, function_name
from normfuse.shown_tensors import shown_tensor

FUNCTIONS = ("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm")
_WITHOUT_EFFECT = ("input", "momentum", "cudnn_enabled", "cudnn_enable")  # on what is computed in eval mode
_DEFAULTS = {"training": False, "use_input_stats": True, "eps": 1e-5}


def groups(graph: ModelGraph, modules: Collection[str]) -> Iterator[tuple[str, str | None, list[fx.Node]]]:
    """Yield ``(name, module, calls)`` of every norm that is a call of a function.

    Args:
        graph: The captured model.
        modules: The names of its norm modules.
    """
    found: dict[tuple[str, Any], list[fx.Node]] = {}
    owners: dict[tuple[str, Any], str | None] = {}
    for node in graph.nodes:
        folded = node.meta.get("removed", False)
        if function_name(node) in FUNCTIONS and not folded and not graph.is_constant(node):
            owner = _owner(node, graph, modules)
            key = (scope_name(node) if owner is None else owner, _what_it_does(node, graph))
            found.setdefault(key, []).append(node)
            owners[key] = owner
    taken = {name for name in modules if graph.call_sites(name)}
    for key, nodes in found.items():
        owner = owners[key] if owners[key] not in taken else None
        name = owner or f"{scope_name(nodes[0])}:{function_name(nodes[0])}"
        alike = sum(other.startswith(name) for other in taken) if owner is None else 0
        name = f"{name}_{alike}" if alike else name
        taken.add(name)
        yield name, owner, nodes


def _owner(node: fx.Node, graph: ModelGraph, modules: Collection[str]) -> str | None:
    """Return the norm module on whose parameters, or inside whose ``forward``, the function is called."""
    shown = [shown_tensor(source, graph)[0] for source in node.all_input_nodes if graph.is_constant(source)]
    holders = [name.rpartition(".")[0] for name in shown if name is not None]
    inside = (call.name for call in reversed(node.meta.get("scope", ())))
    return next((name for name in (*holders, *inside) if name in modules), None)


def _what_it_does(node: fx.Node, graph: ModelGraph) -> Any:
    """Return the function and its arguments, but for its input."""
    given = {key: _hashable(value, graph) for key, value in arguments_of(node).items() if key not in _WITHOUT_EFFECT}
    told = {(key, value) for key, value in given.items() if value is not None and value != _DEFAULTS.get(key)}
    return function_name(node), frozenset(told)


def _hashable(value: Any, graph: ModelGraph) -> Any:
    """Return an argument as it compares: a tensor of the model by its name, a computed one by what computes it."""
    if isinstance(value, fx.Node) and graph.is_constant(value):
        parts = (*value.args, *value.kwargs.items())
        return shown_tensor(value, graph)[0] or (value.target, *(_hashable(part, graph) for part in parts))
    return tuple(_hashable(item, graph) for item in value) if isinstance(value, list | tuple) else value


def scope_name(node: fx.Node) -> str:
    """Return the name of the module in whose ``forward`` a node stands; empty for the model itself."""
    scope = node.meta.get("scope", ())
    return scope[-1].name if scope else ""
