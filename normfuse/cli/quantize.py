"""``normfuse quantize``: Conv and Linear layers into integers, calibrated on data or made to be trained."""

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
    from normfuse.pipeline import Result

WORST = 5
"""How many layers are printed, those with the largest errors, unless all are asked for."""

scheme_options = arguments.options(
    click.option(
        "--method",
        type=click.Choice(["shiftquant", "per-channel", "per-tensor"]),
        default="shiftquant",
        show_default=True,
        help="Which scales inputs and weights have.",
    ),
    click.option("--bits", type=click.IntRange(3, 8), default=8, show_default=True, help="Of inputs and weights."),
    click.option(
        "--groups", type=click.IntRange(1, 32), default=4, show_default=True, help="Scales of an input, at most."
    ),
    click.option(
        "--percentile",
        type=click.FloatRange(0, 100, min_open=True),
        help="Clip inputs beyond it; the maximum if unset.",
    ),
    click.option("--keep-first", is_flag=True, help="Leave the first layer in floating point."),
    click.option("--keep-last", is_flag=True, help="Leave the last layer in floating point."),
)
data_options = arguments.options(
    click.option("--calib", type=arguments.DATA, help="Data: .npz, .npy, .pt, or a folder of images."),
    calibrated.batch_options,
    click.option("--no-fold", is_flag=True, help="Do not fold the norms first."),
    click.option("--for-training", is_flag=True, help="Layers that quantize afresh at each step; takes no data."),
    click.option(
        "--grad-bits", type=click.IntRange(3, 8), help="Of gradients, with --for-training; as --bits if unset."
    ),
)
selection_options = arguments.options(
    calibrated.globs("layers"),
    click.option("--require-all", is_flag=True, help="Exit with 3 if a layer is left that was not excluded."),
)


@click.command("quantize", cls=Command)
@arguments.model_argument
@scheme_options
@data_options
@selection_options
@arguments.output_option
@arguments.loading_options
@arguments.input_options
@arguments.verify_option
@arguments.tolerance_options
@arguments.output_options
def command(
    out: Output,
    request: Request,
    check: Check,
    output: Path | None,
    calib: Path | None,
    batch_size: int,
    max_samples: int,
    for_training: bool,
    **options: Any,
) -> None:
    """Put the products of the Conv1d, Conv2d and Linear layers of MODEL into integers; writes a file that loads again.

    With --calib the norms are folded and the layers get fixed integers and scales that are found on the data; normfuse
    export writes such a file as ONNX. With --for-training they quantize afresh at each step. Writes MODEL.quantized.pt
    unless -o is given.
    """
    target = calibrated.destination(output, request, "quantized", out)
    _require_one_mode(calib, for_training, options)
    if source.is_onnx(request.model):
        raise LoadError(f"{request.model}: quantize the torch model; normfuse export then writes it as ONNX")
    loaded = source.load(request)
    if calib is None:
        example = source.example_for(loaded, request, out).inputs
        result, data = _run(loaded.model, None, example, out, check, options), [example]
    else:
        data = calibration_data.read(calib, loaded.model, batch_size=batch_size, limit=max_samples)
        example = calibrated.describe(loaded, data, calib, request, out)
        result = _run(loaded.model, data, example, out, check, options)
    calibrated.compare(loaded.model, result.model, data, check, "quantized", out)
    calibrated.write(result.model, loaded, data[0], target, request, "quantized", out)
    file = str(target)
    load = f"python: normfuse.load({file!r}).train()"
    results.show_next(load if for_training else f"normfuse export {shlex.quote(file)}", out)
    out.finish()


def _require_one_mode(calib: Path | None, for_training: bool, options: dict[str, Any]) -> None:
    if (calib is None) is not for_training:
        raise click.UsageError("give --calib DATA to quantize a trained model, or --for-training to train on integers")
    if for_training and options["method"] == "per-channel":
        raise click.UsageError(
            "--method per-channel is for trained models; to train there are shiftquant and per-tensor"
        )
    if not for_training and options["grad_bits"] is not None:
        raise click.UsageError("--grad-bits is for --for-training: a calibrated model takes no gradient")


def _run(
    model: nn.Module, data: list[Inputs] | None, example: Inputs, out: Output, check: Check, options: dict[str, Any]
) -> Result[Any]:
    from normfuse.quantizing import quantizing_pass, run_quantize

    settings = {name: options[name] for name in ("bits", "groups", "grad_bits", "keep_first", "keep_last")}
    kind = "max" if options["percentile"] is None else options["percentile"]
    one = quantizing_pass(options["method"], data, range=kind, progress=not out.quiet, **settings)
    chosen = {"include": options["include"], "exclude": options["exclude"], "verify": not check.no_verify}
    result = run_quantize(model, one, fold=not options["no_fold"], example_inputs=example, **chosen)
    _show(result, getattr(one, "layers", {}), out)
    _require(result, out, options)
    return result


def _show(result: Result[Any], layers: dict[str, Any], out: Output) -> None:
    outcomes = [o for o in result.report.outcomes if not o.norm]
    details = {name: {"error": o.error, "range_ratio": o.range_ratio, "groups": o.groups} for name, o in layers.items()}
    out.document["pairs"] = [{**o.to_dict(), **details.get(o.subject, {})} for o in outcomes]
    out.document["summary"] = result.report.summary()
    done = [o for o in outcomes if o.status.name == "APPLIED"]
    out.document["quantized"] = len(done)
    out.field("quantized", f"{len(done)} of {len(outcomes)} layers")
    worst = sorted(layers.values(), key=lambda layer: -layer.error)
    shown = worst if out.verbose else worst[:WORST]
    if shown:
        out.field(
            "errors", "on the calibration data, largest first" if len(shown) == len(worst) else f"largest {WORST}"
        )
        out.rows([("    layer", "error", "range ratio", "groups"), *(_row(layer) for layer in shown)])
    calibrated.show_left(outcomes, out)


def _row(layer: Any) -> tuple[str, ...]:
    return f"    {layer.name}", f"{layer.error:.2%}", f"{layer.range_ratio:.3g}", str(layer.groups)


def _require(result: Result[Any], out: Output, options: dict[str, Any]) -> None:
    refused = [o for o in result.report.outcomes if not o.norm and o.refusal and o.refusal.reason.name != "EXCLUDED"]
    if options["require_all"] and refused:
        out.finish()
        names = ", ".join(o.subject for o in refused[:3])
        raise RequirementError(f"--require-all: {len(refused)} layers are left ({names})")
