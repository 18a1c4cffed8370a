"""Compare an ONNX file with its folded form, in ONNX Runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from normfuse.errors import VerificationError
from normfuse.latency.backends import of_file
from normfuse.latency.groups import Group
from normfuse.latency.results import Benchmark, Row
from normfuse.outputs import resized


def measure_file(
    path: str | os.PathLike[str],
    example_inputs: Mapping[str, Tensor],
    *,
    name: str | None = None,
    batches: Sequence[int] = (),
    seconds: float = 2.0,
    warmup: int = 10,
) -> Benchmark:
    """Time an ONNX file as it is and with its norms folded (:func:`normfuse.lowering.onnx_fold.fold_onnx`).

    ONNX Runtime folds a norm behind a convolution by itself, in either file; those that it leaves are what can differ.

    Args:
        path: The file.
        example_inputs: Its inputs, by name.
        name: What to call it in the rows; its stem, if None.
        batches: As for :func:`normfuse.latency.measure`; only where the file takes them.
        seconds: As there.
        warmup: As there.

    Raises:
        LoadError: It is no ONNX file, or cannot be run.
        LoweringError: It does not take these inputs.
        VerificationError: The folded form does not compute what the file computes.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """
    from normfuse.lowering import graphs, onnx_parity
    from normfuse.lowering.onnx_fold import fold_onnx, write

    first = next(iter(example_inputs.values()))
    precision = str(graphs.main_dtype(graphs.load(path)) or torch.float32).removeprefix("torch.")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        folded = write(fold_onnx(Path(path)).model, Path(folder, "folded.onnx"))
        for batch in batches or (first.shape[0] if first.dim() else 1,):
            inputs = resized(example_inputs, batch) if batches else dict(example_inputs)
            comparison = onnx_parity.compare_files(path, folded, [inputs])
            if not comparison:
                raise VerificationError(f"{path}, folded, does not compute what it computes: {comparison}", comparison)
            forms = {
                "unfolded": of_file(Path(path), inputs, Path(folder)),
                "folded": of_file(folded, inputs, Path(folder)),
            }
            group = Group(name or Path(path).stem, "onnxruntime", precision, batch, seconds, warmup)
            rows += group.rows(forms, {"unfolded": 0.0, "folded": comparison.max_rel})
    return Benchmark(tuple(rows), ())
