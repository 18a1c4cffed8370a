"""A captured model as a graph, and the questions that passes ask of it.

The graph is an ``fx.Graph`` whose nodes are calls of leaf modules (``call_module``), of torch functions
(``call_function``, ``call_method``), parameters (``get_attr``) and inputs. It is only read: what a pass edits is the
user's module, and a node's module is looked up afresh at each question, so the graph stays true while norms are
replaced by ``nn.Identity``.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse import surgery
from normfuse.examples import Examples, Inputs
from normfuse.holders import Holders
from normfuse.layers.padding import notes_padding
from normfuse.layers.tied_calls import counts_only
from normfuse.named_tensors import own_tensors, tensor_aliases
from normfuse.surgery import Edit, module_names


@dataclass(eq=False, slots=True)
class ModuleCall:
    """One call of a module that is read through: which nodes came in, and which came out."""

    name: str
    inputs: tuple[fx.Node, ...] = ()
    outputs: tuple[fx.Node, ...] = ()
    single_output: bool = False
    run: int = 0


@dataclass(eq=False)
class ModelGraph:
    """A captured model.

    Attributes:
        root: The user's model.
        graph: The nodes, in order of execution, one run after the other. ``node.meta`` may hold ``shape``, ``dtype``
            and ``run``, counted from 0 (recorded only), and ``scope``, the enclosing :class:`ModuleCall` objects from
            the outermost to the innermost.
        calls: Calls of the modules that were read through.
        partial: Names of the parts that were traced on their own; empty when the whole model was read.
        training: Names of modules that were in training mode inside a model in eval mode.
        edits: What was done to the structure of the model through this graph.
        decided: Names of the modules that were called from code that decides by its values what it runs.
        ties: Edits that let a norm and the layers that took its map count their calls, to be made at the end.
        changed_scopes: Names of the modules whose ``forward`` sees a value that is another since; "" is the model.
        inputs: What the recorded runs were given; None where the model was traced.
        asked: By norm, its attributes that code outside of it read (:mod:`normfuse.capture.questions`).
        strangers: Modules that the recorded runs called and that are none of the model's.
        returned: Copies of what each recorded run returned, by name as :func:`normfuse.outputs.leaves` gives them.
    """

    root: nn.Module
    graph: fx.Graph
    calls: list[ModuleCall] = field(default_factory=list)
    partial: tuple[str, ...] = ()
    training: frozenset[str] = frozenset()
    edits: list[Edit] = field(default_factory=list)
    decided: set[str] = field(default_factory=set)
    ties: list[Edit] = field(default_factory=list)
    changed_scopes: set[str] = field(default_factory=set)
    inputs: Inputs | Examples | None = None
    asked: Mapping[str, set[str]] = field(default_factory=dict)
    strangers: tuple[nn.Module, ...] = ()
    returned: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self.nodes: list[fx.Node] = list(self.graph.nodes)
        self.writers = [node for node in self.nodes if node.meta.get("writes")]
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.names = module_names(self.root)
        self._modules = dict(self.root.named_modules())
        self._aliases = tensor_aliases(self.root)
        self.hooked_calls = [call for call in self.calls if has_hooks(self.module(call.name))]
        self._uses = self._collect_uses()
        self._sites = self._collect_sites()

    @functools.cached_property
    def holders(self) -> Holders:
        """Who holds the modules and tensors of the model outside of its module tree."""
        return Holders(self.root)

    # modules and their calls

    def module(self, name: str) -> nn.Module:
        """Return the module of this captured name, or what replaced it.

        Raises:
            AttributeError: The model has no such module.
        """
        module: nn.Module | None = self._modules.get(name, self.root)
        for part in () if name in self._modules else name.split("."):
            module = module._modules.get(part) if module is not None else None  # runs no property, unlike getattr
        if module is None:
            raise AttributeError(f"the model has no module {name!r}")
        return module

    def perform(self, edit: Edit) -> None:
        """Carry out a structural edit on the model and log it."""
        surgery.perform(self.root, edit, self.holders)
        self.edits.append(edit)
        if "path" in edit:
            self._modules[edit["path"]] = self.root.get_submodule(edit["path"])

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Give parameters and buffers of the model new values, by captured name."""
        surgery.assign(self.module, tensors, self.holders)

    def note_changed(self, values: Iterable[fx.Node]) -> None:
        """Note that values are others from now on: each shows where it is made or given, and where it is returned."""
        changed = set(values)
        self.changed_scopes.update(call.name for call in self.calls if not changed.isdisjoint(call.inputs))
        for node in changed:
            scope = list(node.meta.get("scope", ()))
            while scope and node in scope[-1].outputs:
                self.changed_scopes.add(scope.pop().name)
            self.changed_scopes.add(scope[-1].name if scope else "")

    def remove(self, node: fx.Node) -> None:
        """Note that a call changes its input no longer: its norm was folded."""
        node.meta["removed"] = True

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a ``call_module`` node calls, None for every other node."""
        return self.module(str(node.target)) if node.op == "call_module" else None

    def call_sites(self, name: str) -> list[fx.Node]:
        """Return the nodes that call the leaf module of this name."""
        return self._sites.get(name, [])

    def most_calls(self, name: str) -> int:
        """Return how often a run calls the module of this name, the most of all runs."""
        return max(self.calls_by_run(name).values(), default=0)

    def calls_by_run(self, name: str) -> collections.Counter[int]:
        """Return how often each run calls the module of this name."""
        runs = [node.meta.get("run", 0) for node in self.call_sites(name)]
        return collections.Counter(runs or [call.run for call in self.calls_of(name)])

    def has_regular_calls(self, name: str) -> bool:
        """Whether every run that calls the module of this name calls it equally often."""
        return len(set(self.calls_by_run(name).values())) <= 1

    def calls_of(self, name: str) -> list[ModuleCall]:
        """Return the calls of the read-through module of this name."""
        return [call for call in self.calls if call.name == name]

    def body(self, call: ModuleCall) -> list[fx.Node]:
        """Return the nodes that ran inside one call of a module, in order, parameters left out."""
        return [n for n in self.nodes if n.op != "get_attr" and call in n.meta.get("scope", ())]

    # tensors of the model

    def tensor(self, name: str) -> Tensor:
        """Return the parameter, buffer or tensor attribute that has this qualified name now."""
        owner, _, attribute = name.rpartition(".")
        return getattr(self.module(owner), attribute)

    def owners(self, name: str) -> tuple[str, ...]:
        """Return every qualified name of the tensor called ``name`` in distinct modules: more than one is a tie."""
        return self._aliases.get(name, (name,))

    def uses(self, name: str) -> list[fx.Node]:
        """Return the nodes that read the tensor called ``name``, under whichever of its names: see :meth:`readers`."""
        return self._uses.get(self.owners(name)[0], [])

    # values

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that read a value, once per occurrence: ``x + x`` consumes ``x`` twice.

        A node that asks only for its shape (``y.reshape_as(x)``, ``zeros_like(x)``) does not read it.
        """
        return [user for user in node.users for _ in range(occurrences(user, node) - shape_reads(user, node))]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return who reads a value, directly or through what is made of it and of constants alone.

        A constant that no value of the graph is made of is a reader itself: the code of the model has asked for it.
        """
        found: list[fx.Node] = []
        seen, left = {node}, [node]
        while left:
            for user in self.consumers(left.pop()):
                if not (self.is_constant(user) and user.users):
                    found.append(user)
                elif user not in seen:
                    seen.add(user)
                    left.append(user)
        return found

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Return the shape a value had in the recorded run."""
        return node.meta.get("shape")

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a value depends on parameters and buffers alone, not on the input of the model."""
        if "constant" not in node.meta:
            node.meta["constant"] = node.op == "get_attr" or (
                node.op in ("call_function", "call_method")
                and bool(node.all_input_nodes)
                and all(self.is_constant(n) for n in node.all_input_nodes)
            )
        return node.meta["constant"]

    def value(self, node: fx.Node) -> Tensor:
        """Return the present value of a constant node; what makes it may write into a copy, never into the model."""
        if node.op == "get_attr":
            return self.tensor(str(node.target)).detach()
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._copy_of)  # type: ignore[misc]
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _copy_of(self, node: fx.Node) -> Any:
        value: Any = self.value(node)
        return value.clone() if isinstance(value, Tensor) else value

    # building the indexes

    def _collect_uses(self) -> dict[str, list[fx.Node]]:
        uses: dict[str, list[fx.Node]] = collections.defaultdict(list)
        for node in self.nodes:
            if node.op == "get_attr":
                uses[self.owners(str(node.target))[0]].extend(self.readers(node))
            elif node.op == "call_module":
                for name in own_tensors(self.module(str(node.target)), str(node.target)):
                    uses[self.owners(name)[0]].append(node)
        return uses

    def _collect_sites(self) -> dict[str, list[fx.Node]]:
        sites: dict[str, list[fx.Node]] = collections.defaultdict(list)
        for node in self.nodes:
            if node.op == "call_module":
                sites[str(node.target)].append(node)
        return sites


def has_hooks(module: nn.Module) -> bool:
    """Whether anything watches, or changes, what a module takes or returns; what counts or notes calls does not."""
    own = [hook for name in _HOOKS for hook in (vars(module).get(name) or {}).values()]
    return not all(counts_only(hook) or notes_padding(hook) for hook in own) or global_hook() is not None


def global_hook() -> Any:
    """Return a hook that torch runs around every module, if there is one."""
    tables = (getattr(torch.nn.modules.module, f"_global{name}") for name in _HOOKS)
    return next((hook for table in tables for hook in table.values()), None)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def function_name(node: fx.Node) -> str:
    """Return the plain name of the torch function that a node calls: ``"batch_norm"``, ``"add"``; else ``""``."""
    if node.op == "call_method":
        return str(node.target).strip("_")
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if target is getattr:  # a symbolic capture's x.T
        return str(node.args[1])
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2].strip("_")
    name = getattr(target, "__name__", "")
    if name == "__get__":  # a property: x.T, x.data
        return getattr(getattr(target, "__self__", None), "__name__", "").strip("_")
    return name.strip("_") if _is_torch(target) else ""


def _is_torch(target: Any) -> bool:
    module = getattr(target, "__module__", None) or getattr(getattr(target, "__objclass__", None), "__module__", None)
    return module is None or module.split(".")[0] in ("torch", "_operator", "operator", "math", "normfuse")


def is_uninitialized(module: nn.Module) -> bool:
    """Whether a lazy module has not seen an input yet, so that its parameters have no values."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and nn.parameter.is_lazy(tensor) for tensor in tensors)


def shape_reads(user: fx.Node, node: fx.Node) -> int:
    """Return how many of a node's occurrences in ``user`` are about its shape or dtype alone."""
    if user.target is getattr:  # a symbolic capture's x.shape
        return int(user.args[1] in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"))
    name = function_name(user)
    if name in ("size", "dim", "numel", "is_floating_point", "get_device"):
        return int(user.args[:1] == (node,))
    if name.endswith("_like") or name.startswith("new_"):
        return int(user.args[:1] == (node,))
    return int(name in ("expand_as", "view_as", "reshape_as", "type_as", "to") and user.args[1:2] == (node,))


def occurrences(user: fx.Node, node: fx.Node) -> int:
    """Return how often ``node`` stands among the arguments of ``user``."""
    found: list[fx.Node] = []
    fx.map_arg((user.args, dict(user.kwargs)), found.append)  # type: ignore[arg-type]
    return sum(n is node for n in found)
