"""What was done to each norm of a model, and why not where nothing was.

A :class:`Report` holds every normalization layer of the model exactly once (``norm=True``), and one further outcome
for each rewrite that is not about a norm (a materialized weight, a merged branch).
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from dataclasses import dataclass, field
from typing import Any

from normfuse.base import Refusal
from normfuse.errors import shown

SCHEMA_VERSION = 1
_OF_LAYERS = {"quantize", "shiftquant", "shiftquant-off"}  # passes about other layers than norms
_SHOWN = 4  # partners that a line of a printed report names
_VERBS = {  # by the name of the pass, and whether the norm remains
    ("tune-mode", False): "applied by the layer before",
    ("tune-mode", True): "on fixed statistics where they are",
    ("center-norm", False): "turned into RMSNorm",
    ("swap-unified", False): "swapped",
    ("swap-l1", False): "swapped",
    ("recalibrate", False): "recalibrated",
    ("prune-constant", False): "without their constant channels",
    ("fold-bn", True): "folded but for their group scaling",
    ("fuse-layer-norm", True): "made one LayerNormalization",
}


class Status(enum.Enum):
    """What became of one layer."""

    APPLIED = "applied"
    REFUSED = "refused"
    UNMATCHED = "unmatched"
    NOT_REACHED = "not reached"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one pass did at one place.

    Attributes:
        pass_name: ``"fold-bn"``; empty where no pass that ran looks for such a layer.
        status: Applied, refused, unmatched (no pass looks for it), or not reached by the captured run.
        subject: Qualified name of the layer: ``"layer1.0.bn1"``.
        layer: Its class name: ``"BatchNorm2d"``.
        norm: Whether it is a normalization layer; each of those is in a report once.
        partners: The layers that absorbed it, or took part.
        refusal: Why not, where it was refused or not matched, or why no more than what was applied.
        remains: Whether an applied norm stays: without its gain and shift, or in Tune mode on its own.
    """

    pass_name: str
    status: Status
    subject: str
    layer: str
    norm: bool = True
    partners: tuple[str, ...] = ()
    refusal: Refusal | None = None
    remains: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON-ready values: keys ``norm, producer, action, reason, ...`` are stable."""
        return {
            "pass": self.pass_name,
            "norm": self.subject if self.norm else None,
            "subject": self.subject,
            "layer": self.layer,
            "producer": list(self.partners),
            "action": self.status.name.lower(),
            "reason": self.refusal.reason.name if self.refusal else None,
            "detail": self.refusal.detail if self.refusal else None,
            "hint": self.refusal.hint if self.refusal else None,
            "remains": self.remains,
        }

    def line(self) -> tuple[str, str, str]:
        """Return ``(status, what, why)``, the columns of a printed report."""
        more = len(self.partners) > _SHOWN
        partners = ", ".join(self.partners[:_SHOWN]) + (f" and {len(self.partners) - _SHOWN} more" if more else "")
        what = f"{partners} <- {self.subject}" if self.partners else self.subject
        why = _verb(self) if self.remains or (self.pass_name, False) in _VERBS else ""
        return self.status.value, shown(what), str(self.refusal) if self.refusal else why


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of running a result against its source; one that differs raises, and has no report.

    Attributes:
        verified: Whether the result returns what the source returns, up to rounding.
        inputs: What both ran on, for people: ``"x:1x3x224x224 float32"``.
        origin: What that was made up from, where the user gave no inputs: ``"guessed from conv1 (Conv2d)"``.
        error: The largest difference of an output, of the largest value of that output.
        allowed: What rounding explains of it, in the same unit.
        dtype: The precision in which both ran: ``"float32"``; ``"float64"`` where rounding hid what the own one shows.
        reason: Why the result is not verified; empty where it is.
    """

    verified: bool
    inputs: str = ""
    origin: str = ""
    error: float = 0.0
    allowed: float = 0.0
    dtype: str = ""
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        made_up = f", {self.origin}" if self.origin else ""
        if not self.verified:
            return f"not verified: {self.reason}"
        figures = f"off by {self.error:.1e} of the largest value, {self.allowed:.1e} allowed, in {self.dtype}"
        return f"verified: {figures} (on {self.inputs}{made_up})"


@dataclass(frozen=True, slots=True)
class Report:
    """The outcomes of a run of passes, in the order of execution of the model.

    True if anything was applied. ``str(report)`` is an aligned table with one line per layer. ``verification`` says
    what came of running the result; None where it was not asked for, or where nothing exact was applied.
    """

    outcomes: tuple[Outcome, ...]
    passes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    verification: Verification | None = field(default=None, compare=False)

    @property
    def norms(self) -> tuple[Outcome, ...]:
        """The outcomes about normalization layers, each layer once."""
        return tuple(o for o in self.outcomes if o.norm)

    @property
    def applied(self) -> tuple[Outcome, ...]:
        """The outcomes that changed the model."""
        return self._with(Status.APPLIED)

    @property
    def refused(self) -> tuple[Outcome, ...]:
        """The outcomes a pass looked at and refused, with the reason."""
        return self._with(Status.REFUSED)

    @property
    def unmatched(self) -> tuple[Outcome, ...]:
        """The norms that no pass of the run looks for."""
        return self._with(Status.UNMATCHED)

    @property
    def not_reached(self) -> tuple[Outcome, ...]:
        """The norms that the captured run did not call."""
        return self._with(Status.NOT_REACHED)

    def _with(self, status: Status) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if o.status is status)

    def summary(self) -> str:
        """Return one line: ``"fold-bn: 51 of 53 norms folded, 2 refused (2 extra consumer)"``."""
        if self.passes and set(self.passes) <= _OF_LAYERS:
            return self._summary_of_layers()
        norms = self.norms
        done = [o for o in norms if o.status is Status.APPLIED]
        verbs = {_VERBS.get((name, False), "folded"): [] for name in self.passes} or {"folded": []}
        for outcome in done:
            verbs.setdefault(_verb(outcome), []).append(outcome)
        (first, those), *others = verbs.items()
        parts = [f"{len(those)} of {len(norms)} norms {first}"]
        parts += [f"{len(those)} {verb}{_reasons(those)}" for verb, those in others if those]
        for status in (Status.REFUSED, Status.UNMATCHED, Status.NOT_REACHED):
            left = [o for o in norms if o.status is status]
            if left:
                parts.append(f"{len(left)} {status.value}{_reasons(left)}")
        return f"{', '.join(self.passes) or 'nothing run'}: {', '.join(parts)}{self._proof()}"

    def _proof(self) -> str:
        if self.verification is None:
            return ""
        return "; verified" if self.verification.verified else "; not verified"

    def _summary_of_layers(self) -> str:
        """Return one line about layers that are no norms: ``"quantize: 52 of 53 layers quantized, 1 refused"``."""
        layers = [o for o in self.outcomes if o.pass_name in _OF_LAYERS]
        refused = [o for o in layers if o.status is Status.REFUSED]
        done = f"{len(layers) - len(refused)} of {len(layers)} layers quantized"
        left = f", {len(refused)} refused{_reasons(refused)}" if refused else ""
        return f"{', '.join(self.passes)}: {done}{left}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values with a versioned schema."""
        return {
            "schema_version": SCHEMA_VERSION,
            "passes": list(self.passes),
            "notes": list(self.notes),
            "summary": self.summary(),
            "verification": self.verification.to_dict() if self.verification else None,
            "pairs": [outcome.to_dict() for outcome in self.outcomes],
        }

    def __bool__(self) -> bool:
        return bool(self.applied)

    def __str__(self) -> str:
        rows = [outcome.line() for outcome in self.outcomes]
        width = max((len(row[1]) for row in rows), default=0)
        lines = [f"  {status:<11}  {what:<{min(width, 60)}}  {why}".rstrip() for status, what, why in rows]
        proof = [f"  {shown(str(self.verification))}"] if self.verification else []
        notes = [f"  note: {shown(note)}" for note in self.notes]
        return "\n".join([self.summary(), *lines, *proof, *notes])


def _verb(outcome: Outcome) -> str:
    usual = "without gain and shift" if outcome.remains else "folded"
    return _VERBS.get((outcome.pass_name, outcome.remains), usual)


def _reasons(outcomes: list[Outcome]) -> str:
    counts = collections.Counter(o.refusal.reason.value for o in outcomes if o.refusal)
    return f" ({', '.join(f'{n} {reason}' for reason, n in counts.most_common())})" if counts else ""
