"""Read a model by following real runs of it, one for each example.

Every torch function that the model calls outside a leaf module becomes a node, and so does every call of a leaf module.
Tensors are followed by identity. What bypasses the torch functions (a custom autograd function, a C++ operator) is
caught one level lower, at the dispatcher, so that no reader of a value goes unseen. An in-place operation gives its
tensor a new node, and every view of the same storage an opaque one.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from normfuse.capture.leaves import is_leaf
from normfuse.capture.modes import in_mode, unchanged
from normfuse.capture.questions import questions
from normfuse.errors import CaptureError
from normfuse.examples import Examples, Inputs, calls_of
from normfuse.exclusive import exclusive
from normfuse.graph import ModelGraph, ModuleCall, is_uninitialized, module_names
from normfuse.named_tensors import named_tensors
from normfuse.outputs import arguments, copied, leaves

_METADATA = frozenset(
    name
    for line in (
        "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex element_size",
        "storage_offset get_device type __len__ __hash__ __get__ data_ptr is_pinned has_names is_signed is_inference",
        "is_conj is_neg untyped_storage __repr__ __format__ dim_order is_same_size",
    )
    for name in line.split()
)


@exclusive
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


class _Recorder:
    """Builds the graph while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graph = fx.Graph()
        self.calls: list[ModuleCall] = []
        self.strangers: dict[nn.Module, None] = {}
        self.ends: list[Any] = []
        self.scope: tuple[ModuleCall, ...] = ()
        self.busy = False
        self.node_of = WeakTensorKeyDictionary()
        self.module_name = {key: names[0] for key, names in module_names(model).items()}
        self.tensor_name = {id(tensor): name for name, tensor in reversed(list(named_tensors(model)))}

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model with everything it does followed."""
        for index, tensor in enumerate(_tensors((args, kwargs))):
            node = self.graph.placeholder(f"input_{index}")
            node.meta["run"] = len(self.ends)
            self._bind(tensor, node)
        with self._intercept_modules(), _DispatchReader(self), _FunctionReader(self):
            return self.model(*args, **kwargs)

    def end_run(self, output: Any) -> None:
        """Note what a run returned and what it left behind; the next one starts with no value known."""
        self.ends.append(self.nodes_of((output, self.kept())))
        self.node_of = WeakTensorKeyDictionary()

    def kept(self) -> list[Tensor]:
        """Return the values of the run that modules keep as attributes, where the caller may read them.

        A parameter that was cast to the dtype it has is the value of the cast, and is not kept by the run.
        """
        held = [tensor for module in self.model.modules() for tensor in _tensors(vars(module))]
        values = [t for t in held if not isinstance(t, nn.Parameter)]
        return [t for t in values if t in self.node_of and self.node_of[t].op != "get_attr"]

    # values to nodes

    def nodes_of(self, value: Any) -> Any:
        """Return ``value`` with every tensor in it replaced by its node."""
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, Mapping):
            return {str(key): self.nodes_of(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return (
                type(value)(map(self.nodes_of, value))
                if type(value) in (list, tuple)
                else tuple(map(self.nodes_of, value))
            )
        if isinstance(value, slice):
            return slice(self.nodes_of(value.start), self.nodes_of(value.stop), self.nodes_of(value.step))
        held = _tensors(value)
        return [self._node(tensor) for tensor in held] if held else value

    def _node(self, tensor: Tensor) -> fx.Node:
        node = self.node_of.get(tensor)
        if node is None:
            name = self.tensor_name.get(id(tensor))
            node = self._make("call_function", opaque, (), {}) if name is None else self.graph.get_attr(name)
            node.meta["run"] = len(self.ends)
            self._bind(tensor, node)
        return node

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta.setdefault("shape", tuple(tensor.shape))
        node.meta.setdefault("dtype", tensor.dtype)
        self.node_of[tensor] = node

    def _make(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["scope"], node.meta["run"] = self.scope, len(self.ends)
        return node

    # operations to nodes

    def record(
        self, op: str, target: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one operation and add the node for it; return its result."""
        inputs = _tensors((args, kwargs))
        versions = [_version(tensor) for tensor in inputs]
        node_args, node_kwargs = self.nodes_of(args), self.nodes_of(kwargs)
        self.busy = True
        try:
            result = call(*args, **kwargs)
        finally:
            self.busy = False
        mutated = [t for t, version in zip(inputs, versions, strict=True) if _version(t) != version]
        outputs = _tensors(result)
        if not outputs and not mutated and _is_metadata(target):
            return result
        node = self._make(op, target, node_args, node_kwargs)
        self._bind_result(node, result, outputs, mutated)
        return result

    def _bind_result(self, node: fx.Node, result: Any, outputs: list[Tensor], mutated: list[Tensor]) -> None:
        for tensor in mutated:
            self._invalidate_views(tensor, node)
            self.node_of[tensor] = node
        if isinstance(result, Tensor):
            self._bind(result, node)
        elif isinstance(result, list | tuple) and all(isinstance(item, Tensor) for item in result):
            for index, item in enumerate(result):
                self._bind(item, self._make("call_function", pick, (node, index), {}))
        else:
            for tensor in outputs:
                self._bind(tensor, self._make("call_function", opaque, (node,), {}))

    def _invalidate_views(self, mutated: Tensor, node: fx.Node) -> None:
        storage = _storage(mutated)
        if storage is None:
            return
        for tensor, old in list(self.node_of.items()):
            if tensor is not mutated and _storage(tensor) == storage and old.op != "get_attr":
                self.node_of[tensor] = self._make("call_function", opaque, (old, node), {})

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
        if is_leaf(module):
            return self.record("call_module", name, call, args, kwargs)
        given = tuple(self._node(tensor) for tensor in _tensors((args, kwargs)))
        entry = ModuleCall(name, inputs=given, run=len(self.ends))
        self.calls.append(entry)
        outer, self.scope = self.scope, (*self.scope, entry)
        try:
            result = call(*args, **kwargs)
        finally:
            self.scope = outer
        entry.outputs = tuple(self._node(tensor) for tensor in _tensors(result))
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


class _FunctionReader(TorchFunctionMode):
    """Hands every torch function of the run to the recorder."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recorder.busy:
            return func(*args, **(kwargs or {}))
        return self.recorder.record("call_function", func, func, args, kwargs or {})


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


def opaque(*values: Any) -> Any:
    """Stand in a graph for a value whose origin torch does not show."""
    raise RuntimeError("an opaque value cannot be computed")


def pick(values: Any, index: int) -> Any:
    """Return one of the tensors that an operation returned together."""
    return values[index]


def _tensors(value: Any, seen: frozenset[int] = frozenset()) -> list[Tensor]:
    """Return the tensors in nested containers and records, in order; ``seen`` are the records around ``value``."""
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, _ATOMS) or id(value) in seen:
        return []
    if isinstance(value, slice):
        return _tensors((value.start, value.stop, value.step))
    items = _items(value)
    inner = seen | {id(value)} if items else seen
    return [tensor for item in items for tensor in _tensors(item, inner)]


_ATOMS = (int, float, complex, str, bytes, enum.Enum, nn.Module, type, torch.dtype, torch.device, torch.Generator)


def _items(value: Any) -> list[Any]:
    """Return what a container holds, or a record such as a dataclass or a detector's instances, slots included."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if callable(value):
        return []
    slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
    return [*(getattr(value, name, None) for name in slots), *getattr(value, "__dict__", {}).values()]


def _names(slots: Any) -> list[str]:
    return [name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__")]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def _is_metadata(target: Any) -> bool:
    return getattr(target, "__name__", "") in _METADATA
