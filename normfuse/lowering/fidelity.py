"""Compare a written file with its source, by a measure that fits its numbers.

Files in a floating-point type are held to rounding (:mod:`normfuse.comparison`); what rounding costs a ``mixed`` file
is what it costs the source with the same layers in the same types. Quantized numbers are no rounding of the source: a
file of them is judged on its calibration data, by direction and largest entries (:mod:`.integer_verdict`).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from torch import nn

from normfuse import rerun
from normfuse.comparison import ANYTHING, Comparison
from normfuse.graph import Inputs
from normfuse.lowering import integer_verdict, onnx_qdq
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
        found = verify(model, Path(path), samples, tolerance=ANYTHING)
        return judge_quantized(found, numbers)
    samples = sample_inputs(example_inputs, num_inputs, seed).values
    longer = _longer_batch(model, example_inputs, axes)
    if onnx_qdq.is_calibrated(model):
        return onnx_qdq.compare(model, path, Samples((*samples, *longer)))
    like = cast(rerun.duplicate(model), numbers) if numbers.precision == "mixed" else None
    return verify(model, Path(path), Samples((*samples, *longer)), rounds_like=like)


def judge_quantized(found: Comparison, numbers: Numbers) -> Comparison:
    """Return the comparison of a quantized file, failed where it points elsewhere than its source, or chooses so."""
    least = {"min_cosine": numbers.min_cosine, "min_top1": numbers.min_top1}
    step = integer_verdict.STEPS[numbers.precision]
    found = integer_verdict.judged(found, "the float64 run", step=step, **least)
    asked = f"cosine at least {numbers.min_cosine:g}"
    if found.top1:
        asked += f", the same top-1 in {numbers.min_top1:.0%} of the rows but for entries that are one step apart"
    return dataclasses.replace(found, notes=(*found.notes, f"quantized, so judged on the calibration data: {asked}"))


def _longer_batch(model: nn.Module, inputs: Inputs, axes: Axes) -> list[Inputs]:
    """Return the inputs with one more entry along axis 0 where that is dynamic, to see whether it is; else nothing."""
    named = named_inputs(model, inputs)
    grow = {name for name, labels in axes.items() if 0 in labels}
    if not grow:
        return []
    args = {name: torch.cat([value, value[:1]]) if name in grow else value for name, value in named.items()}
    return [args]
