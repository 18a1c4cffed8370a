"""Compare a written file with its source, by a measure that fits its numbers.

Files in a floating-point type are held to rounding (:mod:`normfuse.comparison`); what rounding costs a ``mixed`` file
is what it costs the source with the same layers in the same types. Quantized numbers are no rounding of the source: a
file of them is judged on its calibration data, by the cosine similarity of each output to the float64 run.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import torch
from torch import nn

from normfuse import rerun
from normfuse.comparison import Comparison, Tolerance
from normfuse.graph import Inputs
from normfuse.lowering import onnx_qdq
from normfuse.lowering.axes import Axes
from normfuse.lowering.precision import Numbers, cast
from normfuse.outputs import named_inputs
from normfuse.rerun import Samples, sample_inputs
from normfuse.verify import verify


def compare_file(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    numbers: Numbers,
    axes: Axes,
    num_inputs: int = 8,
    seed: int = 0,
) -> Comparison:
    """Run the written file and compare it with a float64 run of the source.

    Args:
        model: The source.
        path: The ONNX file.
        example_inputs: What both take.
        numbers: How the numbers of the file were written.
        axes: The dynamic axes; one that is axis 0 is tried with one entry more.
        num_inputs: On how many inputs to compare.
        seed: Of the random ones among them.
    """
    if numbers.quantized:
        samples = Samples(tuple(numbers.batches(model, example_inputs)[:num_inputs]))
        found = verify(model, Path(path), samples, tolerance=Tolerance(rtol=0.0, atol=math.inf))
        return judge_by_cosine(found, numbers.min_cosine)
    samples = sample_inputs(example_inputs, num_inputs, seed).values
    longer = _longer_batch(model, example_inputs, axes)
    if onnx_qdq.is_calibrated(model):
        return onnx_qdq.compare(model, path, Samples((*samples, *longer)))
    like = cast(rerun.duplicate(model), numbers) if numbers.precision == "mixed" else None
    return verify(model, Path(path), Samples((*samples, *longer)), rounds_like=like)


def judge_by_cosine(found: Comparison, least: float) -> Comparison:
    """Return the comparison of a quantized file, failed where an output points elsewhere than the source's."""
    note = f"quantized, so judged by its cosine on the calibration data: at least {least:g}"
    failure = found.failure
    if not failure and found.cosine < least:
        failure = f"cosine {found.cosine:.6f} to the float64 run, at least {least:g} is asked for"
    return dataclasses.replace(found, passed=not failure, failure=failure, tolerance=None, notes=(*found.notes, note))


def _longer_batch(model: nn.Module, inputs: Inputs, axes: Axes) -> list[Inputs]:
    """Return the inputs with one more entry along axis 0 where that is dynamic, to see whether it is; else nothing."""
    named = named_inputs(model, inputs)
    grow = {name for name, labels in axes.items() if 0 in labels}
    if not grow:
        return []
    args = {name: torch.cat([value, value[:1]]) if name in grow else value for name, value in named.items()}
    return [args]
