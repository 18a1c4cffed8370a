"""``normfuse verify``: does B compute what A computes?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from normfuse.cli import arguments, onnx_files, results, source
from normfuse.cli.arguments import Check, Request
from normfuse.cli.command import Command
from normfuse.cli.output import Output
from normfuse.errors import VerificationError

if TYPE_CHECKING:
    from normfuse.comparison import Comparison


@click.command("verify", cls=Command)
@click.argument("model", metavar="A")
@click.argument("candidate", metavar="B")
@click.option("--inputs", "--input", "input_file", type=arguments.FILE, help="Inputs as .npz or .npy.")
@arguments.shape_option
@arguments.count_option
@arguments.tolerance_options
@click.option("--cosine", type=click.FloatRange(-1, 1), help="Require this cosine similarity.")
@arguments.loading_options
@arguments.output_options
def command(out: Output, request: Request, check: Check, candidate: str, cosine: float | None) -> None:
    """Compare B with its source A: on the same inputs, against a float64 run of A.

    A and B are model files or architectures; B may be an ONNX file or an engine. Without --rtol and --atol, B passes if
    rounding explains its error.
    """
    if source.is_onnx(request.model):
        if not source.is_onnx(candidate):
            raise click.UsageError(f"A is an ONNX file, so B must be one too: {candidate}")
        out.document["environment"] = source.environment()
        out.document["model"] = source.file_entry(Path(request.model))
        comparison = onnx_files.check(request, Path(candidate), check, out)
    else:
        comparison = _against_model(request, check, candidate, out)
    out.document["candidate"] = source.file_entry(Path(candidate) if source.is_file(candidate) else None)
    results.show_comparison(comparison, out)
    required = comparison.required
    out.field("required", f"atol {required.atol:.1e} at rtol {required.rtol:g}")
    out.finish()
    if not comparison:
        place = f", first at {comparison.diverges_at}" if comparison.diverges_at else ""
        raise VerificationError(f"{candidate} differs from {request.model}: {comparison.failure}{place}", comparison)
    if cosine is not None and comparison.cosine < cosine:
        raise VerificationError(f"the cosine similarity is {comparison.cosine:.6f}, {cosine} was asked for", comparison)


def _against_model(request: Request, check: Check, candidate: str, out: Output) -> Comparison:
    """Compare with a torch model, whose float64 run judges."""
    written = source.is_engine(candidate) or source.is_onnx(candidate)
    loaded = source.load(request)
    example = source.example_for(loaded, request, out)
    other = dataclasses.replace(request, model=candidate)
    subject = Path(candidate) if written else source.load(other).model
    from normfuse.rerun import sample_inputs
    from normfuse.verify import verify

    with out.step("verifying"):
        samples = sample_inputs(example.inputs, check.num_inputs, request.seed)
        return verify(loaded.model, subject, samples, tolerance=results.tolerance_of(check))
