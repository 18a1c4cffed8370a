"""``normfuse fold``: every exact pass; a model file that loads again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli import arguments, inputs, onnx_files, results, source
from normfuse.cli.arguments import Check, Request
from normfuse.cli.command import Command
from normfuse.cli.output import Output

if TYPE_CHECKING:
    from normfuse.comparison import Comparison


@click.command("fold", cls=Command)
@arguments.model_argument
@arguments.output_option
@arguments.loading_options
@arguments.input_options
@arguments.folding_options
@arguments.verify_option
@arguments.count_option
@arguments.tolerance_options
@arguments.output_options
def command(
    out: Output,
    request: Request,
    check: Check,
    output: Path | None,
    require_fold: bool,
    **options: Any,
) -> None:
    """Fold every norm of MODEL that has a home and write a model file that loads again.

    Writes MODEL.folded.pt (MODEL.folded.onnx for an ONNX file) unless -o is given; .safetensors holds weights only.
    """
    onnx = source.is_onnx(request.model)
    extensions = (".onnx",) if onnx else (".pt", ".pth", ".safetensors")
    default = default_path(request, f".folded{extensions[0]}")
    target = results.destination(output, default, out, extensions=extensions)
    if onnx:
        _fold_onnx(request, check, target, out, require_fold, options)
    else:
        _fold_model(request, check, target, out, require_fold, options)
    out.finish()


def default_path(request: Request, suffix: str) -> Path:
    """Return the file beside the input with its stem; in the current folder for an architecture."""
    if source.is_file(request.model):
        path = Path(request.model)
        return path.with_name(path.name.removesuffix(path.suffix).removesuffix(".folded") + suffix)
    return Path(request.model.rpartition(":")[2].replace("/", "_") + suffix)


def _fold_model(
    request: Request, check: Check, target: Path, out: Output, require_fold: bool, options: dict[str, Any]
) -> None:
    loaded = source.load(request)
    example = source.example_for(loaded, request, out)
    from normfuse import api, outputs, serialize

    options["verify"] = not check.no_verify
    with out.step("folding"), results.reporting(out):
        result = api.apply(loaded.model, api.EXACT_PASSES, example_inputs=example.inputs, **options)
    results.show_report(result.report, out)
    if require_fold:
        results.require_all_folded(result.report, out)
    comparison = None if check.no_verify else compare(loaded.model, result.model, example, request, check, out)
    if comparison is not None:
        results.require_passed(comparison, "the folded model does not reproduce its source", out)
    remember_inputs(result.model, outputs.specification(loaded.model, example.inputs))
    with out.step("writing"):
        kwargs = dict(request.arch_kwargs) if loaded.arch else None
        serialize.save(result.model.cpu(), target, arch=loaded.arch, arch_kwargs=kwargs, verification=comparison)
    results.show_file(target, out, format="folded")
    results.show_next(f"normfuse export {shlex.quote(str(target))}", out)


def remember_inputs(model: Any, specification: list[dict[str, Any]]) -> None:
    """Put what the model was run on into its manifest, so that later commands need not guess."""
    manifest = getattr(model, "normfuse_manifest", None)
    if manifest is not None:
        manifest["inputs"] = specification


def compare(
    model: Any, folded: Any, example: inputs.Example, request: Request, check: Check, out: Output
) -> Comparison:
    """Compare the folded model with its source on the example and random variants of it, and show the result."""
    from normfuse.rerun import sample_inputs
    from normfuse.verify import verify

    with out.step("verifying"):
        samples = sample_inputs(example.inputs, check.num_inputs, request.seed)
        comparison = verify(model, folded, samples, tolerance=results.tolerance_of(check))
    results.show_comparison(comparison, out)
    return comparison


def _fold_onnx(
    request: Request, check: Check, target: Path, out: Output, require_fold: bool, options: dict[str, Any]
) -> None:
    result = onnx_files.fold(request, out, options["include"], options["exclude"])
    from normfuse.atomic_files import staged
    from normfuse.lowering.onnx_fold import count_ops, write

    results.show_report(result.report, out)
    if require_fold:
        results.require_all_folded(result.report, out)
    with staged(target) as temporary:
        write(result.model, temporary)
        if not check.no_verify:
            comparison = onnx_files.check(request, temporary, check, out)
            results.show_comparison(comparison, out)
            results.require_passed(comparison, "the folded file does not reproduce its source", out)
    nodes = sum(count_ops(target).values())
    results.show_file(target, out, f"{nodes} nodes, was {out.document['model']['nodes']}", format="ONNX", nodes=nodes)
    results.show_next(f"normfuse verify {shlex.quote(request.model)} {shlex.quote(str(target))}", out)
