"""The library's surface: fold a model, inspect it, run passes, export."""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from normfuse.base import Pass
from normfuse.capture import readable, understood, unwrap
from normfuse.errors import VerificationError
from normfuse.examples import Examples, Inputs, calls_of
from normfuse.order import Step, is_folded, is_quantized, require
from normfuse.passes import PASSES
from normfuse.pipeline import Result, Selection, run
from normfuse.report import Report
from normfuse.verify import Tolerance
from normfuse.verify import verify as compare

if TYPE_CHECKING:
    from normfuse.calibration import Calibration
    from normfuse.lowering import EngineOptions
    from normfuse.lowering.axes import DynamicAxes
    from normfuse.lowering.precision import Placement, Precision

__all__ = ["EXACT_PASSES", "apply", "export", "fold", "fold_bn", "inspect"]

M = TypeVar("M", bound=nn.Module)
EXACT_PASSES: tuple[str, ...] = ("materialize", "fold-bn", "merge-branches", "fold-bn", "fold-affine")
_log = logging.getLogger("normfuse")


def fold(
    model: M,
    *,
    example_inputs: Inputs | Examples | None = None,
    inplace: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    duplicate_shared: bool = False,
    verify: bool = True,
) -> M:
    """Return the model with every exact pass applied, in eval mode.

    Weight reparametrizations are materialized, norms of fixed affine form folded into the weights around them, parallel
    linear branches merged, and the gains and shifts of the remaining norms moved into the layers that follow. The
    function of the model in eval mode stays the same, up to rounding.

    Args:
        model: Any module. It is not changed unless ``inplace``; wrappers such as DDP are looked through. An
            ``ExportedProgram`` is never changed: it is read as a module with the layers it was exported from.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments. With it, one run of
            the model is followed, which reads any model and knows every shape; without, the model is traced. Several
            such calls, as :class:`normfuse.Examples` or as a list that holds a tuple, are followed one after the other:
            the result is right in all of them. A part that none of them runs raises :class:`DeployedModelError` in the
            result, if it could be given a value that the fold changed.
        inplace: Edit ``model`` itself. Its old weights are held until all is done, so that an error can undo it.
        include: Globs of qualified names; only these layers are touched. All, if empty.
        exclude: Globs of qualified names of layers to leave alone.
        duplicate_shared: Give each call of a shared layer weights of its own where sharing is all that prevents a fold.
        verify: Run the result against the model before it is returned, on the example inputs or on some that are made
            up, and judge the difference by the rounding of the model's own type (:mod:`normfuse.proof`).

    Returns:
        A model of the same class; of an exported program, an ``fx.GraphModule``. Its ``train()`` raises
        :class:`normfuse.DeployedModelError`.

    Raises:
        CaptureError: The model does not run on the inputs, no part of it can be traced, or it is TorchScript.
        VerificationError: The result does not compute what the model computes; the text names the pass and the layer.
            The model is as it was, also with ``inplace``.

    Example:
        >>> folded = normfuse.fold(model, example_inputs=torch.randn(1, 3, 224, 224))  # doctest: +SKIP
    """
    options = {"include": include, "exclude": exclude, "duplicate_shared": duplicate_shared, "verify": verify}
    return apply(model, EXACT_PASSES, example_inputs=example_inputs, inplace=inplace, **options).model  # type: ignore[arg-type]


def fold_bn(
    model: M,
    *,
    example_inputs: Inputs | Examples | None = None,
    inplace: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    duplicate_shared: bool = False,
    verify: bool = True,
) -> M:
    """Return the model with each eligible BatchNorm folded into the weights around it, in eval mode.

    The arguments, result and errors are those of :func:`fold`; only the pass ``fold-bn`` runs.
    """
    options = {"include": include, "exclude": exclude, "duplicate_shared": duplicate_shared, "verify": verify}
    return apply(model, ("fold-bn",), example_inputs=example_inputs, inplace=inplace, **options).model  # type: ignore[arg-type]


def inspect(
    model: nn.Module,
    passes: Sequence[str | Pass] = ("fold-bn",),
    *,
    example_inputs: Inputs | Examples | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    duplicate_shared: bool = False,
) -> Report:
    """Say what the passes would do with each norm, and why not where they would not; changes nothing.

    The passes run on a copy of the model, so the answer is what a run would do.

    Raises:
        CaptureError: As for :func:`fold`.
    """
    model = readable(model)
    example_inputs = understood(model, example_inputs)
    return _run(model, passes, example_inputs, False, include, exclude, duplicate_shared, False).report


def apply(
    model: M,
    passes: Sequence[str | Pass],
    *,
    example_inputs: Inputs | Examples | None = None,
    inplace: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    duplicate_shared: bool = False,
    verify: bool = True,
    tolerance: Tolerance | None = None,
) -> Result[M]:
    """Run passes in order; the result has ``.model`` and ``.report``.

    Args:
        model: As for :func:`fold`.
        passes: Names such as ``"fold-bn"`` (:data:`normfuse.passes.PASSES` has them), or pass objects.
        example_inputs: As for :func:`fold`; needed for ``tolerance``.
        inplace: As for :func:`fold`.
        include: As for :func:`fold`.
        exclude: As for :func:`fold`.
        duplicate_shared: As for :func:`fold`.
        verify: As for :func:`fold`, where all passes are exact. What came of it is ``.report.verification``.
        tolerance: Verify the result, exact or not, within this tolerance on the example inputs against a float64 run
            of ``model`` instead.

    Raises:
        ValueError: A pass name is not known, or a tolerance is given without example inputs.
        CaptureError: As for :func:`fold`.
        VerificationError: The result of exact passes does not compute what the model computes, or leaves the tolerance.
    """
    if tolerance is not None and (example_inputs is None or inplace):
        raise ValueError("a tolerance needs example_inputs, and inplace=False to have something to compare with")
    model = readable(model)
    example_inputs = understood(model, example_inputs)
    verify = verify and tolerance is None
    result = _run(model, passes, example_inputs, inplace, include, exclude, duplicate_shared, verify)
    _tell(result.report)
    if tolerance is not None and example_inputs is not None:
        comparison = compare(unwrap(model), result.model, example_inputs, tolerance=tolerance)
        if not comparison:
            raise VerificationError(f"the result leaves the tolerance: {comparison}", comparison)
    return result


def export(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Inputs | Examples,
    fold_bn: bool = True,
    dynamic_axes: DynamicAxes | None = None,
    opset: int | None = None,
    precision: Precision = "fp32",
    keep_fp32: Sequence[str] = (),
    calibration: Calibration | None = None,
    qdq: Placement | None = None,
    engine: EngineOptions | None = None,
    norm_functions: bool = False,
    verify: bool = True,
) -> Report:
    """Fold a copy of the model, write it to ``path`` and verify the written file; the format follows the extension.

    Args:
        model: Any module; it is not changed. A folded model is written as it is.
        path: Where to write: ``.onnx``, or ``.engine`` for TensorRT.
        example_inputs: As for :func:`fold`; of several, the first is what the file is written and verified with.
        fold_bn: Whether to run every exact pass first. Without it, the file keeps its BatchNormalization nodes.
        dynamic_axes: Axes of any size, by input: see :func:`normfuse.lowering.onnx.export_onnx`.
        opset: The version of the ONNX operators; one that suits the runtime, if None.
        precision: The numbers of the file: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"mixed"`` (fp16 with norms in fp32),
            ``"int8"``, or ``"fp8"`` for TensorRT.
        keep_fp32: Globs of modules that ``"mixed"`` keeps in fp32 beside the norms.
        calibration: Data for ``"int8"`` and ``"fp8"``, an iterable of inputs as ``example_inputs`` are, as a list or a
            ``DataLoader``; every narrow type is checked for overflow on it, or on the example without it.
        qdq: Whose quantizers ``"int8"`` writes, ``"onnxruntime"`` or ``"tensorrt"``; those of the format, if None.
        engine: What to build, where ``path`` is an ``.engine``: package, targets, shapes. See
            :class:`normfuse.lowering.EngineOptions`.
        norm_functions: Write each L1 norm as one node that calls a function of the file, instead of plain nodes.
        verify: Whether to run the file in ONNX Runtime against a float64 run of the model. An engine is verified by the
            ONNX file that it is built from.

    Returns:
        The report of the fold; empty where nothing was to fold.

    Raises:
        LoweringError: The model cannot be written in this format, or its values leave the range of the precision.
        VerificationError: The written file does not reproduce the model; it is removed.
        OrderError: The statistics of the model still follow data (:mod:`normfuse.statistics`).
        MissingDependencyError: A package that the format needs is not installed.
    """
    from normfuse.lowering import Numbers
    from normfuse.lowering import export as write

    placement = qdq or ("tensorrt" if Path(path).suffix.lower() == ".engine" else "onnxruntime")
    numbers = Numbers(precision, tuple(keep_fp32), calibration, placement)
    source = unwrap(readable(model))
    example_inputs = understood(source, example_inputs)
    require(source, Step.EXPORT)

    def folded(source: nn.Module) -> Result[nn.Module]:
        return apply(source, EXACT_PASSES, example_inputs=example_inputs, verify=verify)

    result = write(
        source,
        path,
        example_inputs=calls_of(example_inputs)[0],
        fold_bn=fold_bn,
        fold=None if is_folded(source) or is_quantized(source) else folded,
        dynamic_axes=dynamic_axes,
        opset=opset,
        precision=numbers,
        engine=engine,
        norm_functions=norm_functions,
        verify=verify,
    )
    return result.report or Report(())


def _run(
    model: M,
    passes: Sequence[str | Pass],
    example_inputs: Inputs | Examples | None,
    inplace: bool,
    include: Sequence[str],
    exclude: Sequence[str],
    duplicate_shared: bool,
    verify: bool,
) -> Result[M]:
    names = (("duplicate-shared",) if duplicate_shared else ()) + tuple(passes)
    chosen = [_pass(one) if isinstance(one, str) else one for one in names]
    selection = Selection(tuple(include), tuple(exclude))
    return run(model, chosen, example_inputs=example_inputs, selection=selection, inplace=inplace, verify=verify)


def _pass(name: str) -> Pass:
    if name not in PASSES:
        raise ValueError(f"no pass is called {name!r}; there are {', '.join(PASSES)}")
    return PASSES[name]()


def _tell(report: Report) -> None:
    """Log one line; a warning where a model with norms came out unchanged."""
    _log.info(report.summary())
    if report.verification is not None and not report.verification.verified:
        _log.warning(str(report.verification))
    if report or not report.norms:
        return
    reasons = collections.Counter(o.refusal for o in report.norms if o.refusal)
    most = f"; most often {reasons.most_common(1)[0][0]}" if reasons else ""
    _log.warning("no norm of this model was changed%s", most)
