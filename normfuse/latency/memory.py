"""The most memory that one call of a model holds at a time, beside its weights."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(call: Callable[[], object], *, on_gpu: bool = False) -> int:
    """Return the peak of what torch allocates during a call, in bytes, above what was allocated before it."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _start_profiler()
    return _in_new_thread(lambda: _peak_on_cpu(call))


@functools.cache
def _start_profiler() -> None:
    """Profile nothing, once, in the main thread, where the profiler wants to be started first; and quietly."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with _profile():
        pass


def _profile() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def _peak_on_cpu(call: Callable[[], object]) -> int:
    with _profile() as profile:
        call()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    return peak


def _in_new_thread(call: Callable[[], int]) -> int:
    """Run where no memory that a thread keeps has been allocated before, so that it counts."""
    found: list[int | BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:  # raised again where somebody can catch it
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]
