"""How far a candidate is from its source, and whether that is rounding or a defect.

Let ``r`` be the output of the source in float64, ``e_new = max|new - r|`` the error of the candidate and
``e_ref = max|ref - r|`` the rounding error of the source itself in the candidate's precision, each over one output
and all samples. Without a tolerance the candidate passes when, for every output,

    e_new <= K * e_ref + FLOOR * eps * max|r|        K = 10, FLOOR = 4, eps of the candidate's type.

Folding rounds each weight once more and a runtime sums in another order, so errors a few times ``e_ref`` are honest;
a wrong formula is orders of magnitude beyond. The floor, relative to the largest element of the output, serves
outputs that the source happens to compute without error. In float16 and bfloat16 rounding explains so much that only
gross defects show: verify a fold in float32 or float64, and the narrow file after that.

With a tolerance the candidate passes when every element has

    |new - r| <= atol + rtol * |r|.

Both sides of the inequality are taken row by row along the first axis: in a row whose largest element is a tenth of the
output's, a difference counts ten times, so that samples of large outputs do not hide those of small ones. And values of
a mask (-1e9 beside logits) are judged apart: they are no scale of the rest.

An allowance over a tenth of ``max|r|`` would let anything pass: such a source (a detector that sorts boxes by nearly
equal scores) cannot be judged at that precision, and the comparison fails and says so, unless the candidate repeats
the source's own run to the last bit. Integer outputs must equal those of one of the two runs of the source. NaN and
infinity pass only where the source has them in the same places. An output that does not depend on the input is noted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

K = 10.0
FLOOR = 4.0
CEILING = 0.1
_NO_NAN = "the source itself gives NaN in output {!r}, the candidate does not"
_MASK = 1e30  # a mask value such as finfo.min is not the scale of an output
_APART = 1000.0  # times the smaller values of an output: what a mask is at least
_ALIKE = 1e-3  # how far the values of a mask differ among each other, at most
_SMALLEST_ROW = 0.1  # of the usual row: what is smaller counts as that, since a row may be zero


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The difference that is accepted for an element ``r``: ``atol + rtol * |r|``."""

    rtol: float
    atol: float

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol >= 0):
            raise ValueError(f"a tolerance is not negative: rtol={self.rtol}, atol={self.atol}")


ANYTHING = Tolerance(rtol=0.0, atol=math.inf)
"""For callers that judge by the figures of a comparison themselves."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The verdict of :func:`normfuse.verify`. True if passed; ``str()`` is one line.

    Attributes:
        passed: Whether the candidate reproduces the source.
        max_abs: Largest difference to the float64 run, in the units of the output.
        max_rel: The same relative to the largest element of the output it occurs in (not to the element itself).
        required: The smallest ``atol`` that would pass, at the ``rtol`` that was given (0 if none was).
        reference_error: What the source itself loses in the candidate's precision, defined as ``max_rel``.
        cosine: Smallest cosine similarity of any output to the float64 run.
        top1: ``(agreeing, total)`` rows with the same largest entry, over outputs of shape (N, C); None without any.
        diverges_at: The first layer whose output differs, where the comparison failed and it could be found.
        failure: Why it failed, in one line; empty if passed.
        judge: The precision of the run that judges: ``"float64"``, or ``"float32"`` for models that allow no other.
        dtype: The precision of the candidate.
        inputs: How many samples were compared.
        outputs: How many output tensors were compared for each.
        tolerance: The tolerance it was judged by; None for the default judgement.
        notes: What a reader should know about how it was compared.
        top1_leads: For each row that does not agree, by how much the source holds its own largest entry above the one
            that the candidate holds for the largest, relative to the largest element of the output.
    """

    passed: bool
    max_abs: float
    max_rel: float
    required: Tolerance
    reference_error: float
    cosine: float
    top1: tuple[int, int] | None
    diverges_at: str | None
    failure: str
    judge: str
    dtype: str
    inputs: int
    outputs: int
    tolerance: Tolerance | None = None
    notes: tuple[str, ...] = ()
    top1_leads: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        top1 = f"  top-1 {self.top1[0]}/{self.top1[1]}" if self.top1 else ""
        figures = f"max abs {self.max_abs:.1e}  cosine {self.cosine:.6f}{top1}"
        if self.passed:
            return f"{figures}  PASSED"
        place = f"; first diverges at {self.diverges_at}" if self.diverges_at else ""
        return f"{figures}  FAILED: {self.failure}{place}"

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready values; what is not finite is None."""
        tolerance = self.tolerance
        return {
            "passed": self.passed,
            "max_abs": _finite(self.max_abs),
            "max_rel": _finite(self.max_rel),
            "required": {"rtol": self.required.rtol, "atol": _finite(self.required.atol)},
            "reference_error": _finite(self.reference_error),
            "cosine": _finite(self.cosine),
            "top1": list(self.top1) if self.top1 else None,
            "top1_leads": list(self.top1_leads),
            "diverges_at": self.diverges_at,
            "failure": self.failure,
            "judge": self.judge,
            "dtype": self.dtype,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "tolerance": {"rtol": tolerance.rtol, "atol": tolerance.atol} if tolerance else None,
            "notes": list(self.notes),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class OutputError:
    """The errors of one output tensor, gathered over the samples.

    Attributes:
        name: Where it is in the output: ``"aux[0]"``.
        rtol: The part of the tolerance that is relative to the element.
    """

    name: str
    rtol: float = 0.0
    scale: float = 0.0
    error: float = 0.0
    unexplained: float = 0.0
    excess: float = 0.0
    noise: float = 0.0
    cosine: float = 1.0
    agreeing: int = 0
    rows: int = 0
    leads: list[float] = field(default_factory=list)
    fault: str = ""
    masked: OutputError | None = None
    constant: Tensor | None = None
    varies: bool = False

    def parts(self) -> list[OutputError]:
        """Return what is judged each by its own scale: the output, and the values of a mask in it."""
        return [self] if self.masked is None else [self, self.masked]

    def add(self, judge: Tensor, new: Tensor, noise: Iterable[tuple[Tensor, float]]) -> None:
        """Take in one sample: the float64 run, the candidate, and runs of the source with the weight of their error."""
        if judge.shape != new.shape:
            self.fault = f"output {self.name!r} has shape {tuple(new.shape)}, expected {tuple(judge.shape)}"
        elif _exact(judge) != _exact(new):
            self.fault = f"output {self.name!r} is {new.dtype}, expected {judge.dtype}"
        elif _exact(judge):
            self._add_exact(judge, new, [tensor for tensor, _ in noise])
        elif judge.numel():
            runs = [(_wide(run), weight) for run, weight in noise if run.shape == judge.shape]
            self._add_floating(_wide(judge), _wide(new), runs)

    def _add_exact(self, judge: Tensor, new: Tensor, runs: Sequence[Tensor]) -> None:
        if not any(torch.equal(run.cpu().long(), new.cpu().long()) for run in (judge, *runs)):
            wrong = int((judge.cpu().long() != new.cpu().long()).sum())
            self.fault = f"output {self.name!r} differs in {wrong} of {judge.numel()} integers"

    def _add_floating(self, judge: Tensor, new: Tensor, runs: list[tuple[Tensor, float]]) -> None:
        if bool((judge.isnan() != new.isnan()).any()):
            own = "; the source itself gives NaN, elsewhere" if bool(judge.isnan().any()) else ""
            self.fault = f"output {self.name!r} has NaN{own}" if bool(new.isnan().any()) else _NO_NAN.format(self.name)
        elif bool(judge.isnan().all()):
            self.fault = f"the source itself gives NaN in output {self.name!r}, and nothing else"
        where = judge.isnan() & new.isnan()
        judge, new = judge.masked_fill(where, 0.0), new.masked_fill(where, 0.0)
        runs = [(run.masked_fill(where, 0.0), weight) for run, weight in runs]
        self._see_constant(judge[~where])
        mask = _mask_of(judge)
        if mask is not None:
            self.masked = self.masked or OutputError(f"{self.name} (masked values)", self.rtol)
            self.masked._add_part(*_chosen(judge, new, runs, mask))
            judge, new = judge.masked_fill(mask, 0.0), new.masked_fill(mask, 0.0)
            runs = [(run.masked_fill(mask, 0.0), weight) for run, weight in runs]
        self._add_part(judge, new, runs)
        self._add_similarity(judge, new)

    def _add_part(self, judge: Tensor, new: Tensor, runs: list[tuple[Tensor, float]]) -> None:
        difference = _difference(judge, new)
        size = judge.abs().nan_to_num(0.0, 0.0)
        size = size.where(size < _MASK, 0.0)
        weights = _row_weights(size)
        self.scale = max(self.scale, float(size.max()))
        self.error = max(self.error, float(difference.max()))
        self.excess = max(self.excess, float((difference - self.rtol * size).max()))
        for run, weight in runs:
            own = float((_difference(judge, run) * weights).max()) * weight
            self.noise = max(self.noise, own if math.isfinite(own) else 0.0)
        if not any(torch.equal(run, new) for run, _ in runs) or not bool(difference.isfinite().all()):
            self.unexplained = max(self.unexplained, float((difference * weights).max()))

    def _see_constant(self, judge: Tensor) -> None:
        """Note whether the output is one value whatever the input, over all samples."""
        first = self.constant if self.constant is not None or not judge.numel() else judge[0]
        self.varies = self.varies or judge.numel() < 2 or bool((judge != first).any())
        self.constant = first

    def _add_similarity(self, judge: Tensor, new: Tensor) -> None:
        self.cosine = min(self.cosine, _cosine(judge.flatten(), new.flatten()))
        if judge.dim() == 2 and judge.shape[1] > 1:
            largest, found = judge.argmax(1, keepdim=True), new.argmax(1, keepdim=True)
            other = (largest != found).flatten()
            self.leads += (judge.gather(1, largest) - judge.gather(1, found))[other].flatten().tolist()
            self.agreeing += len(other) - int(other.sum())
            self.rows += len(other)

    def note(self) -> str:
        """Return what to know about an output that passed without showing much."""
        if self.constant is not None and not self.varies:
            return f"output {self.name!r} is {float(self.constant):g} everywhere, which shows little"
        if self.fault or self.unexplained or self.error <= CEILING * self.scale:
            return ""
        return f"output {self.name!r} repeats the source's own run, which is itself off by {self.error:.1e}"

    def verdict(self, tolerance: Tolerance | None, eps: float, ceiling: float = CEILING) -> str:
        """Return why this output fails, or nothing."""
        if self.fault:
            return self.fault
        if tolerance:
            text = f"output {self.name!r} needs atol {self.excess:.1e} at rtol {self.rtol:g}"
            return "" if self.excess <= tolerance.atol else f"{text}, allowed {tolerance.atol:.1e}"
        allowed = K * self.noise + FLOOR * eps * self.scale
        if self.unexplained <= min(allowed, ceiling * self.scale):
            return ""
        text = f"output {self.name!r} is off by {self.error:.1e}"
        if self.unexplained > allowed:
            return f"{text}, rounding explains {allowed:.1e}"
        return f"{text}, as the source itself is in this precision ({self.noise:.1e}): compare in float64"


def _mask_of(judge: Tensor) -> Tensor | None:
    """Return where an output holds the values of a mask: nearly one value, far above the others; None for nowhere."""
    size = judge.abs().flatten()
    sample = size[:: max(1, size.numel() // 100_000)]
    sample = sample[(sample > 0) & (sample < _MASK)]
    if sample.numel() < 2:
        return None
    usual = float(sample.kthvalue(1 + sample.numel() // 10).values)
    large = (judge.abs() > _APART * usual) & (judge.abs() < _MASK)
    values = judge[large]
    if not values.numel() or float(values.max() - values.min()) > _ALIKE * float(values.abs().max()):
        return None
    return large


def _chosen(
    judge: Tensor, new: Tensor, runs: list[tuple[Tensor, float]], mask: Tensor
) -> tuple[Tensor, Tensor, list[tuple[Tensor, float]]]:
    return judge[mask], new[mask], [(run[mask], weight) for run, weight in runs]


def _row_weights(size: Tensor) -> Tensor:
    """Return by how much a difference in each row counts, at least 1, in a shape that broadcasts to ``size``."""
    if size.dim() < 2 or size.shape[0] < 2:
        return torch.ones((), dtype=size.dtype)
    rows = size.flatten(1).amax(1)
    largest = rows.max()
    weights = largest / rows.clamp(min=_SMALLEST_ROW * rows.median()).clamp(min=torch.finfo(size.dtype).tiny)
    weights = torch.ones_like(rows) if not bool(largest > 0) else weights.clamp(min=1.0)
    return weights.reshape(-1, *[1] * (size.dim() - 1))


def _exact(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


def _difference(judge: Tensor, new: Tensor) -> Tensor:
    """Return ``|new - judge|``; infinities of one sign are equal, NaN is infinitely far."""
    return (new - judge).abs().where(new != judge, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def _cosine(a: Tensor, b: Tensor) -> float:
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite], b[finite]
    norms = float(a.norm() * b.norm())
    if norms == 0.0:
        return 1.0 if torch.equal(a, b) else 0.0
    return max(-1.0, min(1.0, float(a @ b) / norms))


def summarize(
    outputs: Sequence[OutputError],
    tolerance: Tolerance | None,
    eps: float,
    *,
    ceiling: float = CEILING,
    notes: Sequence[str] = (),
    **details: Any,
) -> Comparison:
    """Return the comparison over all outputs; ``details`` are the remaining fields of :class:`Comparison`."""
    parts = [part for output in outputs for part in output.parts()]
    failures = [text for part in parts if (text := part.verdict(tolerance, eps, ceiling))]
    rows = sum(output.rows for output in outputs)
    faulty = any(output.fault for output in outputs)
    excess = math.inf if faulty else max(part.excess for part in parts)
    return Comparison(
        passed=not failures,
        max_abs=max(part.error for part in parts),
        max_rel=max(_relative(part.error, part.scale) for part in parts),
        required=Tolerance(rtol=tolerance.rtol if tolerance else 0.0, atol=excess),
        reference_error=max(_relative(part.noise, part.scale) for part in parts),
        cosine=min(output.cosine for output in outputs),
        top1=(sum(output.agreeing for output in outputs), rows) if rows else None,
        diverges_at=None,
        failure=failures[0] if failures else "",
        outputs=len(outputs),
        tolerance=tolerance,
        notes=(*notes, *(text for output in outputs if (text := output.note()))),
        top1_leads=tuple(_relative(lead, output.scale) for output in outputs for lead in output.leads),
        **details,
    )


def _relative(error: float, scale: float) -> float:
    return error / scale if scale else (math.inf if error else 0.0)
