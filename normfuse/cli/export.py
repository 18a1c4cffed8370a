"""``normfuse export``: fold, write ONNX or an engine, and verify the file that was written."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli import arguments, calibration_data, engines, fold, results, source
from normfuse.cli.arguments import AxisType, Check, Request
from normfuse.cli.command import Command
from normfuse.cli.output import Output

if TYPE_CHECKING:
    from normfuse.cli.inputs import Example
    from normfuse.lowering import ExportResult, Numbers
    from normfuse.pipeline import Result

FOLDING = ("include", "exclude", "duplicate_shared")


@click.command("export", cls=Command)
@arguments.model_argument
@click.option(
    "--fold-bn/--no-fold-bn", default=True, show_default=True, help="Fold first, or keep every norm as a node."
)
@arguments.output_option
@click.option("--opset", type=click.IntRange(min=18), help="ONNX opset; one that suits the runtime if not given.")
@click.option("--dynamic", type=AxisType(), multiple=True, help="Axis of any size; static if not given.")
@arguments.precision_options
@arguments.engine_options
@click.option("--norm-functions", is_flag=True, help="Write L1 norms as functions of the file, not as plain nodes.")
@arguments.loading_options
@arguments.input_options
@arguments.folding_options
@arguments.verify_option
@arguments.count_option
@arguments.output_options
def command(
    out: Output,
    request: Request,
    check: Check,
    fold_bn: bool,
    output: Path | None,
    opset: int | None,
    dynamic: tuple[str, ...],
    norm_functions: bool,
    require_fold: bool,
    **options: Any,
) -> None:
    """Fold MODEL, write it as ONNX or as a TensorRT engine, and verify the written file against a float64 run of MODEL.

    Writes MODEL.onnx beside MODEL unless -o is given; -o MODEL.engine writes an engine, its description
    MODEL.engine.json and its log. An engine is verified by the ONNX file that it is built from.
    """
    extensions = (".onnx", ".engine")
    target = results.destination(output, fold.default_path(request, ".onnx"), out, extensions=extensions)
    wants_engine = target.suffix.lower() == ".engine"
    engines.require_fitting(options, wants_engine=wants_engine)
    engine = engines.request(options, request, target, out) if wants_engine else None
    if source.is_onnx(request.model):
        if engine is None:
            raise click.UsageError(f"{request.model} is an ONNX file already; normfuse fold folds the norms in it")
        engines.from_onnx(
            request, check, target, engine, out, fold_bn=fold_bn, require_fold=require_fold, options=options
        )
        return
    loaded = source.load(request)
    example = source.example_for(loaded, request, out)
    numbers = _numbers(options, loaded, example, wants_engine=wants_engine)
    if engine is not None:
        engines.require_profiles(engine, loaded.model, example.inputs, dynamic)
    from normfuse import api, lowering

    def apply(model: Any) -> Result:
        chosen: dict[str, Any] = {key: options[key] for key in FOLDING} | {"verify": not check.no_verify}
        result = api.apply(model, api.EXACT_PASSES, example_inputs=example.inputs, **chosen)
        results.show_report(result.report, out)
        if require_fold:
            results.require_all_folded(result.report, out)
        return result

    with out.step("exporting"), results.reporting(out):
        exported = lowering.export(
            loaded.model,
            target,
            example_inputs=example.inputs,
            fold_bn=fold_bn,
            fold=None if api.is_folded(loaded.model) or api.is_quantized(loaded.model) else apply,
            dynamic_axes=dynamic or None,
            opset=opset,
            precision=numbers,
            engine=engine,
            norm_functions=norm_functions,
            verify=not check.no_verify,
            num_inputs=check.num_inputs,
            seed=request.seed,
        )
    _show(exported, target, request, out)


def _numbers(options: dict[str, Any], loaded: source.Source, example: Example, *, wants_engine: bool) -> Numbers:
    """Return how the numbers are to be written, with the calibration data read."""
    from normfuse.lowering import Numbers
    from normfuse.outputs import input_tensors

    data: Any = None
    if options["calib"] is not None:
        size = next((tensor.shape[0] for tensor in input_tensors(example.inputs) if tensor.dim()), 1)
        count = max(options["calib_samples"], size)
        read = calibration_data.read(options["calib"], loaded.model, batch_size=size, limit=count - count % size)
        data = [item for item in read if _size_of(item) == size]  # a file of one shape takes no shorter batch
        if not data:
            raise click.UsageError(f"--calib: fewer samples than the {size} of a batch; pass --input-shape 1x...")
    return Numbers(
        precision=options["precision"] or "fp32",
        keep_fp32=options["keep_fp32"],
        calibration=data,
        qdq=options["qdq"] or ("tensorrt" if wants_engine else "onnxruntime"),
        calibrator=options["calib_method"],
        min_cosine=options["min_cosine"],
        min_top1=options["min_top1"],
    )


def _size_of(item: Any) -> int:
    from normfuse.outputs import input_tensors

    return next(tensor.shape[0] for tensor in input_tensors(item) if tensor.dim())


def _show(exported: ExportResult, target: Path, request: Request, out: Output) -> None:
    """Print what was lost and written, and what to do next."""
    out.document["ranges"] = exported.loss.to_dict()
    if exported.comparison is not None:
        results.show_comparison(exported.comparison, out)
    info = exported.info
    for text in (*exported.loss.notes, *info.notes):
        out.note(text)
    if exported.engine is not None:
        engines.show(exported.engine, target, out)
    else:
        nodes = sum(info.nodes.values())
        entries = {"format": "ONNX", "opset": info.opset, "nodes": nodes, "operators": dict(info.nodes)}
        results.show_file(target, out, f"opset {info.opset}, {nodes} nodes", **entries)
    results.show_next(f"normfuse verify {shlex.quote(request.model)} {shlex.quote(str(target))}", out)
    out.finish()
