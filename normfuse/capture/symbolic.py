"""Read a model without an input, by symbolic tracing.

Where the whole model cannot be traced, each child is traced on its own, and each child of one that fails, down to the
leaves; the parts stand side by side in one graph. A caller outside a part is not seen then, so the capture is *partial*
and passes that cannot be undone refuse it.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from normfuse.capture import writes
from normfuse.capture.decisions import is_decided
from normfuse.capture.following import Follower, FunctionReader, opaque
from normfuse.capture.leaves import is_leaf
from normfuse.capture.modes import in_mode, unchanged
from normfuse.capture.questions import questions
from normfuse.capture.recorded import training_inside_eval
from normfuse.default_device import runs_users_code
from normfuse.errors import CaptureError
from normfuse.exclusive import exclusive
from normfuse.graph import ModelGraph, ModuleCall
from normfuse.named_tensors import tensor_names
from normfuse.patches import patched
from normfuse.surgery import module_names


@exclusive
@runs_users_code
def trace(model: nn.Module, *, training: bool = False) -> ModelGraph:
    """Trace ``model``, or every part of it that can be traced, in eval mode, or all but its norms in training mode.

    Raises:
        CaptureError: No part of it can be traced.
    """
    names = _Names(model)
    inside = frozenset() if training else training_inside_eval(model)
    with in_mode(model, training=training), torch.no_grad(), unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with questions(model) as asked:
            graph = _trace(model, names, inside)
    graph.asked = asked
    return graph


def _trace(model: nn.Module, names: _Names, training: frozenset[str]) -> ModelGraph:
    try:
        tracer = _trace_part(model, names)
    except Exception as error:
        parts = _trace_children(model, names)
        if not parts:
            text = f"no part of the model can be traced ({_first_line(error)}); pass example_inputs"
            raise CaptureError(text) from error
        return _side_by_side(model, parts, training)
    return ModelGraph(model, tracer.graph, calls=tracer.calls, training=training, decided=tracer.decided)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class _Names:
    """Qualified names, in the whole model, of its modules and tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.module = {key: names[0] for key, names in module_names(model).items()}
        self.tensor = tensor_names(model)


class _Tracer(fx.Tracer):
    """Traces through every module that is not a leaf, and notes which module call each node stems from."""

    def __init__(self, names: _Names) -> None:
        super().__init__(autowrap_functions=())
        self.names = names
        self.calls: list[ModuleCall] = []
        self.decided: set[str] = set()
        self.stack: tuple[ModuleCall, ...] = ()
        self.untraceable: dict[int, bool] = {}
        self.thread = threading.get_ident()  # torch hands the calls of every thread to a tracer
        self.constants = _Constants(self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A torch layer, or a subclass of one whose own ``forward`` cannot be traced."""
        return is_leaf(m) or (isinstance(m, _ConvNd | nn.Linear | _NormBase) and self._is_untraceable(m))

    def _is_untraceable(self, module: nn.Module) -> bool:
        if id(module) not in self.untraceable:
            self.constants.busy = True
            self.untraceable[id(module)] = not _can_trace(module, self.names)
            self.constants.busy = False
        return self.untraceable[id(module)]

    def path_of_module(self, mod: nn.Module) -> str:
        """Return the name in the whole model, whichever part is traced."""
        if id(mod) not in self.names.module:
            raise NameError("module is not installed as a submodule")
        return self.names.module[id(mod)]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Read a parameter by its name in the whole model, whichever part is traced."""
        traced = isinstance(attr_val, nn.Parameter) and threading.get_ident() == self.thread
        name = self.names.tensor.get(id(attr_val)) if traced else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Return the node of a tensor, which is not stored on the user's model."""
        return self.constants.node(a) if isinstance(a, Tensor) else super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the value of a node."""
        return writes.Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node that knows the module calls it stands in."""
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.stack
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a leaf as one node, and read through any other module."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if name not in self.decided and is_decided(_trace_part.__code__):
            self.decided.add(name)
        if self.is_leaf_module(m, name):
            result = self.create_proxy("call_module", name, args, kwargs)
            result.node.meta["inplace"] = getattr(m, "inplace", False) is True and not isinstance(m, _DropoutNd)
            result.node.meta["identity"] = isinstance(m, nn.Identity | _DropoutNd)
            return result
        entry = ModuleCall(name, inputs=_nodes((args, kwargs)))
        self.calls.append(entry)
        outer, self.stack = self.stack, (*self.stack, entry)
        try:
            result = forward(*args, **kwargs)
        finally:
            self.stack = outer
        entry.outputs, entry.single_output = _nodes(result), isinstance(result, fx.Proxy)
        return result


class _Constants(Follower):
    """Follows what a traced model makes of its buffers, which are no proxies: its code may depend on their values."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__(tracer.names.tensor)
        self.tracer = tracer

    def make(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Return a new node of the trace."""
        return self.tracer.create_node(op, target, args, kwargs)


class _ConstantReader(FunctionReader):
    """Hands every torch function that is called on no proxy to the follower of constants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _nodes((args, kwargs or {})):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    proxies: list[fx.Proxy] = []
    map_aggregate(value, lambda item: proxies.append(item) if isinstance(item, fx.Proxy) else None)
    return tuple(proxy.node for proxy in proxies if isinstance(proxy.node, fx.Node))


def _trace_part(module: nn.Module, names: _Names) -> _Tracer:
    """Trace one module with its optional arguments left at their defaults."""
    if (method := patched(module)) is not None:  # torch.fx would trace that of the class
        raise CaptureError(f"{method} of this {type(module).__name__} was replaced on the instance")
    tracer = _Tracer(names)
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    with _attributes_kept(module), _ConstantReader(tracer.constants):
        tracer.trace(module, concrete_args=defaults or None)
    writes.follow(tracer.graph)
    return tracer


@contextlib.contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Undo what a traced ``forward`` stored on its modules: it would be proxies of the trace."""
    kept = [(child, dict(vars(child))) for child in module.modules()]
    try:
        yield
    finally:
        for child, attributes in kept:
            vars(child).clear()
            vars(child).update(attributes)


def _can_trace(module: nn.Module, names: _Names) -> bool:
    try:
        _trace_part(module, names)
    except Exception:
        return False
    return True


def _trace_children(module: nn.Module, names: _Names) -> dict[str, _Tracer]:
    """Return the traces of the largest traceable descendants, by name."""
    parts: dict[str, _Tracer] = {}
    for child in module.children():
        if is_leaf(child):
            continue
        try:
            parts[names.module[id(child)]] = _trace_part(child, names)
        except Exception:
            parts.update(_trace_children(child, names))
    return parts


def _side_by_side(model: nn.Module, parts: dict[str, _Tracer], training: frozenset[str]) -> ModelGraph:
    graph, calls = fx.Graph(), []
    for tracer in parts.values():
        copied = _append(graph, tracer.graph)
        for call in tracer.calls:
            call.inputs = tuple(copied[node] for node in call.inputs)
            call.outputs = tuple(copied[node] for node in call.outputs)
            calls.append(call)
    return ModelGraph(model, graph, calls=calls, partial=tuple(parts), training=training)


def _append(graph: fx.Graph, part: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Copy a part's nodes; its inputs come from, and its output goes to, where nobody looks."""
    copied: dict[fx.Node, fx.Node] = {}
    for node in part.nodes:
        if node.op == "placeholder":
            copied[node] = graph.create_node("call_function", opaque, (), {})
        elif node.op == "output":
            copied[node] = graph.create_node("call_function", opaque, fx.map_arg(node.args, copied.__getitem__), {})
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        copied[node].meta = dict(node.meta)
    return copied
