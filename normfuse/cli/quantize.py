"""``normfuse quantize``: Conv and Linear layers into integers, calibrated on data or made to be trained."""

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

    from normfuse.outputs import Inputs
    from normfuse.pipeline import Result

DATA = click.Path(exists=True, path_type=Path)
SAMPLES = click.IntRange(min=1)
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
    click.option("--calib", type=DATA, help="Data: .npz, .npy, .pt, or a folder of images."),
    click.option("--batch-size", type=SAMPLES, default=32, show_default=True, help="Samples in a batch."),
    click.option("--max-samples", type=SAMPLES, default=512, show_default=True, help="Samples to take from the data."),
    click.option("--no-fold", is_flag=True, help="Do not fold the norms first."),
    click.option("--for-training", is_flag=True, help="Layers that quantize afresh at each step; takes no data."),
    click.option(
        "--grad-bits", type=click.IntRange(3, 8), help="Of gradients, with --for-training; as --bits if unset."
    ),
)
selection_options = arguments.options(
    click.option("--include", multiple=True, metavar="GLOB", help="Only layers with such names."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No layers with such names."),
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
    target = results.destination(
        output, default_path(request, ".quantized.pt"), force=out.force, extensions=(".pt", ".pth", ".safetensors")
    )
    _require_one_mode(calib, for_training, options)
    if source.is_onnx(request.model):
        raise LoadError(f"{request.model}: quantize the torch model; normfuse export then writes it as ONNX")
    loaded = source.load(request)
    if calib is None:
        example = source.example_for(loaded, request, out)
        result, data = _run(loaded.model, None, example.inputs, out, options), [example.inputs]
    else:
        data = calibration_data.read(calib, loaded.model, batch_size=batch_size, limit=max_samples)
        example = inputs.Example(inputs.placed(data[0], loaded.model, request.device), "--calib")
        _describe(loaded, example, calib, request, out)
        result = _run(loaded.model, data, example.inputs, out, options)
    if not check.no_verify:
        _compare(loaded.model, result.model, data, check, out)
    remember_inputs(result.model, inputs.specification(loaded.model, data[0]))
    _write(result.model, loaded, target, request, out, trains=for_training)
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


def _describe(loaded: source.Source, example: inputs.Example, calib: Path, request: Request, out: Output) -> None:
    shapes = inputs.describe(loaded.model, example.inputs)
    problem = inputs.failure(loaded.model, example.inputs)
    if problem:
        raise LoadError(f"{calib}: the model does not run on {shapes}: {problem}")
    out.document["environment"] = source.environment(request.device)
    out.document["model"] = loaded.describe(example)
    out.field("model", f"{loaded.name}  input {shapes}")
    for text in loaded.notes:
        out.note(text)


def _run(
    model: nn.Module, data: list[Inputs] | None, example: Inputs, out: Output, options: dict[str, Any]
) -> Result[Any]:
    from normfuse.quantizing import quantizing_pass, run_quantize

    settings = {name: options[name] for name in ("bits", "groups", "grad_bits", "keep_first", "keep_last")}
    kind = "max" if options["percentile"] is None else options["percentile"]
    one = quantizing_pass(options["method"], data, range=kind, progress=not out.quiet, **settings)
    chosen = {"include": options["include"], "exclude": options["exclude"]}
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
    left = [o for o in outcomes if o.status.name != "APPLIED"]
    if left:
        out.rows([(f"    {status}", what, why) for status, what, why in (o.line() for o in left)])


def _row(layer: Any) -> tuple[str, ...]:
    return f"    {layer.name}", f"{layer.error:.2%}", f"{layer.range_ratio:.3g}", str(layer.groups)


def _require(result: Result[Any], out: Output, options: dict[str, Any]) -> None:
    refused = [o for o in result.report.outcomes if not o.norm and o.refusal and o.refusal.reason.name != "EXCLUDED"]
    if options["require_all"] and refused:
        out.finish()
        names = ", ".join(o.subject for o in refused[:3])
        raise RequirementError(f"--require-all: {len(refused)} layers are left ({names})")


def _compare(model: nn.Module, quantized: nn.Module, data: list[Inputs], check: Check, out: Output) -> None:
    """Show how far the quantized model is from its source; a failure only where a tolerance was given."""
    from normfuse.verify import verify

    tolerance = results.tolerance_of(check)
    device = str(next(model.parameters()).device)
    with out.step("comparing"):
        comparison = verify(model, quantized, inputs.placed(data[-1], model, device), tolerance=tolerance)
    out.document["verify"] = comparison.to_dict()
    top1 = f"  top-1 {comparison.top1[0]}/{comparison.top1[1]}" if comparison.top1 else ""
    out.field(
        "agreement", f"max rel {comparison.max_rel:.2g}  cosine {comparison.cosine:.4f}{top1}  (not the same function)"
    )
    if tolerance is not None:
        results.require_passed(comparison, "the quantized model leaves the tolerance", out)


def _write(
    model: nn.Module, loaded: source.Source, target: Path, request: Request, out: Output, *, trains: bool
) -> None:
    from normfuse import serialize

    with out.step("writing"):
        kwargs = dict(request.arch_kwargs) if loaded.arch else None
        serialize.save(model.cpu(), target, arch=loaded.arch, arch_kwargs=kwargs)
    results.show_file(target, out, format="quantized")
    file = shlex.quote(str(target))
    results.show_next(f"python: normfuse.load({str(target)!r}).train()" if trains else f"normfuse export {file}", out)
