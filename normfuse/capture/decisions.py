"""Which calls stand in code that decides, by a value of its own, what it runs.

    y = self.norm(y) if use_norm else y        if x.shape[0] > 1: ...        assert x.dim() == 4

A decision is a conditional jump on a local variable of a function that is running; one on an attribute of ``self``
alone is a setting of the model, the same in every run.
"""

from __future__ import annotations

import dis
import functools
import os
import sys
from types import CodeType

import torch

_LIBRARIES = tuple(os.path.join(os.path.dirname(path), "") for path in (str(torch.__file__), os.path.dirname(__file__)))


def is_decided(start: CodeType) -> bool:
    """Whether a function that is running, between the caller of this one and ``start``, decides what it runs."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not start:
        code = frame.f_code
        if not code.co_filename.startswith(_LIBRARIES) and _decides(code):
            return True
        frame = frame.f_back
    return False


@functools.lru_cache(maxsize=4096)
def _decides(code: CodeType) -> bool:
    read: set[str] = set()
    for step in dis.get_instructions(code):
        if "JUMP" in step.opname and "_IF_" in step.opname and "EXC" not in step.opname:
            if read - {"self"}:
                return True
        elif step.opname.startswith(("STORE", "POP_TOP", "RETURN", "JUMP")):  # a statement ends
            read = set()
        elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            read |= set(step.argval) if isinstance(step.argval, tuple) else {step.argval}
    return False
