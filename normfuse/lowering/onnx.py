"""Write a model as ONNX, with the checks that keep a bad file from being written.

``torch.onnx.export(dynamo=True)`` optimizes the graph as it writes, and folds Conv+BatchNorm pairs on its own. Where
BatchNormalization must remain, and for bfloat16, whose folded weights it would write as float32, the graph is written
as traced and only its constants are evaluated; unevaluated, no runtime can optimize it.

The file is checked, holds the version and the manifest of normfuse in its metadata, and appears only when complete.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normfuse import __version__, deploy, rerun
from normfuse.atomic_files import staged
from normfuse.errors import LoweringError, MissingDependencyError
from normfuse.graph import Inputs
from normfuse.lowering import graphs, onnx_functions, onnx_mends, onnx_qdq, onnx_quantize
from normfuse.lowering.axes import Axes, DynamicAxes, dynamic_shapes, parse_axes, require_dynamic
from normfuse.lowering.precision import Numbers, Placement, Precision, cast, require_weights_in_range
from normfuse.names import require_plain_names
from normfuse.outputs import arguments, named_inputs

EXTERNAL_DATA_BYTES = 2**31 - 2**24  # a protobuf file ends at 2 GiB; some room for the graph
BFLOAT16_OPSET = 22  # the first in which Conv takes bfloat16
GROUP_NORM_OPSET = 21  # the first with a GroupNormalization that is one operator
RMS_NORM_OPSET = 23  # the first with RMSNormalization; below, a norm is written as seven small nodes
_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


@dataclass(frozen=True, slots=True)
class OnnxInfo:
    """What was written.

    Attributes:
        path: The file.
        size_bytes: Its size, with external data.
        opset: The version of the standard operators.
        nodes: How many nodes of each operator.
        inputs: The names of its inputs, in order.
        notes: What a reader should know about it.
    """

    path: Path
    size_bytes: int
    opset: int
    nodes: collections.Counter[str]
    inputs: tuple[str, ...]
    notes: tuple[str, ...] = ()


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    dynamic_axes: DynamicAxes | None = None,
    opset: int | None = None,
    fold_bn: bool = True,
    precision: Precision | Numbers = "fp32",
    runtime: Placement = "onnxruntime",
    norm_functions: bool = False,
) -> OnnxInfo:
    """Write the model, in eval mode, as an ONNX file; the model itself is not changed.

    Args:
        model: The model.
        path: The file; one that exists is replaced. Weights over 2 GB go to ``<path>.data`` beside it.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
        dynamic_axes: Axes of any size: ``["x:0", "x:2=height"]`` or ``{"x": [0], "mask": {0: "batch"}}``, by the names
            of ``forward``; axis 0 is called ``batch`` where it is given no name.
        opset: The version of the standard operators; None takes the exporter's, or what the
            model needs: 22 for bfloat16, 23 for RMSNorm, 21 for GroupNorm where it is to be one node of TensorRT's.
        fold_bn: False keeps every BatchNormalization as a node.
        precision: The numbers of the file: a word, or :class:`.precision.Numbers` with the calibration data and the
            rest of what ``mixed``, ``int8`` and ``fp8`` can be told. Floating-point inputs have the type of the file.
        runtime: What the file is for.
        norm_functions: Write each L1 norm as one node that calls a function of the model (:mod:`.onnx_functions`),
            instead of plain nodes.

    Raises:
        LoweringError: The exporter cannot write this model, not in this opset or precision, or what it wrote is not
            valid ONNX. No file is left behind.
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    _require()
    require_plain_names(model, "the model", LoweringError)  # the exporter pastes them into code
    numbers = precision if isinstance(precision, Numbers) else Numbers(precision)
    twin = rerun.duplicate(model)
    require_weights_in_range(twin, numbers)
    twin, inputs = cast(twin, numbers), rerun.cast_inputs(example_inputs, numbers.dtype)
    opset = _lowest_opset(twin, numbers, runtime) if opset is None else opset
    optimize = fold_bn and numbers.precision != "bf16"
    axes = parse_axes(dynamic_axes, named_inputs(twin, inputs))
    twin = onnx_functions.stand_in(twin) if norm_functions else twin
    twin = onnx_qdq.stand_in(twin, numbers.precision)
    program = _export(twin, inputs, dynamic_shapes(axes, named_inputs(twin, inputs)), opset, optimize=optimize)
    onnx_functions.define(program.model)
    _describe(program.model, deploy.manifest_of(model))
    with staged(path, LoweringError) as target:
        _save(program, target)
        if numbers.quantized:
            data = numbers.batches(twin, inputs)
            onnx_quantize.quantize_file(target, [named_inputs(twin, item) for item in data], numbers)
        info = _inspect(target, opset, axes)
        return dataclasses.replace(info, path=Path(path), notes=_notes(info.nodes, fold_bn=fold_bn))


def _lowest_opset(model: nn.Module, numbers: Numbers, runtime: Placement) -> int | None:
    """Return the first opset that has what the model needs; None for whichever the exporter takes."""
    kinds = {type(module) for module in model.modules()}
    needed = [BFLOAT16_OPSET] if numbers.precision == "bf16" else []
    needed += [RMS_NORM_OPSET] if any(issubclass(kind, nn.RMSNorm) for kind in kinds) else []
    needed += [GROUP_NORM_OPSET] if runtime == "tensorrt" and any(issubclass(k, nn.GroupNorm) for k in kinds) else []
    return max(needed, default=None)


def _require() -> None:
    graphs.require()
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it, and says so less clearly
    except ImportError as error:
        raise MissingDependencyError("onnxscript is not installed: pip install 'normfuse[onnx]'") from error


def _export(
    model: nn.Module, inputs: Inputs, dynamic_shapes: dict[str, Any] | None, opset: int | None, *, optimize: bool
) -> torch.onnx.ONNXProgram:
    args, kwargs = arguments(inputs)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                verbose=False,
                optimize=optimize,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
            )
            if program is not None and not optimize:
                _evaluate_constants(program)
    except Exception as error:  # the exporter lets errors of any kind through
        raise LoweringError(_explain(error, dynamic=dynamic_shapes is not None)) from error
    if program is None:
        raise LoweringError("the exporter returned nothing")
    onnx_mends.mend(program.model)
    return program


def _evaluate_constants(program: torch.onnx.ONNXProgram) -> None:
    import onnx_ir.passes.common
    import onnxscript

    onnxscript.optimizer.fold_constants(program.model)
    onnx_ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program.model)
    onnxscript.optimizer.remove_unused_nodes(program.model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from writing to the terminal; its errors arrive as exceptions."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(error: BaseException, *, dynamic: bool) -> str:
    """Return the first cause of an exporter's error in one line, and what to try next."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
    kind = type(cause).__name__
    if dynamic and ("onstraint" in text or "onstraint" in kind or "specializ" in text):
        advice = "the model fixes the size of an axis: leave it out of dynamic_axes"
    elif "DataDependent" in kind or "data-dependent" in text or "nonzero" in text:
        advice = "its control flow depends on data: export the part without it, such as model.backbone"
    else:
        advice = "try another opset, or export a submodule to find the part at fault"
    return f"the model cannot be written as ONNX: {kind}: {text[:300]}; {advice}"


def _describe(model: Any, manifest: Mapping[str, Any] | None) -> None:
    model.metadata_props["normfuse.version"] = __version__
    if manifest:
        model.metadata_props[graphs.MANIFEST] = json.dumps(manifest)


def _save(program: torch.onnx.ONNXProgram, target: Path) -> None:
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value)
    with _quiet():
        program.save(target, external_data=size > EXTERNAL_DATA_BYTES)


def _inspect(path: Path, opset: int | None, axes: Axes) -> OnnxInfo:
    """Check the written file and describe it."""
    onnx = graphs.require()
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except Exception as error:  # the checker and the shape inference share no base class
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LoweringError(f"the exporter wrote an invalid file: {text}") from error
    model = graphs.load(path)
    version = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and version != opset:
        raise LoweringError(f"opset {opset} is not possible for this model: the exporter wrote {version}")
    require_dynamic(model, axes)
    training = [node.name for node in graphs.nodes(model) if graphs.trains(node)]
    if training:
        raise LoweringError(f"{len(training)} nodes normalize with batch statistics: {training[0]}")
    return OnnxInfo(
        path=path,
        size_bytes=sum(file.stat().st_size for file in path.parent.iterdir()),
        opset=version,
        nodes=graphs.op_counts(model),
        inputs=tuple(value.name for value in model.graph.input),
    )


def _notes(nodes: Mapping[str, int], *, fold_bn: bool) -> tuple[str, ...]:
    left = nodes.get("BatchNormalization", 0)
    return (f"{left} BatchNormalization nodes remain",) if left and fold_bn else ()
