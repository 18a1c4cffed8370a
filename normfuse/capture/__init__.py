"""Read a model into one graph of module calls and function calls, without changing it.

Two readers give the same kind of graph:

- *recorded* (``example_inputs`` given): a real run on each example is followed, tensor by tensor. Any model that runs
  can be read, and every shape is known.
- *symbolic* (no input): ``torch.fx`` traces the model, or, where that fails, each part of it that can be traced.

Both read the model in eval mode and leave the mode of every module as it was.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast, overload

from torch.nn import Module

from normfuse.capture.modes import eval_mode, readable, unwrap
from normfuse.capture.recorded import record
from normfuse.capture.symbolic import trace
from normfuse.errors import CaptureError
from normfuse.examples import Examples, Inputs, calls_of, could_be_several
from normfuse.graph import ModelGraph
from normfuse.names import require_plain_names

__all__ = ["capture", "eval_mode", "readable", "record", "trace", "understood", "unwrap"]


def capture(model: Module, example_inputs: Inputs | Examples | None = None) -> ModelGraph:
    """Read ``model`` into a :class:`ModelGraph`.

    Args:
        model: Any module; DDP, DataParallel and ``torch.compile`` wrappers are looked through.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments to run the model on.
            Several, as :class:`normfuse.Examples`, are run one after the other, side by side in one graph. Without it
            the model is traced symbolically.

    Returns:
        The graph. It is partial where only parts of the model could be traced.

    Raises:
        CaptureError: The model did not run on the inputs, no part of it could be traced, or a name in it is not plain.
    """
    model = unwrap(model)
    require_plain_names(model, "the model", CaptureError)
    return trace(model) if example_inputs is None else record(model, example_inputs)


@overload
def understood(model: Module, inputs: Inputs | Examples) -> Inputs | Examples: ...
@overload
def understood(model: Module, inputs: None) -> None: ...
def understood(model: Module, inputs: Inputs | Examples | None) -> Inputs | Examples | None:
    """Return example inputs with a list that the model does not take as one argument turned into several calls."""
    if inputs is None or not could_be_several(inputs):
        return inputs
    several = Examples(*cast(list[Any], inputs))
    if len(calls_of(inputs)) > 1:
        return several
    for tried in (inputs, several):
        with contextlib.suppress(CaptureError):
            record(unwrap(model), tried)
            return tried
    return inputs
