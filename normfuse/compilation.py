"""From a model to something to call: folded, on the fastest backend of this machine, compared with the model.

What is compiled is a copy. The choice is by measurement: each backend that is present runs the example a few times.
"""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from normfuse import api, surgery
from normfuse.capture import understood, unwrap
from normfuse.comparison import Comparison
from normfuse.errors import LoweringError, MissingDependencyError, VerificationError
from normfuse.examples import Examples, Inputs, calls_of
from normfuse.latency import backends
from normfuse.latency.backends import Prepared
from normfuse.latency.clock import Spread, take_turns
from normfuse.order import is_folded, is_quantized
from normfuse.outputs import arguments
from normfuse.report import Report
from normfuse.verify import Tolerance
from normfuse.verify import verify as compare

CHOICES = ("eager", "compile", "onnxruntime", "tensorrt")
"""Backends that can be called on new inputs: a CUDA graph reads those it was captured with."""


_TRIAL = 0.2  # seconds that each backend is timed


class Compiled:
    """A folded model on a backend: call it as the model is called, and it returns what the model returns.

    Attributes:
        backend: The backend that was chosen, one of :data:`CHOICES`.
        report: What became of each norm; empty where the model was folded before.
        comparison: How far it is from the float64 run of the model; None where that was not asked for.
        seconds: The median time of one call on the example, by backend; empty where one was named.
        notes: Backends that cannot run the model, and why.
    """

    def __init__(self, model: nn.Module, prepared: Prepared, backend: str, report: Report, example: Inputs) -> None:
        self.backend, self.report = backend, report
        self.comparison: Comparison | None = None
        self.seconds: dict[str, float] = {}
        self.notes: tuple[str, ...] = ()
        self._model, self._prepared = model, prepared
        args, kwargs = arguments(example)
        with torch.no_grad():
            self._structure = pytree.tree_structure(model(*args, **kwargs))

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on new inputs, of the shapes of the example unless the backend takes others.

        Raises:
            LoweringError: The backend does not take these inputs.
        """
        candidate, run = self._prepared.candidate, self._prepared.run
        if isinstance(candidate, nn.Module):
            return candidate(*args, **kwargs)
        assert run is not None
        outputs = run(inspect.signature(self._model.forward).bind(*args, **kwargs).arguments)
        if len(outputs) != self._structure.num_leaves:
            counts = f"{len(outputs)} tensors, the model {self._structure.num_leaves} values"
            raise LoweringError(f"{self.backend} returns {counts}: choose backend='compile'")
        device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))
        return pytree.tree_unflatten([output.to(device) for output in outputs], self._structure)

    def __repr__(self) -> str:
        """Name the model and the backend."""
        return f"Compiled({type(self._model).__name__}, backend={self.backend!r})"


def compile(
    model: nn.Module,
    example_inputs: Inputs | Examples,
    *,
    backend: str | None = None,
    verify: bool = True,
    tolerance: Tolerance | None = None,
) -> Compiled:
    """Return a copy of the model, folded, on the fastest backend that this machine has.

    Args:
        model: Any module; it is not changed. A folded model is taken as it is.
        example_inputs: What it is called on: a tensor, a tuple of positional or a mapping of keyword arguments. ONNX
            Runtime and TensorRT take inputs of these shapes only. Several, as for :func:`normfuse.fold`, are folded
            with; the first is what the backends are prepared and compared on.
        backend: One of :data:`CHOICES`; None measures those that are present and takes the fastest.
        verify: Compare the result with a float64 run of the model on the example.
        tolerance: The difference to accept; None for what rounding explains.

    Raises:
        ValueError: There is no such backend.
        MissingDependencyError: The backend that was named is not installed, or has no GPU here.
        LoweringError: The backend that was named, or every backend, cannot run the model.
        VerificationError: The result does not compute what the model computes.

    Example:
        >>> fast = normfuse.compile(model, images)  # doctest: +SKIP
        >>> fast(images)  # doctest: +SKIP
    """
    if backend is not None and backend not in CHOICES:
        raise ValueError(f"{backend!r} is none of {', '.join(CHOICES)}")
    source, example_inputs = unwrap(model), understood(model, example_inputs)
    folded, report = _folded(source, example_inputs, verify)
    first = calls_of(example_inputs)[0]
    prepared, notes = _prepare(folded, first, backend)
    seconds = _seconds(prepared, folded) if len(prepared) > 1 else {}
    best = min(seconds, key=lambda name: seconds[name]) if seconds else next(iter(prepared))
    made = Compiled(folded, prepared[best], best, report, first)
    made.seconds, made.notes = seconds, notes
    if verify:
        made.comparison = compare(source, prepared[best].candidate, first, tolerance=tolerance)
        if not made.comparison:
            raise VerificationError(f"{best} does not reproduce the model: {made.comparison}", made.comparison)
    return made


def _folded(source: nn.Module, inputs: Inputs | Examples, verify: bool) -> tuple[nn.Module, Report]:
    if is_folded(source) or is_quantized(source):
        return surgery.copy(source), Report(())
    result = api.apply(source, api.EXACT_PASSES, example_inputs=inputs, verify=verify)
    return result.model, result.report


def _prepare(model: nn.Module, inputs: Inputs, backend: str | None) -> tuple[dict[str, Prepared], tuple[str, ...]]:
    """Return the model on the backend that was named, or on all that can run it."""
    found: dict[str, Prepared] = {}
    notes: list[str] = []
    for name in [backend] if backend else [name for name in backends.present(model) if name in CHOICES]:
        folder = _Folder()
        try:
            made = backends.BACKENDS[name](model, inputs, folder.path, keep_norms=False)
        except (LoweringError, MissingDependencyError) as error:
            if backend:
                raise
            notes.append(f"{name}: {error}")
            continue
        found[name] = dataclasses.replace(made, kept=(*made.kept, folder))
    return found, tuple(notes)


class _Folder:
    """A folder that lives as long as what reads from it: weights beside a large file are mapped, not read."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="normfuse-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _seconds(prepared: dict[str, Prepared], model: nn.Module) -> dict[str, float]:
    calls = {name: one.call for name, one in prepared.items()}
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    times = take_turns(calls, seconds=_TRIAL, warmup=2, on_gpu=on_gpu)
    return {name: Spread.of(values).median for name, values in times.items()}
