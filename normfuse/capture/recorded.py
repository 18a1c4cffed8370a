"""Read a model by following real runs of it, one for each example.

Every torch function that the model calls outside a leaf module becomes a node, and so does every call of a leaf module.
What bypasses the torch functions (a custom autograd function, a C++ operator) is caught one level lower, at the
dispatcher, so that no reader of a value goes unseen.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from normfuse.capture.decisions import is_decided
from normfuse.capture.following import Follower, FunctionReader, tensors_in
from normfuse.capture.leaves import is_leaf
from normfuse.capture.modes import in_mode, unchanged
from normfuse.capture.questions import questions
from normfuse.default_device import runs_users_code
from normfuse.errors import CaptureError
from normfuse.examples import Examples, Inputs, calls_of
from normfuse.exclusive import exclusive
from normfuse.graph import ModelGraph, ModuleCall, is_uninitialized, module_names
from normfuse.named_tensors import tensor_names
from normfuse.outputs import arguments, copied, leaves


@exclusive
@runs_users_code
def record(model: nn.Module, example_inputs: Inputs | Examples, *, training: bool = False) -> ModelGraph:
    """Run ``model`` once on each example and return what it did, the runs side by side, as a graph with shapes.

    The runs are in eval mode or, all but the norms, in training mode.

    Raises:
        CaptureError: The model raised an exception on one of them.
    """
    _require_values(model)
    inside = frozenset() if training else training_inside_eval(model)
    recorder = _Recorder(model)
    try:
        with questions(model) as asked:
            returned = [_run(recorder, call, training=training) for call in calls_of(example_inputs)]
    except Exception as error:
        raise CaptureError(_failure(error, example_inputs)) from error
    recorder.graph.output(recorder.ends)
    graph = ModelGraph(model, recorder.graph, calls=recorder.calls, training=inside, inputs=example_inputs)
    graph.asked, graph.returned, graph.strangers = asked, tuple(returned), tuple(recorder.strangers)
    graph.decided = recorder.decided
    return graph


def _run(recorder: _Recorder, call: Inputs, *, training: bool) -> dict[str, Any]:
    """Run the model on one example, and return what it returned."""
    args, kwargs = arguments(copied(call))
    with in_mode(recorder.model, training=training), torch.no_grad(), unchanged(recorder.model):
        output = recorder.run(args, kwargs)
        recorder.end_run(output)
        return leaves(output)


def _failure(error: Exception, inputs: Inputs | Examples) -> str:
    text = f"the model does not run on the example inputs: {_one_line(error)}"
    one = isinstance(inputs, list) and len(calls_of(inputs)) == 1
    return f"{text} (the list is one argument; several calls are normfuse.Examples(...))" if one else text


def _require_values(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_uninitialized(module):
            raise CaptureError(f"{name or 'the model'} ({type(module).__name__}) has no values yet: run the model once")


def training_inside_eval(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules that are in training mode inside a model in eval mode."""
    return frozenset() if model.training else frozenset(n for n, m in model.named_modules() if m.training)


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


class _Recorder(Follower):
    """Builds the graph while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(tensor_names(model))
        self.model = model
        self.graph = fx.Graph()
        self.scope: tuple[ModuleCall, ...] = ()
        self.runs = 0
        self.calls: list[ModuleCall] = []
        self.strangers: dict[nn.Module, None] = {}
        self.decided: set[str] = set()
        self.ends: list[Any] = []
        self.module_name = {key: names[0] for key, names in module_names(model).items()}

    def make(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Return a new node, which knows its run and the calls of modules around it."""
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["scope"], node.meta["run"] = self.scope, self.runs
        return node

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model with everything it does followed."""
        for index, tensor in enumerate(tensors_in((args, kwargs))):
            node = self.graph.placeholder(f"input_{index}")
            node.meta["run"] = self.runs
            self.bind(tensor, node)
        with self._intercept_modules(), _DispatchReader(self), FunctionReader(self):
            return self.model(*args, **kwargs)

    def end_run(self, output: Any) -> None:
        """Note what a run returned and what it left behind; the next one starts with no value known."""
        self.ends.append(self.nodes_of((output, self.kept())))
        self.node_of = WeakTensorKeyDictionary()
        self.runs += 1

    def kept(self) -> list[Tensor]:
        """Return the values of the run that modules keep as attributes, where the caller may read them.

        A tensor of the model that was cast to the dtype it has is the value of the cast, and is not kept by the run.
        """
        held = [tensor for module in self.model.modules() for tensor in tensors_in(vars(module))]
        followed = [t for t in held if t in self.node_of and self.node_of[t].op != "get_attr"]
        return [t for t in followed if id(t) not in self.tensor_name or self.node_of[t].meta.get("constant") is False]

    # modules

    def call_module(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one module call: as one node for a leaf, read through otherwise."""
        name = self.module_name.get(id(module))
        if not self.busy and name is None:
            self.strangers[module] = None
        if self.busy or name is None:
            return call(*args, **kwargs)
        if name not in self.decided and is_decided(_Recorder.run.__code__):
            self.decided.add(name)
        if is_leaf(module):
            return self.record("call_module", name, call, args, kwargs)
        given = tuple(self.node(tensor) for tensor in tensors_in((args, kwargs)))
        entry = ModuleCall(name, inputs=given, run=self.runs)
        self.calls.append(entry)
        outer, self.scope = self.scope, (*self.scope, entry)
        try:
            result = call(*args, **kwargs)
        finally:
            self.scope = outer
        entry.outputs = tuple(self.node(tensor) for tensor in tensors_in(result))
        entry.single_output = isinstance(result, Tensor)
        return result

    @contextlib.contextmanager
    def _intercept_modules(self) -> Iterator[None]:
        original, thread = nn.Module.__call__, threading.get_ident()

        def intercepted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:  # a model that runs meanwhile is none of ours
                return original(module, *args, **kwargs)
            return self.call_module(module, lambda *a, **k: original(module, *a, **k), args, kwargs)

        nn.Module.__call__ = intercepted  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]


class _DispatchReader(TorchDispatchMode):
    """Hands the operators that no torch function announced to the recorder."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping the handler: the wrapper would import the whole compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recorder.busy:
            return func(*args, **(kwargs or {}))
        return self.recorder.record("call_function", func, func, args, kwargs or {})
