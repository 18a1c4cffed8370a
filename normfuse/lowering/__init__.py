"""Write a model for a runtime: the backend follows the extension of the file.

``.onnx`` is for any runtime, ``.engine`` for TensorRT, by way of an ONNX file. :func:`lower` writes what it is given,
:func:`export` folds first and verifies the written file against the source.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from normfuse.atomic_files import staged
from normfuse.errors import LoweringError, VerificationError
from normfuse.graph import Inputs
from normfuse.lowering import fidelity, tensorrt
from normfuse.lowering.axes import DynamicAxes, parse_axes
from normfuse.lowering.onnx import OnnxInfo, export_onnx
from normfuse.lowering.precision import Loss, Numbers, Precision, check_ranges
from normfuse.lowering.profiles import with_profiles
from normfuse.lowering.tensorrt import EngineInfo, EngineOptions, build_engine
from normfuse.outputs import named_inputs
from normfuse.verify import verify as compare

if TYPE_CHECKING:
    from normfuse.comparison import Comparison
    from normfuse.pipeline import Result
    from normfuse.report import Report

__all__ = ["EngineInfo", "EngineOptions", "ExportResult", "Numbers", "OnnxInfo", "export", "lower"]
EXTENSIONS = (".onnx", ".engine")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export did.

    Attributes:
        report: What became of each norm; None where nothing was folded.
        info: The ONNX file, for an engine the one it was built from.
        comparison: How far that file is from the float64 run of the source; None where it was not verified.
        loss: What the model loses in the type of the file.
        engine: The engine; None where none was asked for.
    """

    report: Report | None
    info: OnnxInfo
    comparison: Comparison | None
    loss: Loss
    engine: EngineInfo | None = None


def lower(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    dynamic_axes: DynamicAxes | None = None,
    opset: int | None = None,
    fold_bn: bool = True,
    precision: Precision | Numbers = "fp32",
    engine: EngineOptions | None = None,
) -> OnnxInfo | EngineInfo:
    """Write a model as it is in the format that the extension of ``path`` names.

    The arguments are those of :func:`.onnx.export_onnx`; ``engine`` says what to build, of an ``.engine``.

    Raises:
        LoweringError: The extension is unknown, or the model cannot be written.
        MissingDependencyError: The format needs a package that is not installed.
    """
    arguments = {"dynamic_axes": dynamic_axes, "opset": opset, "fold_bn": fold_bn, "precision": precision}
    result = export(model, path, example_inputs=example_inputs, engine=engine, verify=False, **arguments)
    return result.engine or result.info


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Inputs,
    fold_bn: bool = True,
    fold: Callable[[nn.Module], Result] | None = None,
    dynamic_axes: DynamicAxes | None = None,
    opset: int | None = None,
    precision: Precision | Numbers = "fp32",
    engine: EngineOptions | None = None,
    norm_functions: bool = False,
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
        dynamic_axes: Axes of any size; see :func:`normfuse.lowering.onnx.export_onnx`. Those of the profiles of an
            engine need not be said again.
        opset: The version of the ONNX operators; None takes the exporter's.
        precision: The numbers of the file.
        engine: What to build, where ``path`` is an ``.engine``; None for the defaults.
        norm_functions: Write L1 norms as functions; see :func:`normfuse.lowering.onnx.export_onnx`.
        verify: Run the file in ONNX Runtime and compare. An engine is verified by the file that it is built from.
        num_inputs: On how many inputs: the example and random variants of it, or items of the calibration data.
        seed: Of the random variants.

    Raises:
        VerificationError: The file does not reproduce the source; it is not kept.
        LoweringError: The model cannot be written; see :func:`lower`.
        MissingDependencyError: onnx, onnxscript, TensorRT or, to verify, onnxruntime is not installed.
    """
    wants_engine = _extension(path) == ".engine"
    options = engine or EngineOptions()
    numbers = precision if isinstance(precision, Numbers) else Numbers(precision)
    named = named_inputs(model, example_inputs)
    axes = parse_axes(dynamic_axes, named)
    profiles = options.shapes.profiles(named)
    if wants_engine:
        tensorrt.choose(options)  # before any work
        axes = with_profiles(axes, profiles)
    result = fold(model) if fold and fold_bn else None
    source = result.model if result else model
    loss = check_ranges(source, numbers, numbers.batches(source, example_inputs))
    if verify and result and numbers.precision != "fp32":  # so much rounding would hide a defect of the fold
        _require_equal(compare(model, source, example_inputs), "the folded model")
    comparison = built = None
    with staged(path, LoweringError) as target, tempfile.TemporaryDirectory(dir=target.parent) as aside:
        written = Path(aside, target.with_suffix(".onnx").name) if wants_engine else target
        info = export_onnx(
            source,
            written,
            example_inputs,
            dynamic_axes=axes,
            opset=opset,
            fold_bn=fold_bn,
            precision=numbers,
            runtime="tensorrt" if wants_engine else "onnxruntime",
            norm_functions=norm_functions,
        )
        if verify:
            comparison = fidelity.compare_file(model, written, example_inputs, numbers, axes, num_inputs, seed)
            _require_equal(comparison, "the file")
        if wants_engine:
            built = build_engine(written, target, options=options, profiles=profiles, precision=numbers.precision)
            for file in Path(aside).iterdir() if options.keep_onnx else ():
                file.rename(target.parent / file.name)
    final = Path(path)
    info = dataclasses.replace(info, path=final.with_suffix(".onnx") if wants_engine else final)
    built = dataclasses.replace(built, path=final) if built else None
    return ExportResult(result.report if result else None, info, comparison, loss, built)


def _extension(path: str | os.PathLike[str]) -> str:
    extension = Path(path).suffix.lower()
    if extension not in EXTENSIONS:
        raise LoweringError(f"cannot tell the format of {os.fspath(path)}: its name should end in .onnx or .engine")
    return extension


def _require_equal(comparison: Comparison, subject: str) -> None:
    if not comparison:
        raise VerificationError(f"{subject} does not reproduce the model: {comparison}", comparison)
