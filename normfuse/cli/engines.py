"""Engines on the command line: what was asked for, an engine of an ONNX file, and what to print of one."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli import onnx_files, results
from normfuse.cli.arguments import Check, NamedShape, Request
from normfuse.cli.output import Output, require_free
from normfuse.errors import LoweringError

if TYPE_CHECKING:
    from normfuse.lowering import EngineInfo, EngineOptions
    from normfuse.outputs import Inputs

SHAPES = {"smallest": "--min-shape", "usual": "--opt-shape", "largest": "--max-shape"}
FOR_ENGINES = SHAPES | {"targets": "--target", "package": "--tensorrt", "timing_cache": "--timing-cache"}
FOR_ENGINES |= {"keep_onnx": "--keep-onnx"}


def require_fitting(options: dict[str, Any], *, wants_engine: bool) -> None:
    """Refuse options that contradict each other.

    Raises:
        click.UsageError: They do.
    """
    precision = options["precision"] or "fp32"
    given = [flag for key, flag in FOR_ENGINES.items() if options[key]]
    if given and not wants_engine:
        raise click.UsageError(f"{given[0]} is for an engine: pass -o NAME.engine")
    if options["keep_fp32"] and precision != "mixed":
        raise click.UsageError("--keep-fp32 needs --precision mixed")
    if precision in ("int8", "fp8") and options["calib"] is None:
        raise click.UsageError(f"--precision {precision} needs --calib: a folder of images, .npz, .npy or .pt")
    if options["qdq"] and precision not in ("int8", "fp8"):
        raise click.UsageError("--qdq needs --precision int8")
    if precision == "fp8" and not (wants_engine or options["qdq"] == "tensorrt"):
        raise click.UsageError("--precision fp8 is for TensorRT: pass -o NAME.engine or --qdq tensorrt")


def request(options: dict[str, Any], model: Request, target: Path, out: Output) -> EngineOptions:
    """Return what is to be built, after a look at whether anything could build it.

    Raises:
        MissingDependencyError: No TensorRT is installed, or not the one that was asked for.
        click.UsageError: A file that would be written beside the engine exists already.
    """
    from normfuse.lowering import EngineOptions
    from normfuse.lowering.engine_sidecar import sidecar_path
    from normfuse.lowering.profiles import ShapeRequest
    from normfuse.lowering.tensorrt import choose

    beside = [sidecar_path(target), *([target.with_suffix(".onnx")] if options["keep_onnx"] else [])]
    for path in beside:
        require_free(path, force=out.force)
    engine = EngineOptions(
        package=options["package"],
        targets=options["targets"],
        shapes=ShapeRequest(**{key: _by_name(options[key], flag) for key, flag in SHAPES.items()}),
        timing_cache=options["timing_cache"],
        keep_onnx=options["keep_onnx"],
        source=Path(model.model) if Path(model.model).is_file() else model.weights,
    )
    choose(engine)
    return engine


def _by_name(shapes: tuple[NamedShape, ...], flag: str) -> dict[str | None, tuple[int, ...]]:
    found = {shape.name: shape.shape for shape in shapes}
    if len(found) < len(shapes) or (None in found and len(found) > 1):
        raise click.UsageError(f"{flag}: name each input once, as in {flag} ids:1x16 {flag} mask:1x16")
    return found


def require_profiles(engine: EngineOptions, model: Any, inputs: Inputs, dynamic: tuple[str, ...]) -> None:
    """Refuse shapes that do not fit the model or each other, before any work is done.

    Raises:
        click.UsageError: They do not.
    """
    from normfuse.lowering.axes import parse_axes
    from normfuse.lowering.profiles import with_profiles
    from normfuse.outputs import named_inputs

    named = named_inputs(model, inputs)
    try:
        with_profiles(parse_axes(dynamic, named), engine.shapes.profiles(named))
    except LoweringError as error:
        raise click.UsageError(str(error)) from error


def from_onnx(
    request: Request,
    check: Check,
    target: Path,
    engine: EngineOptions,
    out: Output,
    *,
    fold_bn: bool,
    require_fold: bool,
    options: dict[str, Any],
) -> None:
    """Fold the norms of an ONNX file and build an engine from it, in the types it has.

    Raises:
        click.UsageError: Other types were asked for, or the shapes do not fit the file.
        VerificationError: The folded file does not compute what the file computes.
    """
    if options["precision"]:
        raise click.UsageError("--precision: an ONNX file keeps its own types; export the model that it came from")
    from normfuse.lowering.onnx_fold import write
    from normfuse.lowering.tensorrt import build_engine

    profiles = _profiles_of_file(request, engine)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(request.model)
        if fold_bn:
            result = onnx_files.fold(request, out, options["include"], options["exclude"])
            results.show_report(result.report, out)
            if require_fold:
                results.require_all_folded(result.report, out)
            source = write(result.model, Path(folder, target.with_suffix(".onnx").name))
            if not check.no_verify:
                comparison = onnx_files.check(request, source, check, out)
                results.show_comparison(comparison, out)
                results.require_passed(comparison, request.model, out)
        with out.step("building"):
            built = build_engine(source, target, options=engine, profiles=profiles, precision="as in the file")
    show(built, target, out)
    results.show_next(f"normfuse verify {shlex.quote(request.model)} {shlex.quote(str(target))}", out)
    out.finish()


def _profiles_of_file(request: Request, engine: EngineOptions) -> dict[str, Any]:
    """Return the profiles of a file, whose axes of any size must all be in one."""
    import torch

    from normfuse.lowering.onnx_parity import declared_inputs
    from normfuse.lowering.profiles import ShapeRequest

    declared = {name: shape for name, (_, shape) in declared_inputs(request.model).items()}
    largest = {next(iter(declared)) if name is None else name: s for name, s in engine.shapes.largest.items()}
    missing = [name for name, shape in declared.items() if None in shape and name not in largest]
    if missing:
        raise click.UsageError(f"{missing[0]} has axes of any size: an engine needs its --min-shape and --max-shape")
    filled: dict[str, list[Any]] = {
        name: [m if n is None else n for n, m in zip(shape, largest.get(name, shape), strict=False)]
        for name, shape in declared.items()
    }
    named = {name: torch.empty(shape, device="meta") for name, shape in filled.items()}
    try:
        return ShapeRequest(engine.shapes.smallest, engine.shapes.usual, engine.shapes.largest).profiles(named)
    except LoweringError as error:
        raise click.UsageError(str(error)) from error


def show(built: EngineInfo, target: Path, out: Output) -> None:
    """Print what was built and whether a normalization is left in it, and put it into the document."""
    sidecar = built.sidecar
    package = f"{sidecar.tensorrt['package']} {sidecar.tensorrt['version']}"
    goal = ", ".join(sidecar.target) or "sm_80 and later"
    norms = sorted({norm for layer in sidecar.norm_layers for norm in layer["norms"]})
    left = f"{len(sidecar.norm_layers)} of them compute one of {len(norms)} norms" if norms else "none computes a norm"
    out.field("engine", f"{package} for {goal}  {len(sidecar.layers)} layers, {left}")
    if norms:
        shown = norms if out.verbose else norms[:5]
        out.rows([("    left", name) for name in shown])
    for text in built.notes:
        out.note(text)
    entries = {"package": package, "target": sidecar.target, "layers": len(sidecar.layers)}
    entries |= {"norm_layers": sidecar.norm_layers}
    results.show_file(target, out, f"described in {target.name}.json", format="TensorRT engine", **entries)
