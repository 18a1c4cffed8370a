"""``normfuse bench``: latency of a model, unfolded and folded, on the backends of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli import arguments, onnx_files, results, source
from normfuse.cli.arguments import Request
from normfuse.cli.command import Command
from normfuse.cli.output import Output
from normfuse.errors import LoadError

if TYPE_CHECKING:
    from normfuse.latency import Benchmark

BACKENDS = ("eager", "compile", "cudagraph", "onnxruntime", "tensorrt")
VARIANTS = ("unfolded", "folded", "exact")


class ListType(click.ParamType):
    """Words separated by commas, each one of those that are known, or whole numbers above zero."""

    def __init__(self, known: tuple[str, ...] = ()) -> None:
        self.known = known
        self.name = "LIST" if known else "N[,N]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Return the words, or the numbers; a usage error names the first that is wrong."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",") if word.strip()]
        for word in words:
            if self.known and word not in self.known:
                self.fail(f"{word!r} is none of {', '.join(self.known)}", param, ctx)
            if not self.known and not (word.isdecimal() and int(word)):
                self.fail(f"{word!r} is not a size; write 1,8", param, ctx)
        return tuple(words) if self.known else tuple(int(word) for word in words)


@click.command("bench", cls=Command)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--backend", "on", type=ListType(BACKENDS), help=f"Of {', '.join(BACKENDS)}; all that are here.")
@click.option("--variant", "variants", type=ListType(VARIANTS), default=VARIANTS, help="Of unfolded, folded, exact.")
@click.option("--batch", "batches", type=ListType(), default=(), help="Batch sizes; that of the example input.")
@click.option("--warmup", type=click.IntRange(min=0), default=10, show_default=True, help="Rounds before measuring.")
@click.option(
    "--min-time",
    "seconds",
    type=click.FloatRange(min=0.01),
    default=2.0,
    show_default=True,
    help="Seconds for each variant.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch and ONNX Runtime; torch's own number.")
@click.option("--plot", "plot_file", type=arguments.FILE, help="Draw the ratios as .png, .svg or .pdf.")
@arguments.loading_options
@arguments.input_options
@arguments.output_options
def command(
    out: Output,
    request: Request,
    models: tuple[str, ...],
    threads: int | None,
    plot_file: Path | None,
    **options: Any,
) -> None:
    """Time each MODEL as it is, folded, and with every exact pass, in one run with a control.

    Every variant is first checked against a float64 run. A difference that the unfolded model also shows against itself
    is called noise. Runtimes fold a BatchNorm behind a convolution by themselves: expect no gain from folding there.
    """
    if plot_file is not None:
        results.destination(plot_file, plot_file, out, extensions=(".png", ".svg", ".pdf"))
    import torch

    from normfuse.latency.results import unite

    if threads is not None:
        torch.set_num_threads(threads)
    benchmark = unite([_measure(dataclasses.replace(request, model=model), out, options) for model in models])
    out.document["bench"] = [row.to_dict() for row in benchmark.rows]
    out.document["environment"] |= {"threads": torch.get_num_threads()}
    if plot_file is not None:
        from normfuse.latency.plot import plot

        plot(benchmark, plot_file)
        results.show_file(plot_file, out, format="figure")
    out.finish()


def _measure(request: Request, out: Output, options: dict[str, Any]) -> Benchmark:
    if source.is_onnx(request.model):
        return _measure_file(request, out, options)
    loaded = source.load(request)
    example = source.example_for(loaded, request, out)
    from normfuse import latency

    def track(groups: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
        for backend, batch in groups:
            with out.step(f"{loaded.name}: {backend}, batch {batch}"):
                yield backend, batch

    with _usage():
        benchmark = latency.measure(loaded.model, example.inputs, name=loaded.name, track=track, **options)
    return _shown(benchmark, out)


def _measure_file(request: Request, out: Output, options: dict[str, Any]) -> Benchmark:
    if options["on"] not in (None, ("onnxruntime",)):
        raise click.UsageError(f"{request.model}: an ONNX file runs on onnxruntime, not on {', '.join(options['on'])}")
    onnx_files.describe(request, out)
    inputs = onnx_files.samples(request, 1, out)[0]
    from normfuse import latency

    chosen = {key: options[key] for key in ("batches", "seconds", "warmup")}
    with out.step(f"{request.model}: onnxruntime"):
        return _shown(latency.measure_file(request.model, inputs, **chosen), out)


def _shown(benchmark: Benchmark, out: Output) -> Benchmark:
    out.rows(benchmark.table())
    for note in benchmark.notes:
        out.note(note)
    out.field("folding", benchmark.conclusion())
    return benchmark


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """Show as a refusal of the input what the library calls a wrong value."""
    try:
        yield
    except ValueError as error:
        raise LoadError(str(error)) from error
