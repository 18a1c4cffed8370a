"""Compare a model with its folded forms on several backends, in one run.

Every form is compared with the float64 run of the source before it is timed (:mod:`normfuse.latency.groups`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from normfuse import api, rerun, surgery
from normfuse.capture import unwrap
from normfuse.errors import LoweringError, MissingDependencyError, NormfuseError, VerificationError
from normfuse.graph import Inputs
from normfuse.latency import backends
from normfuse.latency.backends import BACKENDS, Prepared
from normfuse.latency.groups import BASELINE, Group
from normfuse.latency.results import Benchmark, Row
from normfuse.order import is_folded
from normfuse.outputs import input_tensors, resized
from normfuse.verify import verify

VARIANTS: dict[str, Sequence[str]] = {"unfolded": (), "folded": ("fold-bn",), "exact": api.EXACT_PASSES}
"""The passes of each form of the model."""
Track = Callable[[Iterable[tuple[str, int]]], Iterable[tuple[str, int]]]


def measure(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    name: str = "model",
    on: Sequence[str] | None = None,
    variants: Sequence[str] = tuple(VARIANTS),
    batches: Sequence[int] = (),
    seconds: float = 2.0,
    warmup: int = 10,
    track: Track = iter,
) -> Benchmark:
    """Time a model, folded and not, on the backends of this machine.

    Args:
        model: Any module that is not folded; it is not changed.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
        name: What to call the model in the rows.
        on: Keys of :data:`BACKENDS`; all that are present, if None. One that is named and missing is an error.
        variants: Keys of :data:`VARIANTS`; ``"unfolded"``, the baseline, is always measured.
        batches: Sizes of the first axis; that of the example, if empty. The rows of the example are repeated.
        seconds: How long each form is timed, at least ten rounds.
        warmup: Rounds before.
        track: Wraps the pairs of backend and batch, to show progress.

    Raises:
        ValueError: A backend or variant is not known, or the model is folded already.
        MissingDependencyError: A backend that was named is not there.
        VerificationError: A form does not compute what the model computes.
    """
    source = unwrap(model)
    chosen = _chosen(source, on, variants)
    wanted = {form: passes for form, passes in VARIANTS.items() if form in variants or form == BASELINE}
    forms = {form: _form(source, passes, example_inputs) for form, passes in wanted.items()}
    first = input_tensors(example_inputs)[0]
    sizes = tuple(batches) or (first.shape[0] if first.dim() else 1,)
    rows: list[Row] = []
    notes: list[str] = []
    for backend, batch in track([(backend, batch) for backend in chosen for batch in sizes]):
        inputs = resized(example_inputs, batch) if batches else example_inputs
        try:
            rows += _group(source, forms, inputs, name, backend, batch, seconds, warmup)
        except (LoweringError, MissingDependencyError) as error:
            if on is not None and isinstance(error, MissingDependencyError):
                raise
            notes.append(f"{name}, {backend}, batch {batch}: {error}")
    return Benchmark(tuple(rows), tuple(notes))


def _form(source: nn.Module, passes: Sequence[str], inputs: Inputs) -> nn.Module:
    if not passes:
        return surgery.copy(source).eval()
    return api.apply(source, passes, example_inputs=inputs, verify=False).model  # each form is compared as it is timed


def _chosen(model: nn.Module, on: Sequence[str] | None, variants: Sequence[str]) -> Sequence[str]:
    for given, known in ((on or (), BACKENDS), (variants, VARIANTS)):
        for word in given:
            if word not in known:
                raise ValueError(f"{word!r} is none of {', '.join(known)}")
    if is_folded(model):
        raise ValueError("the model is folded already: a benchmark compares with the unfolded one")
    return backends.present(model) if on is None else tuple(dict.fromkeys(on))


def _group(
    source: nn.Module,
    forms: dict[str, nn.Module],
    inputs: Inputs,
    name: str,
    backend: str,
    batch: int,
    seconds: float,
    warmup: int,
) -> list[Row]:
    """Return the rows of one backend and batch."""
    on_gpu = next((p.is_cuda for p in source.parameters()), False)
    precision = str(rerun.main_dtype(source) or torch.float32).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        prepared: dict[str, Prepared] = {}
        errors: dict[str, float] = {}
        for form, model in forms.items():
            own = Path(folder, form)
            own.mkdir()
            prepared[form] = BACKENDS[backend](model, inputs, own, keep_norms=form == BASELINE)
            errors[form] = _checked(source, prepared[form], inputs, f"{form} on {backend}")
        return Group(name, backend, precision, batch, seconds, warmup, on_gpu).rows(prepared, errors)


def _checked(source: nn.Module, prepared: Prepared, inputs: Inputs, what: str) -> float:
    """Return how far a form is from the float64 run of the source.

    Raises:
        VerificationError: Further than rounding explains.
    """
    try:
        comparison = verify(source, prepared.candidate, inputs)
    except NormfuseError as error:
        raise VerificationError(f"{what} cannot be compared with the model: {error}") from error
    if not comparison:
        raise VerificationError(f"{what} does not compute what the model computes: {comparison}", comparison)
    return comparison.max_rel
