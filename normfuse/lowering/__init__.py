"""Write a model for a runtime: the backend follows the extension of the file.

``.onnx`` is written here; engines (``.engine``) are not part of this version. :func:`lower` writes what it is given,
:func:`export` folds first and verifies the written file against the source.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from normfuse.errors import LoweringError, MissingDependencyError, VerificationError
from normfuse.graph import Inputs
from normfuse.lowering.onnx import DynamicAxes, OnnxInfo, Precision, export_onnx, parse_axes
from normfuse.lowering.staging import staged
from normfuse.outputs import named_inputs
from normfuse.rerun import Samples, sample_inputs
from normfuse.verify import verify as compare

if TYPE_CHECKING:
    from normfuse.comparison import Comparison
    from normfuse.pipeline import Result
    from normfuse.report import Report

__all__ = ["ExportResult", "OnnxInfo", "export", "lower"]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export did.

    Attributes:
        report: What became of each norm; None where nothing was folded.
        info: The file.
        comparison: How far the file is from the float64 run of the source; None where it was not verified.
    """

    report: Report | None
    info: OnnxInfo
    comparison: Comparison | None


def lower(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    dynamic_axes: DynamicAxes | None = None,
    opset: int | None = None,
    fold_bn: bool = True,
    precision: Precision = "fp32",
) -> OnnxInfo:
    """Write a model as it is in the format that the extension of ``path`` names; see :func:`.onnx.export_onnx`.

    Raises:
        LoweringError: The extension is unknown, or the model cannot be written.
        MissingDependencyError: The format needs a package that is not installed or not in this version.
    """
    _require_backend(path)
    options = {"dynamic_axes": dynamic_axes, "opset": opset, "fold_bn": fold_bn, "precision": precision}
    return export_onnx(model, path, example_inputs, **options)


def _require_backend(path: str | os.PathLike[str]) -> None:
    extension = Path(path).suffix.lower()
    if extension == ".engine":
        raise MissingDependencyError("engines are not available in this version: write .onnx instead")
    if extension != ".onnx":
        raise LoweringError(f"cannot tell the format of {os.fspath(path)}: its name should end in .onnx")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Inputs,
    fold_bn: bool = True,
    fold: Callable[[nn.Module], Result] | None = None,
    dynamic_axes: DynamicAxes | None = None,
    opset: int | None = None,
    precision: Precision = "fp32",
    verify: bool = True,
    num_inputs: int = 8,
    seed: int = 0,
) -> ExportResult:
    """Fold a copy of the model, write it, and verify the written file against a float64 run of the source.

    Args:
        model: The source; it is not changed.
        path: The file. It appears, or replaces an earlier one, only when everything succeeded.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
        fold_bn: False folds nothing and keeps BatchNormalization nodes in the file.
        fold: What folds before the model is written: given the model, it returns a result with ``model`` and
            ``report`` and leaves its argument alone. None leaves folding to the exporter, as for a folded model.
        dynamic_axes: Axes of any size; see :func:`normfuse.lowering.onnx.export_onnx`.
        opset: The version of the ONNX operators; None takes the exporter's.
        precision: The floating-point type of the file.
        verify: Run the file in ONNX Runtime and compare.
        num_inputs: On how many inputs: the example and random variants of it.
        seed: Of the random variants.

    Raises:
        VerificationError: The file does not reproduce the source; it is not kept.
        LoweringError: The model cannot be written; see :func:`lower`.
        MissingDependencyError: onnx, onnxscript or, to verify, onnxruntime is not installed.
    """
    _require_backend(path)
    result = fold(model) if fold and fold_bn else None
    options = {"dynamic_axes": dynamic_axes, "opset": opset, "fold_bn": fold_bn, "precision": precision}
    if verify and result and precision != "fp32":  # so much rounding would hide a defect of the fold
        _require_equal(compare(model, result.model, example_inputs), "the folded model")
    comparison = None
    with staged(path) as target:
        info = lower(result.model if result else model, target, example_inputs, **options)
        if verify:
            samples = sample_inputs(example_inputs, num_inputs, seed).values
            longer = _longer_batch(model, example_inputs, dynamic_axes)
            comparison = compare(model, target, Samples((*samples, *longer)))
            _require_equal(comparison, "the file")
    return ExportResult(result.report if result else None, dataclasses.replace(info, path=Path(path)), comparison)


def _require_equal(comparison: Comparison, subject: str) -> None:
    if not comparison:
        raise VerificationError(f"{subject} does not reproduce the model: {comparison}", comparison)


def _longer_batch(model: nn.Module, inputs: Inputs, dynamic_axes: DynamicAxes | None) -> list[Inputs]:
    """Return the inputs with one more entry along axis 0 where that is dynamic, to see whether it is; else nothing."""
    named = named_inputs(model, inputs)
    grow = {name for name, labels in parse_axes(dynamic_axes, named).items() if 0 in labels}
    if not grow:
        return []
    args = {name: torch.cat([value, value[:1]]) if name in grow else value for name, value in named.items()}
    return [args]
