"""One thing at a time, where torch has one of it for the whole process.

To follow a run of a model, or to run it from a seed, takes what torch and Python hold once for all threads: the call
of a module, the random number generators, and the mode of a model that threads may share. So the parts of normfuse
that do it wait for each other. Threads that run models of their own meanwhile are not touched, with one exception:
random numbers that they draw then come from the seed of the run.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

LOCK = threading.RLock()
"""Held by the thread that follows or judges a run."""


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run in one thread at a time, and not beside any other that is exclusive."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with LOCK:
            return function(*args, **kwargs)

    return alone
