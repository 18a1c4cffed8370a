"""What was done to each norm of a model, and why not where nothing was.

A :class:`Report` holds every normalization layer of the model exactly once (``norm=True``), and one further outcome
for each rewrite that is not about a norm (a materialized weight, a merged branch).
"""

from __future__ import annotations

import collections
import enum
from dataclasses import dataclass
from typing import Any

from normfuse.base import Refusal

SCHEMA_VERSION = 1


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
        refusal: Why not, where it was refused or not matched.
        remains: Whether an applied norm stays, without its gain and shift.
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
        what = f"{', '.join(self.partners)} <- {self.subject}" if self.partners else self.subject
        why = "gain and shift moved, the norm remains" if self.remains else ""
        return self.status.value, what, str(self.refusal) if self.refusal else why


@dataclass(frozen=True, slots=True)
class Report:
    """The outcomes of a run of passes, in the order of execution of the model.

    True if anything was applied. ``str(report)`` is an aligned table with one line per layer.
    """

    outcomes: tuple[Outcome, ...]
    passes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
        norms = self.norms
        done = [o for o in norms if o.status is Status.APPLIED]
        moved = sum(o.remains for o in done)
        parts = [f"{len(done) - moved} of {len(norms)} norms folded"]
        if moved:
            parts.append(f"{moved} without gain and shift")
        for status in (Status.REFUSED, Status.UNMATCHED, Status.NOT_REACHED):
            left = [o for o in norms if o.status is status]
            if left:
                parts.append(f"{len(left)} {status.value}{_reasons(left)}")
        return f"{', '.join(self.passes) or 'nothing run'}: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values with a versioned schema."""
        return {
            "schema_version": SCHEMA_VERSION,
            "passes": list(self.passes),
            "notes": list(self.notes),
            "summary": self.summary(),
            "pairs": [outcome.to_dict() for outcome in self.outcomes],
        }

    def __bool__(self) -> bool:
        return bool(self.applied)

    def __str__(self) -> str:
        rows = [outcome.line() for outcome in self.outcomes]
        width = max((len(row[1]) for row in rows), default=0)
        lines = [f"  {status:<11}  {what:<{min(width, 60)}}  {why}".rstrip() for status, what, why in rows]
        return "\n".join([self.summary(), *lines, *(f"  note: {note}" for note in self.notes)])


def _reasons(outcomes: list[Outcome]) -> str:
    counts = collections.Counter(o.refusal.reason.value for o in outcomes if o.refusal)
    return f" ({', '.join(f'{n} {reason}' for reason, n in counts.most_common())})" if counts else ""
