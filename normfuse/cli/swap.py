"""``normfuse swap``: norms into norms that fold, or run in integers, fitted to data; a file that loads again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli import arguments, calibration_data, inputs, results, source
from normfuse.cli.arguments import Check, Request
from normfuse.cli.command import Command
from normfuse.cli.fold import default_path, remember_inputs
from normfuse.cli.output import Output
from normfuse.errors import LoadError, RequirementError

if TYPE_CHECKING:
    from torch import nn

    from normfuse.norm_swap import NormSwap
    from normfuse.outputs import Inputs
    from normfuse.pipeline import Result

DATA = click.Path(exists=True, path_type=Path)
SAMPLES = click.IntRange(min=1)

calibration_options = arguments.options(
    click.option("--to", type=click.Choice(["unified", "l1"]), required=True, help="The norm to swap to."),
    click.option("--calib", type=DATA, required=True, help="Data: .npz, .npy, .pt, or a folder of images."),
    click.option("--batch-size", type=SAMPLES, default=32, show_default=True, help="Samples in a batch."),
    click.option("--max-samples", type=SAMPLES, default=512, show_default=True, help="Samples to take from the data."),
    click.option(
        "--order",
        type=click.Choice(["parallel", "sequential"]),
        help="Fit all norms at once, or, as l1 does by default, each behind those before it.",
    ),
)
reconstruction_options = arguments.options(
    click.option("--reconstruct-steps", type=click.IntRange(min=0), default=0, help="Steps to fit each block."),
    click.option("--end-to-end-steps", type=click.IntRange(min=0), help="Steps to fit the outputs; as many, if unset."),
    click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=3e-4, help="Learning rate of the fit."),
    click.option("--checkpoint", type=arguments.FILE, help="Where to keep the fit, to go on after an interruption."),
)
selection_options = arguments.options(
    click.option("--include", multiple=True, metavar="GLOB", help="Only norms with such names."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No norms with such names."),
    click.option("--require-swap", is_flag=True, help="Exit with 3 if a norm that runs is left."),
)


@click.command("swap", cls=Command)
@arguments.model_argument
@calibration_options
@reconstruction_options
@selection_options
@arguments.output_option
@arguments.loading_options
@arguments.verify_option
@arguments.tolerance_options
@arguments.output_options
def command(
    out: Output,
    request: Request,
    check: Check,
    output: Path | None,
    to: str,
    calib: Path,
    batch_size: int,
    max_samples: int,
    **options: Any,
) -> None:
    """Swap the norms of MODEL for norms of another kind, and write a model file that loads again.

    unified: LayerNorm and RMSNorm become norms that fold. l1: they, and BatchNorm, become norms without squares and
    roots, which run in integers. The result is not the same function: it is fitted to the data, and should be
    fine-tuned. Writes MODEL.swapped.pt unless -o is given; normfuse fold takes it.
    """
    target = results.destination(
        output, default_path(request, ".swapped.pt"), force=out.force, extensions=(".pt", ".pth", ".safetensors")
    )
    if source.is_onnx(request.model):
        raise LoadError(f"{request.model}: the norms of an ONNX file cannot be fitted; swap them in the torch model")
    loaded = source.load(request)
    batches = calibration_data.read(calib, loaded.model, batch_size=batch_size, limit=max_samples)
    _describe(loaded, batches, calib, request, out)
    swapped = _swap(loaded.model, batches, to, request.seed, out, options)
    if not check.no_verify:
        _compare(loaded.model, swapped.model, batches, check, out)
    remember_inputs(swapped.model, inputs.specification(loaded.model, batches[0]))
    _write(swapped.model, loaded, target, request, out)
    out.finish()


def _describe(loaded: source.Source, batches: list[Inputs], calib: Path, request: Request, out: Output) -> None:
    example = inputs.Example(inputs.placed(batches[0], loaded.model, request.device), "--calib")
    problem = inputs.failure(loaded.model, example.inputs)
    if problem:
        shapes = inputs.describe(loaded.model, example.inputs)
        raise LoadError(f"{calib}: the model does not run on {shapes}: {problem}")
    out.document["environment"] = source.environment(request.device)
    out.document["model"] = loaded.describe(example)
    out.field("model", f"{loaded.name}  input {inputs.describe(loaded.model, example.inputs)}")
    for text in loaded.notes:
        out.note(text)


def _swap(
    model: nn.Module, batches: list[Inputs], to: str, seed: int, out: Output, options: dict[str, Any]
) -> Result[Any]:
    from normfuse.swapping import run_swap, swap_pass

    one = swap_pass(to, batches, order=options["order"], progress=not out.quiet)
    chosen = {"include": options["include"], "exclude": options["exclude"]}
    result = run_swap(model, one, inplace=False, seed=seed, **chosen)
    _show(result, one, out)
    left = [o.subject for o in result.report.norms if o.status.name in ("REFUSED", "UNMATCHED")]
    if options["require_swap"] and left:
        out.finish()
        raise RequirementError(f"--require-swap: {len(left)} norms are left ({', '.join(left[:3])})")
    if options["reconstruct_steps"] or options["end_to_end_steps"]:
        _reconstruct(model, result, batches, seed, out, options)
    return result


def _show(result: Result[Any], one: NormSwap, out: Output) -> None:
    report = result.report
    out.document["pairs"] = [
        {**outcome.to_dict(), "unexplained": one.unexplained.get(outcome.subject)} for outcome in report.outcomes
    ]
    swapped = [o for o in report.norms if o.status.name == "APPLIED"]
    out.document["swapped"] = len(swapped)
    out.field("swapped", f"{len(swapped)} of {len(report.norms)} norms")
    if one.unexplained:
        mean = sum(one.unexplained.values()) / len(one.unexplained)
        out.field("fit", f"{one.family} leaves {mean:.1%} of the variance of a norm's output, {_worst(one)}")
    left = [o for o in report.norms if o.status.name != "APPLIED"]
    if left:
        out.rows([(f"    {status}", what, why) for status, what, why in (o.line() for o in left)])


def _worst(one: NormSwap) -> str:
    name = max(one.unexplained, key=lambda key: one.unexplained[key])
    return f"at most {one.unexplained[name]:.1%} ({name})"


def _reconstruct(
    model: nn.Module, result: Result[Any], batches: list[Inputs], seed: int, out: Output, options: dict[str, Any]
) -> None:
    from normfuse.reconstruction import reconstruct

    try:
        reconstruct(
            model,
            result.model,
            batches,
            steps=options["reconstruct_steps"],
            end_to_end=options["end_to_end_steps"],
            lr=options["lr"],
            seed=seed,
            checkpoint=options["checkpoint"],
            progress=not out.quiet,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    out.document["reconstruction"] = {"steps": options["reconstruct_steps"], "lr": options["lr"]}


def _compare(model: nn.Module, swapped: nn.Module, batches: list[Inputs], check: Check, out: Output) -> None:
    """Show how far the swapped model is from its source; a failure only where a tolerance was given."""
    from normfuse.verify import verify

    tolerance = results.tolerance_of(check)
    with out.step("comparing"):
        comparison = verify(model, swapped, inputs.placed(batches[-1], model, _device(model)), tolerance=tolerance)
    out.document["verify"] = comparison.to_dict()
    top1 = f"  top-1 {comparison.top1[0]}/{comparison.top1[1]}" if comparison.top1 else ""
    figures = f"max rel {comparison.max_rel:.2g}  cosine {comparison.cosine:.4f}{top1}"
    out.field("agreement", f"{figures}  (not the same function; on calibration data)")
    if tolerance is not None:
        results.require_passed(comparison, "the swapped model leaves the tolerance", out)


def _device(model: nn.Module) -> str:
    return str(next(model.parameters()).device)


def _write(model: nn.Module, loaded: source.Source, target: Path, request: Request, out: Output) -> None:
    from normfuse import serialize

    with out.step("writing"):
        kwargs = dict(request.arch_kwargs) if loaded.arch else None
        serialize.save(model.cpu(), target, arch=loaded.arch, arch_kwargs=kwargs)
    results.show_file(target, out, format="swapped")
    results.show_next(f"normfuse fold {shlex.quote(str(target))}", out)
