"""Where the code of a model branches on its input, as its source says.

An ``if`` on attributes of the module alone goes the same way at every call. One whose test depends on an argument, or
on what was computed from it, may go another way at the next call: a layer in it may run or not, and a ``return`` in it
may leave out what follows.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator, Sequence

from torch import fx, nn

from normfuse.graph import ModelGraph

_Tested = ast.If | ast.IfExp | ast.While | ast.Match
_Branch = _Tested | ast.Try
_TESTED = (ast.If, ast.IfExp, ast.While, ast.Match)
_KNOWN = frozenset(dir(builtins)) | {"torch", "F", "nn", "np", "math"}
_DEPTH = 3  # methods of the module that its forward calls, and those that they call


def may_part(one: fx.Node, other: fx.Node, graph: ModelGraph) -> bool:
    """Whether a run may reach one of two layers without the other: the code that calls them branches on its input."""
    first, second = (node.meta.get("scope", ()) for node in (one, other))
    common = sum(1 for a, b in zip(first, second, strict=False) if a is b)
    outer = first[common - 1].name if common else ""
    units = [_unit(node, scope, common) for node, scope in ((one, first), (other, second))]
    if _parts(graph.module(outer), *(_relative(unit, outer) for unit in units)):
        return True
    for node, scope in ((one, first), (other, second)):
        for depth in range(common, len(scope)):
            name, unit = scope[depth].name, _unit(node, scope, depth + 1)
            if _parts(graph.module(name), *[_relative(unit, name)] * 2):
                return True
    return False


def _unit(node: fx.Node, scope: tuple, depth: int) -> str:
    """Return the name of what the module call at a depth of the scope calls on the way to a node."""
    return scope[depth].name if len(scope) > depth else str(node.target) if node.op == "call_module" else ""


def _relative(name: str, outer: str) -> str:
    return name.removeprefix(f"{outer}.") if outer else name


def _parts(module: nn.Module, one: str, other: str) -> bool:
    forward = getattr(module.forward, "__func__", module.forward)
    if not isinstance(forward, types.FunctionType) or str(forward.__module__).startswith("torch.nn."):
        return False
    return _code_parts(forward, type(module), one.partition(".")[0], other.partition(".")[0])


@functools.lru_cache(maxsize=1024)
def _code_parts(forward: types.FunctionType, kind: type, one: str, other: str) -> bool:
    """Whether a branch on the input holds one of two attributes of ``self`` without the other, or leaves between."""
    trees = list(_trees(forward, kind, _DEPTH))
    if any(tree is None for tree in trees):
        return True  # there is no source to look at
    named = all(name and any(_mentions([tree], name) for tree in trees if tree is not None) for name in (one, other))
    return any(_splits(branch, tree, one, other, named) for tree in trees if tree for branch in _branches(tree))


def _branches(tree: ast.AST) -> Iterator[_Branch]:
    """Yield the branches of a function that do not depend on ``self`` alone."""
    tainted = _tainted(tree)
    for node in ast.walk(tree):
        if isinstance(node, _TESTED):
            if _names(_test(node)) & tainted:
                yield node
        elif isinstance(node, ast.Try):
            yield node


def _splits(branch: _Branch, tree: ast.AST, one: str, other: str, named: bool) -> bool:
    arms = _arms(branch)
    if not named:  # by another name: any call in the branch may be one of the two
        return any(_leaves(arm) or _calls(arm) for arm in arms)
    if one == other:  # two of one container
        return any(_mentions(arm, one) for arm in arms)
    if any(_mentions(arm, one) != _mentions(arm, other) for arm in arms):
        return True
    return any(map(_leaves, arms)) and _is_amid(branch, tree, one, other)


def _trees(function: types.FunctionType, kind: type, depth: int) -> Iterator[ast.AST | None]:
    """Yield the source of a method and of those it calls on ``self``; None where there is none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        yield None
        return
    yield tree
    for name in {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} if depth else ():
        method = getattr(kind, name, None)
        if isinstance(method, types.FunctionType) and not str(method.__module__).startswith("torch."):
            yield from _trees(method, kind, depth - 1)


def _tainted(tree: ast.AST) -> set[str]:
    """Return the names of a function that depend on its arguments, ``self`` left out."""
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda))
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    tainted = {argument.arg for argument in (*arguments, given.vararg, given.kwarg) if argument is not None} - {"self"}
    steps = [step for node in ast.walk(tree) if (step := _assignment(node)) is not None]
    while True:
        more = {name for targets, source in steps if _names(source) & tainted for name in _names(targets)} - {"self"}
        if more <= tainted:
            return tainted
        tainted |= more


def _assignment(node: ast.AST) -> tuple[ast.AST, ast.AST] | None:
    if isinstance(node, ast.Assign):
        return ast.Tuple(node.targets), node.value
    if isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        return node.target, node.value
    if isinstance(node, ast.For | ast.comprehension):
        return node.target, node.iter
    return None


def _names(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def _test(branch: _Tested) -> ast.AST:
    return branch.subject if isinstance(branch, ast.Match) else branch.test


def _arms(branch: _Branch) -> list[Sequence[ast.AST]]:
    if isinstance(branch, ast.Match):
        return [case.body for case in branch.cases]
    if isinstance(branch, ast.Try):
        return [branch.body, *(handler.body for handler in branch.handlers)]
    return [[branch.body], [branch.orelse]] if isinstance(branch, ast.IfExp) else [branch.body, branch.orelse]


def _mentions(arm: Sequence[ast.AST], attribute: str) -> bool:
    """Whether code names an attribute of ``self``."""
    return any(_is_attribute(node, attribute) for part in arm for node in ast.walk(part))


def _is_attribute(node: ast.AST, attribute: str) -> bool:
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return own and node.attr == attribute  # type: ignore[union-attr]


def _calls(arm: Sequence[ast.AST]) -> bool:
    """Whether code calls what may be a layer: a name of its own, or an attribute of ``self``."""
    functions = [node.func for part in arm for node in ast.walk(part) if isinstance(node, ast.Call)]
    return any(isinstance(function, ast.Subscript) or _names(function) - _KNOWN for function in functions)


def _leaves(arm: Sequence[ast.AST]) -> bool:
    ends = (ast.Return, ast.Break, ast.Continue)
    return any(isinstance(node, ends) for part in arm for node in ast.walk(part))


def _is_amid(branch: _Branch, tree: ast.AST, one: str, other: str) -> bool:
    """Whether a branch stands between the places where two attributes are named; one may be named elsewhere."""
    lines = [node.lineno for node in ast.walk(tree) for name in (one, other) if name and _is_attribute(node, name)]  # type: ignore[attr-defined]
    return bool(lines) and min(lines) <= branch.lineno <= max(lines)
