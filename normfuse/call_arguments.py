"""The arguments of a call by name, however the call spells them: by position, by keyword, by NumPy's keywords.

The names are those of the function itself: of its schema for an operator of ATen and for what torch implements in C++,
of its Python signature otherwise. A few stand for all of their spellings: ``input`` (``self``, NumPy's ``x``),
``other``, ``dim`` (NumPy's ``axis``), ``keepdim`` (NumPy's ``keepdims``) and ``padding`` (of ``F.pad``, ``pad``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._jit_internal import boolean_dispatched

from normfuse.graph import function_name

_ONE_NAME = {"self": "input", "x": "input", "a": "input", "x1": "input", "x2": "other"}
_ONE_NAME |= {"axis": "dim", "keepdims": "keepdim", "pad": "padding"}
_OPERATOR = ("input", "other")


@dataclass(frozen=True, slots=True)
class _Signature:
    """One way to call a function.

    Attributes:
        positional: What may be given by position, in order.
        names: Every parameter.
        required: The parameters without a default.
        kinds: The type of each positional parameter, as a schema writes it; ``""`` where none is stated.
    """

    positional: tuple[str, ...]
    names: frozenset[str]
    required: frozenset[str]
    kinds: tuple[str, ...]

    def fits(self, count: int, keywords: frozenset[str]) -> bool:
        """Whether a call with so many arguments by position, and these by keyword, is one of this signature."""
        placed = frozenset(self.positional[:count])
        complete = self.required <= placed | keywords
        return count <= len(self.positional) and keywords <= self.names - placed and complete

    def mismatches(self, given: tuple[str, ...]) -> int:
        """Return how many arguments by position are of another type than their parameter."""
        return sum(not _suits(kind, one) for kind, one in zip(self.kinds, given, strict=False))


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments that a call of a function or method gives, by name; what it leaves out is not in it.

    Where no signature of the function fits (a spelling that torch deprecated), only keywords have names.
    """
    if node.op == "call_function":
        target = node.target
    elif node.op == "call_method":
        target = getattr(Tensor, str(node.target), None)
    else:
        return {}
    keywords = {_ONE_NAME.get(name, name): value for name, value in node.kwargs.items()}
    order = _order(target, function_name(node), tuple(map(_type, node.args)), frozenset(keywords))
    return {**dict(zip(order, node.args, strict=False)), **keywords}


@functools.lru_cache(maxsize=4096)
def _order(target: Any, name: str, given: tuple[str, ...], keywords: frozenset[str]) -> tuple[str, ...]:
    """Return the names of the arguments that are given by position."""
    if getattr(target, "__module__", "") == "_operator" or getattr(target, "__name__", "").startswith("__"):
        return _OPERATOR
    fitting = [one for one in _signatures(target, name) if one.fits(len(given), keywords)]
    return min(fitting, key=lambda one: one.mismatches(given)).positional if fitting else ()


def _signatures(target: Any, name: str) -> Iterator[_Signature]:
    if isinstance(target, torch._ops.OpOverload):
        yield _of_schema(target._schema)
        return
    python = _python_signature(target) if inspect.isfunction(target) else None
    if python is not None:
        yield python
        return
    for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        yield _of_schema(schema)


def _python_signature(function: Callable[..., Any]) -> _Signature | None:
    """Return the signature of a function in Python, None for one that wraps another, or hands on what it is given."""
    whole = boolean_dispatched.get(function, {}).get("if_false", function)  # of F.max_pool2d, which is two functions
    try:
        parameters = inspect.signature(whole).parameters.values()
    except ValueError:  # Tensor.__pow__ is a wrapper in Python of one in C++
        return None
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return None
    named = [one for one in parameters if one.kind is not one.VAR_KEYWORD]
    positional = tuple(_one_name(one.name) for one in named if one.kind is not one.KEYWORD_ONLY)
    required = frozenset(_one_name(one.name) for one in named if one.default is one.empty)
    return _Signature(positional, frozenset(_one_name(one.name) for one in named), required, ("",) * len(positional))


def _of_schema(schema: Any) -> _Signature:
    positional = [one for one in schema.arguments if not one.kwarg_only]
    return _Signature(
        tuple(_one_name(one.name) for one in positional),
        frozenset(_one_name(one.name) for one in schema.arguments),
        frozenset(_one_name(one.name) for one in schema.arguments if not one.has_default_value()),
        tuple(str(one.type) for one in positional),
    )


def _one_name(name: str) -> str:
    return _ONE_NAME.get(name, name)


def _type(value: Any) -> str:
    """Return what kind of value an argument is, in the words of a schema; a value of the graph counts as a tensor."""
    if isinstance(value, fx.Node):
        return "Tensor"
    if isinstance(value, list | tuple):
        return f"List[{_type(value[0])}]" if value else "List"
    return type(value).__name__


def _suits(kind: str, given: str) -> bool:
    """Whether a value suits the type of a parameter."""
    if kind.startswith("Optional["):
        return given == "NoneType" or _suits(kind[9:-1], given)
    numbers = {"number": ("int", "float", "bool", "complex"), "float": ("int", "float"), "List[int]": ("int", "List")}
    return not kind or kind == given or given in numbers.get(kind, ())
