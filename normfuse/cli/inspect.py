"""``normfuse inspect``: every norm of a model, what folding would do with it, and why not."""

from __future__ import annotations

import shlex

import click

from normfuse.cli import arguments, onnx_files, results, source
from normfuse.cli.arguments import Request
from normfuse.cli.command import Command
from normfuse.cli.output import Output


@click.command("inspect", cls=Command)
@arguments.model_argument
@arguments.loading_options
@arguments.input_options
@arguments.folding_options
@arguments.output_options
def command(
    out: Output,
    request: Request,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    duplicate_shared: bool,
    require_fold: bool,
) -> None:
    """List every norm of MODEL with what would be done with it; change nothing.

    MODEL is a file (.pt, .pth, .safetensors, .pt2, .onnx) or an architecture: timm:NAME, torchvision:NAME,
    package.module:factory.
    """
    if source.is_onnx(request.model):
        report = onnx_files.fold(request, out, include, exclude).report
    else:
        loaded = source.load(request)
        example = source.example_for(loaded, request, out)
        from normfuse import api

        with out.step("inspecting"):
            report = api.inspect(
                loaded.model,
                api.EXACT_PASSES,
                example_inputs=example.inputs,
                include=include,
                exclude=exclude,
                duplicate_shared=duplicate_shared,
            )
    results.show_report(report, out, every=True)
    if require_fold:
        results.require_all_folded(report, out)
    if report:
        results.show_next(f"normfuse fold {shlex.quote(request.model)}", out)
    out.finish()
