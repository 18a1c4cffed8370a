"""Options that commands share, and their types."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class NamedShape(NamedTuple):
    """The shape of one input; the name is None where the model has one input."""

    name: str | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """The model that was asked for and what to run it on; the fields are the options of the same names."""

    model: str = ""
    arch: str | None = None
    arch_kwargs: tuple[tuple[str, Any], ...] = ()
    weights: Path | None = None
    allow_globals: tuple[str, ...] = ()
    trust_pickle: bool = False
    device: str = "cpu"
    seed: int = 0
    input_file: Path | None = None
    input_shapes: tuple[NamedShape, ...] = ()


@dataclass(frozen=True)
class Check:
    """How to compare a result with its source; the fields are the options of the same names."""

    no_verify: bool = False
    num_inputs: int = 8
    rtol: float | None = None
    atol: float | None = None


class ShapeType(click.ParamType):
    """``name:1x3x224x224`` or ``1,3,224,224``: both ways of writing a shape, with or without a name."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> NamedShape:
        """Return the shape; a usage error names what cannot be read."""
        if isinstance(value, NamedShape):
            return value
        name, _, sizes = value.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.replace("x", ",").split(","))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            self.fail(f"{value!r} is not a shape; write name:1x3x224x224 or 1,3,224,224", param, ctx)
        return NamedShape(name or None, shape)


class KeyValueType(click.ParamType):
    """``key=value``, the value a Python literal where it is one and text where not."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Return the pair; a usage error where there is no ``=``."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not (equals and key.isidentifier()):
            self.fail(f"{value!r} is not key=value", param, ctx)
        try:
            return key, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return key, text


class AxisType(click.ParamType):
    """``name:axis``, ``name:axis=label`` or ``axis``: an axis whose size may vary."""

    name = "name:axis"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text, which the lowering takes as it is."""
        axis, equals, label = value.rpartition(":")[2].partition("=")
        if not axis.isdecimal() or (equals and not label.isidentifier()):
            self.fail(f"{value!r} is not an axis; write name:0 or name:0=label, or 0 for a single input", param, ctx)
        return value


class TargetsType(click.ParamType):
    """``sm_86,sm_89``: the GPUs that an engine is for."""

    name = "sm_NN[,sm_NN]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the targets, each once; a usage error names what is none."""
        if isinstance(value, tuple):
            return value
        found = tuple(dict.fromkeys(part.strip().lower() for part in value.split(",")))
        wrong = [part for part in found if not (part.startswith("sm_") and part[3:].isdecimal())]
        if wrong:
            self.fail(f"{wrong[0]!r} is not a target; write sm_86,sm_89", param, ctx)
        return found


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Return one decorator for several, in the order in which ``--help`` shows them."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


FILE = click.Path(dir_okay=False, path_type=Path)

model_argument = click.argument("model")

loading_options = options(
    click.option("--arch", metavar="SPEC", help="timm:NAME, torchvision:NAME or package.module:factory."),
    click.option("--arch-kwargs", "arch_kwargs", type=KeyValueType(), multiple=True, help="Argument for --arch."),
    click.option("--weights", type=FILE, help="Checkpoint to load into an architecture given as MODEL."),
    click.option("--allow-global", "allow_globals", multiple=True, metavar="NAME", help="Class the file may use."),
    click.option("--trust-pickle", is_flag=True, help="Load any pickle: runs code from it, so trust its source."),
    click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]", help="Where to run."),
    click.option("--seed", default=0, show_default=True, help="Seed of random weights and inputs."),
)

shape_option = click.option(
    "--input-shape",
    "input_shapes",
    type=ShapeType(),
    multiple=True,
    help="name:1x3x224x224 or 1,3,224,224; random values are made.",
)
input_options = options(
    click.option("--input", "input_file", type=FILE, help="Example input as .npz or .npy."),
    shape_option,
)

folding_options = options(
    click.option("--include", multiple=True, metavar="GLOB", help="Only norms with such names."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No norms with such names."),
    click.option("--duplicate-shared", is_flag=True, help="Give each use of a shared layer its own copy."),
    click.option("--require-fold", is_flag=True, help="Exit with 3 if a norm that runs is left."),
)

verify_option = click.option("--no-verify", is_flag=True, help="Do not compare the result with the source.")
count_option = click.option(
    "--num-inputs", type=click.IntRange(min=1), default=8, show_default=True, help="How many inputs to compare on."
)
tolerance_options = options(
    click.option("--rtol", type=click.FloatRange(min=0), help="Accept this difference, relative to the element."),
    click.option("--atol", type=click.FloatRange(min=0), help="Accept this difference."),
)

DATA = click.Path(exists=True, path_type=Path)

precision_options = options(
    click.option(
        "--precision",
        type=click.Choice(["fp32", "fp16", "bf16", "mixed", "int8", "fp8"]),
        help="Type of the numbers; fp32 if not given, and of an ONNX file its own.",
    ),
    click.option("--keep-fp32", multiple=True, metavar="GLOB", help="mixed: modules that stay in fp32, as norms do."),
    click.option("--calib", type=DATA, help="Data for int8, fp8 and range checks: .npz, .npy, .pt or images."),
    click.option(
        "--calib-samples", type=click.IntRange(min=1), default=128, show_default=True, help="How much of it is used."
    ),
    click.option(
        "--calib-method",
        type=click.Choice(["minmax", "entropy", "percentile"]),
        default="minmax",
        show_default=True,
        help="How int8 finds the range of an activation.",
    ),
    click.option(
        "--qdq", type=click.Choice(["onnxruntime", "tensorrt"]), help="Who is to run an int8 ONNX file. [onnxruntime]"
    ),
    click.option(
        "--min-cosine",
        type=click.FloatRange(-1, 1),
        default=0.9,
        show_default=True,
        help="int8, fp8: least cosine to the float64 run.",
    ),
    click.option(
        "--min-top1",
        type=click.FloatRange(0, 1),
        default=0.9,
        show_default=True,
        help="int8, fp8: least part of the rows with the same largest entry as the float64 run.",
    ),
)

engine_options = options(
    click.option("--min-shape", "smallest", type=ShapeType(), multiple=True, help="Engine: smallest shape."),
    click.option("--opt-shape", "usual", type=ShapeType(), multiple=True, help="Engine: shape it is made fast for."),
    click.option("--max-shape", "largest", type=ShapeType(), multiple=True, help="Engine: largest shape."),
    click.option("--target", "targets", type=TargetsType(), default=(), help="Engine: GPUs it is for."),
    click.option(
        "--tensorrt", "package", type=click.Choice(["tensorrt_rtx", "tensorrt"]), help="Engine: which package builds."
    ),
    click.option("--timing-cache", type=FILE, help="Engine: file that makes the next build of tensorrt faster."),
    click.option("--keep-onnx", is_flag=True, help="Engine: keep the ONNX file it was built from."),
)

output_option = click.option("-o", "--output", type=FILE, help="Where to write; beside the input if not given.")

output_options = options(
    click.option("--json", "json_file", metavar="FILE|-", help="Write the report as JSON; - for standard output."),
    click.option("--force", is_flag=True, help="Overwrite files that exist."),
    click.option("-v", "--verbose", count=True, help="Every norm, the log, and stack traces of errors."),
    click.option("-q", "--quiet", is_flag=True, help="Only errors."),
    click.option("--no-color", is_flag=True, help="No colour; NO_COLOR does the same."),
)
