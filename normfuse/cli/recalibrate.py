"""``normfuse recalibrate``: the statistics of BatchNorm and UnifiedNorm from data; a model file that loads again."""

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

    from normfuse.outputs import Inputs
    from normfuse.passes.recalibrate import Recalibrate
    from normfuse.pipeline import Result

METHODS = ("pooled", "alpha", "adabn")  # normfuse.passes.recalibrate has them; it imports torch

data_options = arguments.options(
    click.option(
        "--method",
        type=click.Choice(METHODS),
        default="pooled",
        show_default=True,
        help="pooled: of all data; alpha: mixed with the stored ones; adabn: layer by layer.",
    ),
    click.option("--weight", type=click.FloatRange(0, 1), help="Of the data in the mixture; 1, or 0.1 for alpha."),
    click.option("--order", type=click.Choice(["parallel", "sequential"]), help="All norms at once, or one by one."),
    calibrated.calib_option,
    calibrated.batch_options,
)


@click.command("recalibrate", cls=Command)
@arguments.model_argument
@data_options
@calibrated.globs("norms")
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
    calib: Path,
    batch_size: int,
    max_samples: int,
    **options: Any,
) -> None:
    """Set the stored statistics of the norms of MODEL to those of data, and write a model file that loads again.

    The result is not the same function. It must come before folding, which puts the statistics into weights. Writes
    MODEL.recalibrated.pt unless -o is given; normfuse fold takes it.
    """
    target = calibrated.destination(output, request, "recalibrated", out)
    if source.is_onnx(request.model):
        raise LoadError(f"{request.model}: the norms of an ONNX file stay; recalibrate the torch model")
    loaded = source.load(request)
    batches = calibration_data.read(calib, loaded.model, batch_size=batch_size, limit=max_samples)
    calibrated.describe(loaded, batches, calib, request, out)
    changed = _recalibrate(loaded.model, batches, options, out).model
    calibrated.compare(loaded.model, changed, batches, check, "recalibrated", out)
    calibrated.write(changed, loaded, batches[0], target, request, "recalibrated", out)
    results.show_next(f"normfuse fold {shlex.quote(str(target))}", out)
    out.finish()


def _recalibrate(model: nn.Module, batches: list[Inputs], options: dict[str, Any], out: Output) -> Result[Any]:
    from normfuse.recalibrating import recalibrating_pass, run_recalibrate

    chosen = {key: options[key] for key in ("method", "weight", "order")}
    one = recalibrating_pass(batches, **chosen, progress=not out.quiet)
    result = run_recalibrate(model, one, include=options["include"], exclude=options["exclude"])
    _show(result, one, out)
    if not result.report:
        out.finish()
        raise RequirementError("no norm stores statistics of data, of those chosen; nothing was written")
    return result


def _show(result: Result[Any], one: Recalibrate, out: Output) -> None:
    report = result.report
    out.document["pairs"] = [{**o.to_dict(), "moved": one.moved.get(o.subject)} for o in report.outcomes]
    out.document["summary"] = report.summary()
    done = [o for o in report.norms if o.status.name == "APPLIED"]
    out.field("set", f"{len(done)} of {len(report.norms)} norms  weight {one.weight:g}  {one.order}")
    moved = {o.subject: one.moved[o.subject] for o in done}
    if moved:
        most = max(moved, key=lambda name: moved[name])
        mean = sum(moved.values()) / len(moved)
        out.field("moved", f"means of the data are {mean:.2g} deviations away, at most {moved[most]:.2g} ({most})")
    calibrated.show_left(list(report.norms), out)
