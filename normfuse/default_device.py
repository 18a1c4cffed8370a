"""Our own arithmetic is on the CPU; the user's code runs with the default device that the user has set.

``torch.set_default_device("cuda")`` and ``with torch.device("meta")`` say where new tensors are made that name no
device. A model's ``forward`` may rely on it, and folding must not.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_users: contextvars.ContextVar[torch.device | None] = contextvars.ContextVar("_users", default=None)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Make tensors on the CPU in this block, whatever the default device is."""
    device = torch.get_default_device()
    if device.type == "cpu":
        yield
        return
    token = _users.set(device)
    try:
        with torch.device("cpu"):
            yield
    finally:
        _users.reset(token)


def runs_users_code(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with the default device that was set around the block of :func:`on_cpu`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = _users.get()
        with contextlib.nullcontext() if device is None else torch.device(device):
            return function(*args, **kwargs)

    return run
