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

An allowance over a tenth of ``max|r|`` would let anything pass: such a source (a detector that sorts boxes by nearly
equal scores) cannot be judged at that precision, and the comparison fails and says so, unless the candidate repeats
the source's own run to the last bit. Integer outputs must equal those of one of the two runs of the source. NaN and
overflow never pass.
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
_MASK = 1e30  # a mask value such as finfo.min is not the scale of an output


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The difference that is accepted for an element ``r``: ``atol + rtol * |r|``."""

    rtol: float
    atol: float

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol >= 0):
            raise ValueError(f"a tolerance is not negative: rtol={self.rtol}, atol={self.atol}")


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

    def add(self, judge: Tensor, new: Tensor, noise: Iterable[tuple[Tensor, float]]) -> None:
        """Take in one sample: the float64 run, the candidate, and runs of the source with the weight of their error."""
        if judge.shape != new.shape:
            self.fault = f"output {self.name!r} has shape {tuple(new.shape)}, expected {tuple(judge.shape)}"
        elif _exact(judge) != _exact(new):
            self.fault = f"output {self.name!r} is {new.dtype}, expected {judge.dtype}"
        elif _exact(judge):
            self._add_exact(judge, new, [tensor for tensor, _ in noise])
        elif judge.numel():
            self._add_floating(_wide(judge), _wide(new), noise)

    def _add_exact(self, judge: Tensor, new: Tensor, runs: Sequence[Tensor]) -> None:
        if not any(torch.equal(run.cpu().long(), new.cpu().long()) for run in (judge, *runs)):
            wrong = int((judge.cpu().long() != new.cpu().long()).sum())
            self.fault = f"output {self.name!r} differs in {wrong} of {judge.numel()} integers"

    def _add_floating(self, judge: Tensor, new: Tensor, noise: Iterable[tuple[Tensor, float]]) -> None:
        if bool(judge.isnan().any()):
            self.fault = f"the source itself gives NaN in output {self.name!r}"
        elif bool(new.isnan().any()):
            self.fault = f"output {self.name!r} has NaN"
        difference = _difference(judge, new)
        size = judge.abs().nan_to_num(0.0, 0.0)
        self.scale = max(self.scale, float(size.where(size < _MASK, 0.0).max()))
        self.error = max(self.error, float(difference.max()))
        self.excess = max(self.excess, float((difference - self.rtol * size).max()))
        runs = [(_wide(run), weight) for run, weight in noise if run.shape == judge.shape]
        for run, weight in runs:
            own = float(_difference(judge, run).max()) * weight
            self.noise = max(self.noise, own if math.isfinite(own) else 0.0)
        if not any(torch.equal(run, new) for run, _ in runs) or not bool(difference.isfinite().all()):
            self.unexplained = max(self.unexplained, float(difference.max()))
        self._add_similarity(judge, new)

    def _add_similarity(self, judge: Tensor, new: Tensor) -> None:
        self.cosine = min(self.cosine, _cosine(judge.flatten(), new.flatten()))
        if judge.dim() == 2 and judge.shape[1] > 1:
            largest, found = judge.argmax(1, keepdim=True), new.argmax(1, keepdim=True)
            other = (largest != found).flatten()
            self.leads += (judge.gather(1, largest) - judge.gather(1, found))[other].flatten().tolist()
            self.agreeing += len(other) - int(other.sum())
            self.rows += len(other)

    def note(self) -> str:
        """Return what to know about an output that passed only because it repeats the source's own run."""
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
    failures = [text for output in outputs if (text := output.verdict(tolerance, eps, ceiling))]
    rows = sum(output.rows for output in outputs)
    faulty = any(output.fault for output in outputs)
    excess = math.inf if faulty else max(output.excess for output in outputs)
    return Comparison(
        passed=not failures,
        max_abs=max(output.error for output in outputs),
        max_rel=max(_relative(output.error, output.scale) for output in outputs),
        required=Tolerance(rtol=tolerance.rtol if tolerance else 0.0, atol=excess),
        reference_error=max(_relative(output.noise, output.scale) for output in outputs),
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
