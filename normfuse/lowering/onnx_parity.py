"""Compare two ONNX files that should compute the same.

Neither file can be run in float64, so the first one, run as written, is the judge, and its own run with all the
optimizations of the runtime shows what summing in another order costs. Beyond that, float32 rounding of a deep network
is allowed for (:data:`LENIENCE` times its machine epsilon, relative to the largest element of an output).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from normfuse.comparison import Comparison, OutputError, Tolerance, summarize
from normfuse.errors import LoadError, VerificationError
from normfuse.lowering import onnxruntime as backend

LENIENCE = 128.0
TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


def compare_files(
    reference: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    samples: Sequence[Mapping[str, Tensor]],
    *,
    tolerance: Tolerance | None = None,
) -> Comparison:
    """Run both files on the samples and compare their outputs.

    Args:
        reference: The file that judges.
        candidate: The file that is judged; it has the same inputs and outputs.
        samples: Inputs by name.
        tolerance: What to accept; None for rounding.

    Raises:
        LoadError: One of the files cannot be run.
        VerificationError: They have different outputs.
    """
    judge, optimized = backend.session(reference, optimization="disabled"), backend.session(reference)
    judged = backend.session(candidate)
    names = [slot.name for slot in judge.get_outputs()]
    found = [slot.name for slot in judged.get_outputs()]
    if len(names) != len(found):
        raise VerificationError(f"{candidate} has {len(found)} outputs, {reference} has {len(names)}")
    outputs = [OutputError(name, tolerance.rtol if tolerance else 0.0) for name in names]
    runs: list[tuple[Tensor, ...]] = [()]
    for sample in samples:
        runs = [backend.run(session, sample) for session in (judge, judged, optimized)]
        for output, expected, new, again in zip(outputs, *runs, strict=True):
            output.add(expected, new, [(again, 1.0)])
    dtypes = [expected.dtype for expected in runs[0] if expected.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)
    note = "judged by the first file as written: an ONNX file does not run in float64"
    details = {"judge": _word(dtypes), "dtype": _word(dtypes), "notes": (note,), "inputs": len(samples)}
    return summarize(outputs, tolerance, eps * LENIENCE, **details)


def _word(dtypes: Sequence[torch.dtype]) -> str:
    return str(dtypes[0]).removeprefix("torch.") if dtypes else "integer"


def declared_inputs(path: str | os.PathLike[str]) -> dict[str, tuple[torch.dtype, list[int | None]]]:
    """Return type and shape of each input of a file, None for an axis of any size.

    Raises:
        LoadError: The file cannot be run, or takes something that is not a tensor of numbers.
    """
    slots = backend.session(path).get_inputs()
    strange = [f"{slot.name} ({slot.type})" for slot in slots if slot.type not in TYPES]
    if strange:
        raise LoadError(f"{path}: inputs of this type cannot be made up: {', '.join(strange)}; pass --input")
    return {slot.name: (TYPES[slot.type], [n if isinstance(n, int) else None for n in slot.shape]) for slot in slots}
