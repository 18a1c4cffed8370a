"""What keeps running statistics right when a forward pass is computed a second time, inside the backward pass.

Gradient checkpointing runs a layer's forward twice for one training step. A layer whose forward updates statistics
would then count the batch twice and, worse, differentiate another function than the one whose output the loss saw. So
the first run is recorded and the second one replayed: same statistics, no update. Without that, a second run is
refused.

A compiler moves work between the forward and the backward pass as if no buffer changed in between: it recomputes what
was read before an update after it (pytorch/pytorch pull request 197039), and reads early what the backward pass is to
read late. Values that pass an operator which the compiler cannot look into stay where they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from normfuse.errors import NormfuseError

T = TypeVar("T", bound="tuple[Tensor, ...]")

_REMEDY = (
    "pass use_reentrant=False, context_fn=normfuse.layers.replayed_statistics to torch.utils.checkpoint.checkpoint, "
    "and compile the model without it"
)


class _Tapes(threading.local):
    """The recordings and replays that this thread is inside of, outermost first."""

    def __init__(self) -> None:
        self.stack: list[_Run] = []


_TAPES = _Tapes()


class _Run:
    """One run, recorded or replayed, of a checkpointed region; it may be entered again."""

    def __init__(self, tape: list[tuple[nn.Module, tuple[Tensor, ...]]], *, replaying: bool) -> None:
        self.tape = tape
        self.replaying = replaying
        self.position = 0

    def __enter__(self) -> None:
        self.position = 0
        _TAPES.stack.append(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _TAPES.stack.remove(self)

    def next(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Return what the recorded run of ``module`` computed."""
        if self.position == len(self.tape) or self.tape[self.position][0] is not module:
            raise NormfuseError("a checkpointed region called its norms in another order when it was recomputed")
        self.position += 1
        return self.tape[self.position - 1][1]


def replayed_statistics() -> tuple[_Run, _Run]:
    """Return the two contexts of one checkpointed region; a ``context_fn`` for ``torch.utils.checkpoint.checkpoint``.

    In the first, norms with running statistics record what they computed; in the second they replay it and update
    nothing, so that a checkpointed model trains exactly like one without checkpoints::

        checkpoint(block, x, use_reentrant=False, context_fn=replayed_statistics)
    """
    tape: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
    return _Run(tape, replaying=False), _Run(tape, replaying=True)


def recorded(module: nn.Module, compute: Callable[[], T]) -> T:
    """Return ``compute()`` of a training forward, a named tuple, or what the run that is replayed computed here.

    Raises:
        NormfuseError: The forward runs inside a backward pass and nothing was recorded for it.
    """
    if torch.compiler.is_compiling():
        values = compute()
        return type(values)(*_keep(list(values)))
    runs = _TAPES.stack
    replay = next((run for run in reversed(runs) if run.replaying), None)
    if replay is None:
        refuse_recomputation()
    value = compute() if replay is None else cast("T", replay.next(module))
    for run in runs:
        if not run.replaying:
            run.tape.append((module, value))
    return value


def refuse_recomputation() -> None:
    """Raise where this thread is inside a backward pass.

    Raises:
        NormfuseError: Always then; it says how to checkpoint such a layer.
    """
    if torch._C._current_graph_task_id() != -1:
        raise NormfuseError(f"a norm with running statistics would count one batch twice in a checkpoint: {_REMEDY}")


@torch.library.custom_op("normfuse::keep", mutates_args=())
def _keep(values: list[Tensor]) -> list[Tensor]:
    refuse_recomputation()
    return [value.clone() for value in values]


@_keep.register_fake
def _(values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(value) for value in values]


def read_in_backward(buffers: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return ``buffers`` as they are when a gradient, ``grad``, is there; also in a compiled graph."""
    return _read(buffers, grad) if torch.compiler.is_compiling() else buffers


@torch.library.custom_op("normfuse::read", mutates_args=())
def _read(buffers: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [buffer.clone() for buffer in buffers]


@_read.register_fake
def _(buffers: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [torch.empty_like(buffer) for buffer in buffers]
