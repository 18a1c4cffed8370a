"""The commands on an ONNX file: its graph is folded as it is, and compared with the file it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli import source
from normfuse.cli.arguments import Check, NamedShape, Request
from normfuse.cli.inputs import read_arrays
from normfuse.cli.output import Output
from normfuse.cli.results import tolerance_of
from normfuse.errors import LoadError, LoweringError

if TYPE_CHECKING:
    from torch import Tensor

    from normfuse.comparison import Comparison
    from normfuse.lowering.onnx_fold import OnnxFoldResult

ASSUMED_SIZES = (224, 48, 64, 32, 640)


def fold(request: Request, out: Output, include: Sequence[str], exclude: Sequence[str]) -> OnnxFoldResult:
    """Fold the BatchNormalization nodes of the file, in memory, and describe the file.

    Raises:
        LoadError: The file is not a valid ONNX model, or holds NaN or infinite weights.
        MissingDependencyError: onnx is not installed.
    """
    from normfuse.lowering import graphs

    graphs.require()
    from normfuse.lowering.onnx_fold import fold_onnx

    path = Path(request.model)
    _check_finite(path)
    with out.step("folding"):
        result = fold_onnx(path, include=tuple(include), exclude=tuple(exclude))
    describe(request, out)
    return result


def describe(request: Request, out: Output) -> None:
    """Show what the file is."""
    from normfuse.lowering.onnx_fold import count_ops

    path = Path(request.model)
    out.document["environment"] = source.environment()
    out.document["model"] = {**source.file_entry(path), "name": path.stem, "format": "ONNX", "arch": None}
    count = sum(count_ops(path).values())
    out.document["model"]["nodes"] = count
    out.field("model", f"{path.name}  ONNX, {count} nodes")


def _check_finite(path: Path) -> None:
    from normfuse.lowering import graphs

    numpy_helper = graphs.require().numpy_helper
    bad = []
    for tensor in graphs.constants(graphs.load(path, weights=True)):
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and array.size > 1 and not bool((array == array).all()):  # NaN differs from itself
            bad.append(tensor.name or "an unnamed constant")
    if bad:
        raise LoadError(f"{path}: NaN values in {', '.join(bad[:5])}")


def check(request: Request, candidate: Path, how: Check, out: Output) -> Comparison:
    """Compare a file with the one it came from."""
    from normfuse.lowering.onnx_parity import compare_files

    with out.step("verifying"):
        given = samples(request, how.num_inputs, out)
        return compare_files(request.model, candidate, given, tolerance=tolerance_of(how))


def samples(request: Request, count: int, out: Output) -> list[dict[str, Tensor]]:
    """Return inputs for the file: those given, or random ones of its declared shapes, and variants of them."""
    import torch

    from normfuse.lowering.onnx_parity import declared_inputs
    from normfuse.rerun import sample_inputs

    torch.manual_seed(request.seed)
    declared = declared_inputs(request.model)
    if request.input_file is not None:
        given: Any = read_arrays(request.input_file)
        values = given if isinstance(given, tuple) else (given,)
        named = given if isinstance(given, dict) else dict(zip(declared, values, strict=False))
    else:
        named = _made_up(request, declared, out)
    if set(named) != set(declared):
        raise click.UsageError(f"the inputs of {request.model} are {', '.join(declared)}")
    first = {name: tensor.to(declared[name][0]) for name, tensor in named.items()}
    return list(sample_inputs(first, count, request.seed).values)  # type: ignore[arg-type]


def _made_up(request: Request, declared: dict[str, Any], out: Output) -> dict[str, Tensor]:
    shapes = _shapes_given(request.input_shapes, list(declared))
    problem = ""
    for size in ASSUMED_SIZES:
        assumed = {name: shapes.get(name, _filled(known, size)) for name, (_, known) in declared.items()}
        named = {name: _random(declared[name][0], shape) for name, shape in assumed.items()}
        problem = _failure(request.model, named)
        if not problem:
            if any(None in shape for name, (_, shape) in declared.items() if name not in shapes):
                text = ", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in assumed.items())
                out.note(f"the input is an assumption (axes of any size): {text}; --input-shape says otherwise")
            return named
    raise LoadError(f"{request.model} does not run on made-up inputs ({problem}): pass --input-shape or --input")


def _shapes_given(shapes: Sequence[NamedShape], names: list[str]) -> dict[str, tuple[int, ...]]:
    if len(shapes) == 1 and shapes[0].name is None:
        return {names[0]: shapes[0].shape}
    if any(shape.name not in names for shape in shapes):
        raise click.UsageError(f"--input-shape: the inputs of this file are {', '.join(names)}")
    return {str(shape.name): shape.shape for shape in shapes}


def _filled(declared: Sequence[int | None], size: int) -> tuple[int, ...]:
    """Return a shape with 1 for a batch of any size, 3 for channels and ``size`` for other axes."""
    defaults = {0: 1, 1: 3 if len(declared) == 4 else size}
    return tuple(known or defaults.get(axis, size) for axis, known in enumerate(declared))


def _random(dtype: Any, shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)


def _failure(path: str, named: dict[str, Tensor]) -> str:
    from normfuse.lowering import onnxruntime as backend

    try:
        backend.run(backend.session(path), named)
    except LoweringError as error:
        return str(error)
    return ""
