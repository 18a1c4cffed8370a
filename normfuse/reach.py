"""Which layers no captured run reached, and which of those a fold concerns.

A run shows one path through a model. A layer off that path (the norm of another domain, a branch behind an argument)
keeps its weights; but where it stands in code that sees a value which a fold changed, it could be given that value.
Code sees the values that its own ``forward`` makes and what the modules that it calls return; a layer is called by
the nearest module around it that ran.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from normfuse.capture import capture
from normfuse.capture.leaves import is_leaf
from normfuse.errors import CaptureError
from normfuse.examples import Examples, Inputs
from normfuse.graph import ModelGraph

_DROPS = ("DropPath", "DropBlock2d", "StochasticDepth")  # of timm and torchvision


def unreached(graph: ModelGraph) -> list[str]:
    """Return the names of the modules with a ``forward`` that the captured run neither called nor read a tensor of.

    What is inside a layer that is read as one operation is not looked at, nor is what does nothing in eval mode.
    """
    called = {call.name for call in graph.calls} | {""}
    inside: tuple[str, ...] = ()
    names = []
    for name, module in graph.root.named_modules():
        if name.startswith(inside) or ".parametrizations." in f".{name}":
            continue
        if is_leaf(module):
            inside = (*inside, f"{name}." if name else "")
        tensors = (*module._parameters.keys(), *module._buffers.keys())
        used = any(graph.uses(f"{name}.{key}") for key in tensors)
        if not (name in called or graph.call_sites(name) or used or _does_nothing(module)):
            names.append(name)
    return [name for name in names if not _runs_by_a_method(name, graph)]


def _runs_by_a_method(name: str, graph: ModelGraph) -> bool:
    """Whether something holds a method of a module (``self.run = self.block.forward``) in which a layer ran."""
    ran = {str(node.target) for node in graph.nodes if node.op == "call_module"} | {call.name for call in graph.calls}
    inside = any(one.startswith(f"{name}.") for one in ran)
    return inside and graph.holders.frozen(graph.module(name)) is not None


def _does_nothing(module: nn.Module) -> bool:
    """Whether a module cannot be called, or returns in eval mode what it is given."""
    if getattr(type(module), "forward", None) is nn.Module.forward or isinstance(module, _DropoutNd | nn.Identity):
        return True
    return type(module).__name__ in _DROPS


def concerned(names: list[str], first: ModelGraph, changed_scopes: set[str]) -> list[str]:
    """Return which of the unreached modules stand in code that sees a changed value.

    Args:
        names: Of modules that the graph ``first`` does not reach.
        first: The model as it was read before any pass.
        changed_scopes: See :class:`normfuse.graph.ModelGraph`.
    """
    called = {call.name for call in first.calls} | {""}

    def caller(name: str) -> str:
        outer = name.rpartition(".")[0]
        return outer if outer in called else caller(outer)

    return [name for name in names if caller(name) in changed_scopes]


def not_run(names: list[str], model: nn.Module, inputs: Inputs | Examples | None) -> list[str]:
    """Return which modules do not run, also not by a direct call of their ``forward``, which no reader sees."""
    ran: set[str] = set()
    attributes = {name: vars(model.get_submodule(name)) for name in names}
    own = {name: held["forward"] for name, held in attributes.items() if "forward" in held}
    for name, held in attributes.items():
        held["forward"] = _watched(model.get_submodule(name).forward, functools.partial(ran.add, name))
    try:
        with contextlib.suppress(CaptureError):  # a layer that runs now may not be traced through
            capture(model, inputs)
    finally:
        for held in attributes.values():
            del held["forward"]
        for name, forward in own.items():
            attributes[name]["forward"] = forward
    return [name for name in names if name not in ran]


def _watched(forward: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        note()
        return forward(*args, **kwargs)

    return watched
