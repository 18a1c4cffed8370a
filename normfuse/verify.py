"""Does the candidate compute what the source computes? Judged against a float64 run of the source.

The source runs three times on each sample: in float64 (the judge), and in the candidate's precision (what rounding
alone costs there). The candidate, a module or the ``.onnx`` or ``.engine`` file that was written, runs once. What is
compared and when it passes is in :mod:`normfuse.comparison`.

A float64 candidate is held to float64 rounding: the source's own error is measured in float32 and scaled by the ratio
of the two machine epsilons, because the judge and the source are then the same run. Where it does not run in float32,
its vectors are moved by one unit in the last place instead (:mod:`normfuse.rounding`).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import rerun, rounding
from normfuse.capture import readable
from normfuse.comparison import ANYTHING, Comparison, OutputError, Tolerance, summarize
from normfuse.divergence import first_divergence
from normfuse.errors import CaptureError, LoadError, VerificationError
from normfuse.examples import Examples, Inputs, calls_of
from normfuse.exclusive import exclusive
from normfuse.outputs import flatten, input_tensors, named_inputs
from normfuse.rerun import Samples

# What opens a written file, by extension. Named, not imported: backends are optional and stand above this module.
BACKENDS = {".onnx": "normfuse.lowering.onnxruntime", ".engine": "normfuse.lowering.tensorrt_run"}
_HARD_CODED = "the model does not run in float64: judged against its own precision"
_LENIENCE = 128.0  # times eps: what float32 rounding may cost where no float64 run measures it


@dataclass
class _Source:
    """The runs of the source: the judging outputs, and other runs of it with the weight of their error."""

    judge: list[dict[str, Any]]
    noise: list[tuple[list[dict[str, Any]], float]]
    precision: str = "float64"
    notes: tuple[str, ...] = ()


@dataclass
class _Candidate:
    """What is being verified: how to run it, its precision, and how to find where it diverges."""

    run: Callable[[Inputs], Any]
    dtype: torch.dtype | None
    locate: Callable[[nn.Module, Inputs], str | None]
    named: bool = True
    notes: tuple[str, ...] = field(default=())


@exclusive
def verify(
    reference: nn.Module,
    candidate: nn.Module | str | os.PathLike[str],
    inputs: Inputs | Examples | Samples,
    *,
    tolerance: Tolerance | None = None,
    rounds_like: nn.Module | None = None,
) -> Comparison:
    """Compare the outputs of a candidate with those of its source, both in eval mode; changes neither.

    Args:
        reference: The source model.
        candidate: A module that takes the same inputs, or the path of an ``.onnx`` file.
        inputs: What both take: a tensor, a tuple of positional or a mapping of keyword arguments; or several of
            these as :class:`normfuse.rerun.Samples`, which :func:`normfuse.rerun.sample_inputs` makes.
        tolerance: What to accept; None for what rounding explains (see :mod:`normfuse.comparison`).
        rounds_like: A form of the source that rounds as the candidate may, where the candidate's type alone does not
            tell: one with layers in several types. Its inputs have the candidate's type.

    Returns:
        The verdict with the figures behind it; false if the candidate differs.

    Raises:
        ValueError: The tolerance is infinite.
        CaptureError: The source does not run on the inputs.
        VerificationError: There is nothing to compare: no samples, or no tensor with elements in the output.
        LoadError: The candidate is a file that cannot be run.
        MissingDependencyError: The candidate is a file and ONNX Runtime is not installed.
    """
    reference, candidate = readable(reference), readable(candidate)
    finite = tolerance is None or (math.isfinite(tolerance.rtol) and math.isfinite(tolerance.atol))
    if tolerance is not None and tolerance is not ANYTHING and not finite:
        raise ValueError(f"a tolerance without end accepts anything: rtol={tolerance.rtol}, atol={tolerance.atol}")
    samples = inputs.values if isinstance(inputs, Samples) else calls_of(inputs)
    if not samples:
        raise VerificationError("nothing to compare: no inputs given")
    subject = _module(candidate, reference) if isinstance(candidate, nn.Module) else _file(candidate, reference)
    own = rerun.main_dtype(reference) or _input_dtype(samples[0])
    source = _run_source(reference, samples, own, _coarser(own, subject.dtype), rounds_like)
    found = _run_candidate(subject, samples, source.judge)
    comparison = _compare(source, found, subject, _coarser(own, subject.dtype), tolerance)
    if comparison.passed:
        return comparison
    return dataclasses.replace(comparison, diverges_at=subject.locate(reference, samples[0]))


def _input_dtype(inputs: Inputs) -> torch.dtype:
    return next((t.dtype for t in input_tensors(inputs) if t.is_floating_point()), torch.float32)


def _coarser(own: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    return max(own, other or own, key=lambda dtype: torch.finfo(dtype).eps)


def _named(output: Any) -> dict[str, Any]:
    return dict(flatten(output))


def _run_source(
    model: nn.Module, samples: Sequence[Inputs], own: torch.dtype, working: torch.dtype, like: nn.Module | None
) -> _Source:
    """Run the source in its own precision, in float64, and in the precision that the candidate works in."""
    twin = rerun.duplicate(model)
    try:
        plain = [_named(rerun.run(twin, sample)) for sample in samples]
    except Exception as error:
        raise CaptureError(f"the model does not run on these inputs: {_first_line(error)}") from error
    judge = _in_double(twin, samples)
    if judge is None:
        return _Source(plain, [], str(own).removeprefix("torch."), (_HARD_CODED,))
    noise = [(plain, 1.0)] if working is own else []
    narrow, weight = (working, 1.0) if working is not torch.float64 else (torch.float32, _ratio())
    if narrow is not own:
        again = _try_run(like or rerun.convert(twin, narrow), samples, narrow)
        noise.append((again, weight) if again is not None else (_moved(model, samples, working), 1.0))
    return _Source(judge, noise)


def _moved(model: nn.Module, samples: Sequence[Inputs], working: torch.dtype) -> list[dict[str, Any]]:
    """Run a source that does not run in the precision of the candidate with its own rounding made as large."""
    return [dict(rounding.moved_run(model, sample, torch.finfo(working).eps)[0]) for sample in samples]


def _ratio() -> float:
    return torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def _in_double(twin: nn.Module, samples: Sequence[Inputs]) -> list[dict[str, Any]] | None:
    """Run in float64, reading narrower types in ``forward`` as float64; plainly if that fails; None if both fail."""
    try:
        rerun.convert(twin, torch.float64)
    except (RuntimeError, TypeError):  # a device or a packed parameter without float64
        return None
    judge = _try_run(twin, samples, torch.float64, promote=True)
    return judge if judge is not None else _try_run(twin, samples, torch.float64)


def _try_run(
    model: nn.Module, samples: Sequence[Inputs], dtype: torch.dtype, *, promote: bool = False
) -> list[dict[str, Any]] | None:
    try:
        return [_named(rerun.run(model, sample, dtype, promote=promote)) for sample in samples]
    except Exception:  # a forward may fail in any way in a precision it was not written for
        return None


def _module(candidate: nn.Module, reference: nn.Module) -> _Candidate:
    dtype = rerun.main_dtype(candidate)
    cast = dtype if dtype is not rerun.main_dtype(reference) else None

    def call(sample: Inputs) -> dict[str, Any]:
        with rerun.evaluating(candidate):
            return _named(rerun.run(candidate, sample, cast))

    return _Candidate(call, dtype, lambda source, sample: first_divergence(source, candidate, sample))


def _file(path: str | os.PathLike[str], reference: nn.Module) -> _Candidate:
    home = BACKENDS.get(Path(path).suffix.lower())
    if home is None:
        raise LoadError(f"cannot verify {os.fspath(path)}: not one of {', '.join(BACKENDS)}")
    backend = importlib.import_module(home)
    artifact = backend.open_artifact(Path(path))
    return _Candidate(
        run=lambda sample: artifact.run(named_inputs(reference, sample)),
        dtype=artifact.dtype,
        locate=lambda source, sample: backend.first_divergence(source, artifact, sample),
        named=False,
        notes=artifact.notes,
    )


def _run_candidate(
    subject: _Candidate, samples: Sequence[Inputs], judge: Sequence[dict[str, Any]]
) -> list[dict[str, Any]] | str:
    """Return the candidate's outputs under the names of the source's, or why they do not correspond."""
    found: list[dict[str, Any]] = []
    for sample, expected in zip(samples, judge, strict=True):
        try:
            output = subject.run(sample)
        except Exception as error:
            return f"the candidate does not run: {_first_line(error)}"
        if not subject.named and len(output) == len(expected):
            output = dict(zip(expected, output, strict=True))
        if not isinstance(output, dict) or output.keys() != expected.keys():
            return f"the candidate returns {_listing(output)}, expected {_listing(expected)}"
        found.append(output)
    return found


def _listing(output: Any) -> str:
    names = ", ".join(list(output)[:8]) if isinstance(output, dict) else ""
    return f"{len(output)} outputs" + (f" ({names})" if names else "")


def _compare(
    source: _Source,
    found: list[dict[str, Any]] | str,
    subject: _Candidate,
    working: torch.dtype,
    tolerance: Tolerance | None,
) -> Comparison:
    leaves = {name: leaf for run in source.judge for name, leaf in run.items()}  # a sample may lack some
    tensors = [name for name, leaf in leaves.items() if isinstance(leaf, Tensor)]
    if not any(run[name].numel() for run in source.judge for name in tensors if name in run):
        raise VerificationError("nothing to compare: the model returns no tensor with elements")
    outputs = [OutputError(name, tolerance.rtol if tolerance else 0.0) for name in tensors]
    skipped = len(leaves) - len(tensors)
    if isinstance(found, str):
        outputs[0].fault, outputs[0].error, outputs[0].cosine = found, float("inf"), 0.0
    else:
        for output in outputs:
            _gather(output, source, found)
    eps = torch.finfo(working).eps * (_LENIENCE if source.notes else 1.0)
    notes = (*source.notes, *subject.notes, *([f"{skipped} outputs that are no tensors not compared"] * bool(skipped)))
    details = {"judge": source.precision, "dtype": str(working).removeprefix("torch."), "notes": notes}
    return summarize(outputs, tolerance, eps, inputs=len(source.judge), **details)


def _gather(output: OutputError, source: _Source, found: list[dict[str, Any]]) -> None:
    for index, (judge, new) in enumerate(zip(source.judge, found, strict=True)):
        if output.name not in judge:
            continue
        noise = [(run[index][output.name], weight) for run, weight in source.noise if output.name in run[index]]
        output.add(judge[output.name], new[output.name], noise)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
