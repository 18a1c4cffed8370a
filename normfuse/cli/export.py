"""``normfuse export``: fold, write ONNX, and verify the file that was written."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli import arguments, fold, results, source
from normfuse.cli.arguments import AxisType, Check, Request
from normfuse.cli.command import Command
from normfuse.cli.output import Output
from normfuse.errors import MissingDependencyError

if TYPE_CHECKING:
    from normfuse.pipeline import Result


@click.command("export", cls=Command)
@arguments.model_argument
@click.option(
    "--fold-bn/--no-fold-bn", default=True, show_default=True, help="Fold first, or keep every norm as a node."
)
@arguments.output_option
@click.option("--opset", type=click.IntRange(min=18), help="ONNX opset; the exporter's own if not given.")
@click.option("--dynamic", type=AxisType(), multiple=True, help="Axis of any size; static if not given.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
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
    precision: Any,
    require_fold: bool,
    **options: Any,
) -> None:
    """Fold MODEL, write it as ONNX and verify the written file against a float64 run of MODEL.

    Writes MODEL.onnx beside MODEL unless -o is given.
    """
    if output is not None and output.suffix.lower() == ".engine":
        raise MissingDependencyError(f"{output}: engines are not available in this version; write .onnx instead")
    if source.is_onnx(request.model):
        raise click.UsageError(f"{request.model} is an ONNX file already; normfuse fold folds the norms in it")
    target = results.destination(output, fold.default_path(request, ".onnx"), force=out.force, extensions=(".onnx",))
    loaded = source.load(request)
    example = source.example_for(loaded, request, out)
    from normfuse import api, lowering

    def apply(model: Any) -> Result:
        result = api.apply(model, api.EXACT_PASSES, example_inputs=example.inputs, **options)
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
            fold=apply,
            dynamic_axes=dynamic or None,
            opset=opset,
            precision=precision,
            verify=not check.no_verify,
            num_inputs=check.num_inputs,
            seed=request.seed,
        )
    if exported.comparison is not None:
        results.show_comparison(exported.comparison, out)
    info = exported.info
    for text in info.notes:
        out.note(text)
    nodes = sum(info.nodes.values())
    details = f"opset {info.opset}, {nodes} nodes"
    results.show_file(target, out, details, format="ONNX", opset=info.opset, nodes=nodes, operators=dict(info.nodes))
    results.show_next(f"normfuse verify {shlex.quote(request.model)} {shlex.quote(str(target))}", out)
    out.finish()
