"""What stands in the place of a norm that is folded away, where the code of the model asks the norm what it is.

    self.bn.weight.dtype, self.bn.eps, self.bn.num_features    answered by a placeholder that runs as an identity
    self.bn.parameters(), self.bn.some_object                  nothing could answer the same
    isinstance(self.bn, nn.BatchNorm2d)                        the class is asked

A BatchNorm1d behind a convolution that was traced may be given a signal without a batch: an identity of one rank.

Attributes that were read are known from the run (:mod:`normfuse.capture.questions`). That a class was asked leaves no
trace in a run: it is looked for in the code of the modules around the norm.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from normfuse import surgery
from normfuse.base import Reason, Refused
from normfuse.graph import ModelGraph
from normfuse.surgery import Edit

_DEPTH = 3  # calls of functions and methods that are followed from a forward
_SIMPLE = (bool, int, float, str, type(None))


def answering(edit: Edit, graph: ModelGraph) -> Edit:
    """Return an edit that replaces a norm, with an identity that answers what the model asks the norm.

    Raises:
        Refused: Nothing that could stand there would answer the same.
    """
    name, asked = edit["path"], graph.asked.get(edit["path"], set())
    _require_class_unasked(name, graph)
    if not asked:
        return edit
    if edit["module"] != surgery.IDENTITY:
        raise Refused(Reason.ASKED, f"code of the model reads {name}.{min(asked)}, and more than the norm stands there")
    attributes: list[list[Any]] = []
    tensors: list[list[Any]] = []
    for attribute in sorted(asked):
        value = getattr(graph.module(name), attribute, None)
        if isinstance(value, Tensor) and value.is_floating_point():
            tensors.append([attribute, list(value.shape)])
        elif _is_simple(value):
            attributes.append([attribute, value])
        else:
            raise Refused(Reason.ASKED, f"code of the model reads {name}.{attribute}")
    kwargs = {"attributes": attributes, "tensors": tensors}
    return {**edit, "module": {"class": "normfuse.layers.deployed.Placeholder", "kwargs": kwargs}}


def of_one_rank(edit: Edit, rank: int) -> Edit:
    """Return an edit that replaces a norm, with an identity that takes values of one rank only in front of the rest."""
    left = edit["module"]
    kwargs = left["kwargs"] if left.get("class", "").endswith(".Placeholder") else {}
    guard = {"class": "normfuse.layers.deployed.OneRank", "kwargs": {"rank": rank, **kwargs}}
    alone = left == surgery.IDENTITY or kwargs
    return {**edit, "module": guard if alone else {"sequential": [guard, left]}}


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(item, _SIMPLE) for item in value)
    return isinstance(value, _SIMPLE)


def require_unasked(name: str, graph: ModelGraph) -> None:
    """Refuse to replace a module in which code outside of a norm reads attributes of the norm.

    Raises:
        Refused: It does.
    """
    for norm, asked in graph.asked.items():
        if asked and f"{norm}.".startswith(f"{name}." if name else ""):
            raise Refused(Reason.ASKED, f"code of the model reads {norm}.{min(asked)}")


def _require_class_unasked(name: str, graph: ModelGraph) -> None:
    kinds = frozenset(kind.__name__ for kind in type(graph.module(name)).__mro__ if issubclass(kind, nn.Module))
    kinds -= {nn.Module.__name__}
    outer = name
    while outer:
        outer = outer.rpartition(".")[0]
        around = graph.module(outer)
        forward = getattr(around.forward, "__func__", around.forward)
        if isinstance(forward, types.FunctionType) and _asks_for(forward, type(around), kinds):
            label = f"{outer} ({type(around).__name__})" if outer else f"the model ({type(around).__name__})"
            raise Refused(Reason.ASKED, f"the forward of {label} asks whether a layer is a {_told(kinds)}")


def _told(kinds: frozenset[str]) -> str:
    return max(kinds, key=lambda kind: (kind.startswith("Batch"), kind))


@functools.lru_cache(maxsize=256)
def _asks_for(forward: types.FunctionType, kind: type[nn.Module], classes: frozenset[str]) -> bool:
    """Whether a ``forward``, or what it calls, asks for the class of something, and names one of these classes."""
    if str(kind.__module__).startswith("torch.nn.modules.") and str(forward.__module__).startswith("torch."):
        return False
    return any(_names_both(code, classes) for code in _codes(forward, kind, _DEPTH))


def _names_both(code: types.CodeType, classes: frozenset[str]) -> bool:
    return not {"isinstance", "type", "issubclass"}.isdisjoint(code.co_names) and not classes.isdisjoint(code.co_names)


def _codes(function: types.FunctionType, kind: type, depth: int) -> Iterator[types.CodeType]:
    """Yield the code of a function, the functions in it and, some calls deep, those that it calls."""
    codes = [function.__code__]
    for code in codes:
        yield code
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    for name in {name for code in codes for name in code.co_names} if depth else ():
        for found in (getattr(kind, name, None), function.__globals__.get(name)):
            if isinstance(found, types.FunctionType) and not str(found.__module__).startswith("torch."):
                yield from _codes(found, kind, depth - 1)
