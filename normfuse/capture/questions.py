"""What the code of a model asks its norms while it runs: ``self.bn.weight.dtype``, ``self.bn.eps``.

A norm that is folded away is asked no longer what it computes, but what it is. Each attribute that code outside of the
norm reads is noted. For the run, the classes of the norms get a ``__getattribute__``; they stay what they are, so that
code that looks at them sees nothing new.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from normfuse.norm_classes import is_norm
from normfuse.surgery import module_names

Questions = Mapping[str, set[str]]
_OURS = ("torch", "normfuse")
_SAME_OF_AN_IDENTITY = ("training", "forward", "__class__")


@contextlib.contextmanager
def questions(model: nn.Module) -> Iterator[Questions]:
    """Run a block and note, by the name of the norm, the attributes that code of the user's reads."""
    every = module_names(model)
    names = {id(module): every[id(module)][0] for module in model.modules() if is_norm(module)}
    asked: dict[str, set[str]] = collections.defaultdict(set)
    kinds = {type(module) for module in model.modules() if id(module) in names}
    own = {kind: vars(kind).get("__getattribute__") for kind in kinds}
    for kind in kinds:
        kind.__getattribute__ = _noting(kind.__getattribute__, names, asked)
    try:
        yield asked
    finally:
        for kind, method in own.items():
            if method is None:
                del kind.__getattribute__
            else:
                kind.__getattribute__ = method


def _noting(read: Any, names: Mapping[int, str], asked: dict[str, set[str]]) -> Any:
    def __getattribute__(module: nn.Module, attribute: str) -> Any:  # noqa: N807
        name = names.get(id(module)) if attribute not in _SAME_OF_AN_IDENTITY else None
        if name is not None and _is_from_outside(sys._getframe(1), module):
            asked[name].add(attribute)
        return read(module, attribute)

    return __getattribute__


def _is_from_outside(frame: types.FrameType, module: nn.Module) -> bool:
    """Whether the code that reads belongs neither to torch nor to us, and is no method of the module."""
    if str(frame.f_globals.get("__name__")).partition(".")[0] in _OURS:
        return False
    code = frame.f_code
    first = code.co_varnames[0] if code.co_argcount else ""
    return first != "self" or frame.f_locals.get(first) is not module
