"""Run the pass that sets the statistics of norms to those of data; :mod:`normfuse.statistics` has it as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from normfuse import api
from normfuse.calibration import Batches, Calibration
from normfuse.capture import unwrap
from normfuse.passes.recalibrate import Method, Recalibrate
from normfuse.pipeline import Result
from normfuse.progress import tracked

M = TypeVar("M", bound=nn.Module)


def recalibrating_pass(
    calibration: Calibration | None, method: Method = "pooled", *, progress: bool = False, **options: Any
) -> Recalibrate:
    """Return the pass of a method, with a bar over the data; arguments and errors as for the pass."""
    one = Recalibrate(calibration, method=method, **options)
    one.track = lambda batches: tracked(batches, "recalibrating", shown=progress)
    return one


def run_recalibrate(
    model: M, one: Recalibrate, *, include: Sequence[str] = (), exclude: Sequence[str] = (), inplace: bool = False
) -> Result[M]:
    """Run the pass on a model, read on the first item of its data.

    Raises:
        OrderError: The model is folded, has computed weights, or is being adapted.
        CaptureError: The model does not run on the data.
    """
    first = Batches(one.calibration, unwrap(model), one.padding_mask).first()
    return api.apply(model, [one], example_inputs=first, include=include, exclude=exclude, inplace=inplace)
