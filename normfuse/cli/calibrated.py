"""What the commands share that fit a model to data and write another one: swap, recalibrate, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli import arguments, inputs, results, source
from normfuse.cli.arguments import Check, Request
from normfuse.cli.fold import default_path, remember_inputs
from normfuse.cli.output import Output
from normfuse.errors import LoadError

if TYPE_CHECKING:
    from torch import nn

    from normfuse.graph import Inputs
    from normfuse.report import Outcome

SAMPLES = click.IntRange(min=1)
calib_option = click.option(
    "--calib", type=arguments.DATA, required=True, help="Data: .npz, .npy, .pt, or a folder of images."
)
batch_options = arguments.options(
    click.option("--batch-size", type=SAMPLES, default=32, show_default=True, help="Samples in a batch."),
    click.option("--max-samples", type=SAMPLES, default=512, show_default=True, help="Samples to take from the data."),
)


def globs(what: str) -> Any:
    """Return ``--include`` and ``--exclude`` of what a command works on."""
    return arguments.options(
        click.option("--include", multiple=True, metavar="GLOB", help=f"Only {what} with such names."),
        click.option("--exclude", multiple=True, metavar="GLOB", help=f"No {what} with such names."),
    )


def destination(output: Path | None, request: Request, word: str, out: Output) -> Path:
    """Return where the model is to be written: ``MODEL.word.pt`` if nowhere else.

    Raises:
        click.UsageError: As for :func:`.results.destination`.
    """
    extensions = (".pt", ".pth", ".safetensors")
    return results.destination(output, default_path(request, f".{word}.pt"), out, extensions=extensions)


def describe(loaded: source.Source, batches: list[Inputs], calib: Path, request: Request, out: Output) -> Inputs:
    """Show the model and return the first batch, on its device.

    Raises:
        LoadError: The model does not run on the data.
    """
    from normfuse import outputs

    example = inputs.Example(inputs.placed(batches[0], loaded.model, request.device), "--calib")
    shapes = outputs.describe(loaded.model, example.inputs)
    problem = inputs.failure(loaded.model, example.inputs)
    if problem:
        raise LoadError(f"{calib}: the model does not run on {shapes}: {problem}")
    out.document["environment"] = source.environment(request.device)
    out.document["model"] = loaded.describe(example)
    out.field("model", f"{loaded.name}  input {shapes}")
    for text in loaded.notes:
        out.note(text)
    return example.inputs


def show_left(outcomes: list[Outcome], out: Output) -> None:
    """List what was not changed, with the reasons."""
    left = [outcome.line() for outcome in outcomes if outcome.status.name != "APPLIED"]
    if left:
        out.rows([(f"    {status}", what, why) for status, what, why in left])


def compare(model: nn.Module, changed: nn.Module, batches: list[Inputs], check: Check, word: str, out: Output) -> None:
    """Show how far the changed model is from its source; a failure only where a tolerance was given.

    Raises:
        VerificationError: It leaves the tolerance.
    """
    if check.no_verify:
        return
    from normfuse.verify import verify

    placed = inputs.placed(batches[-1], model, str(next(model.parameters()).device))
    with out.step("comparing"):
        comparison = verify(model, changed, placed, tolerance=results.tolerance_of(check))
    results.show_change(comparison, check, f"the {word} model", out)


def write(
    model: nn.Module, loaded: source.Source, batch: Inputs, target: Path, request: Request, word: str, out: Output
) -> None:
    """Write a model file that remembers what the model was run on."""
    from normfuse import outputs, serialize

    remember_inputs(model, outputs.specification(loaded.model, batch))
    with out.step("writing"):
        kwargs = dict(request.arch_kwargs) if loaded.arch else None
        serialize.save(model.cpu(), target, arch=loaded.arch, arch_kwargs=kwargs)
    results.show_file(target, out, format=word)
