"""``normfuse swap``: norms into norms that fold, or run in integers, fitted to data; a file that loads again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli import arguments, calibrated, calibration_data, results, source
from normfuse.cli.arguments import Check, Request
from normfuse.cli.command import Command
from normfuse.cli.output import Output
from normfuse.errors import LoadError, RequirementError

if TYPE_CHECKING:
    from torch import nn

    from normfuse.norm_swap import NormSwap
    from normfuse.outputs import Inputs
    from normfuse.pipeline import Result

calibration_options = arguments.options(
    click.option("--to", type=click.Choice(["unified", "l1"]), required=True, help="The norm to swap to."),
    calibrated.calib_option,
    calibrated.batch_options,
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
    calibrated.globs("norms"),
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
    target = calibrated.destination(output, request, "swapped", out)
    if source.is_onnx(request.model):
        raise LoadError(f"{request.model}: the norms of an ONNX file cannot be fitted; swap them in the torch model")
    loaded = source.load(request)
    batches = calibration_data.read(calib, loaded.model, batch_size=batch_size, limit=max_samples)
    calibrated.describe(loaded, batches, calib, request, out)
    swapped = _swap(loaded.model, batches, to, request.seed, out, options).model
    calibrated.compare(loaded.model, swapped, batches, check, "swapped", out)
    calibrated.write(swapped, loaded, batches[0], target, request, "swapped", out)
    results.show_next(f"normfuse fold {shlex.quote(str(target))}", out)
    out.finish()


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
    calibrated.show_left(list(report.norms), out)


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
