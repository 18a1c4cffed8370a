"""What a pass is: detect, check, apply; and how it refuses.

``detect`` yields the places that have the shape a pass looks for, ``check`` answers whether the rewrite is legal
there (``None``, or a :class:`Refusal` that names the thing and the remedy), ``apply`` computes every new tensor and
then edits the user's module. The first two change nothing.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from normfuse.errors import shown

if TYPE_CHECKING:
    from normfuse.graph import ModelGraph


class Exactness(enum.Enum):
    """Whether a pass keeps the function of the network (up to rounding) or approximates it."""

    EXACT = "exact"
    APPROXIMATE = "approximate"


class Reason(enum.Enum):
    """Why a rewrite was refused. The value is the short text of reports; ``docs/reference/reasons.md`` has the rest."""

    SHARED_MODULE = "shared module"
    SHARED_PARAMETER = "shared parameter"
    EXTRA_CONSUMER = "extra consumer"
    BATCH_STATISTICS = "batch statistics"
    NONZERO_PADDING = "zero padding"
    RANK_UNKNOWN = "rank unknown"
    AXIS = "other axis"
    FORWARD_OVERRIDDEN = "forward overridden"
    PARAMETRIZED = "parametrized weight"
    HAS_HOOKS = "hook"
    HELD_ELSEWHERE = "held elsewhere"
    QUANTIZED = "quantized"
    DTYPE = "dtype"
    RANGE = "out of range"
    ASKED = "asked by the model"
    NOT_REACHED = "not reached"
    PARTIAL_CAPTURE = "partial capture"
    UNSUPPORTED_LAYER = "unsupported layer"
    OPAQUE_OPERATION = "opaque operation"
    SIGN = "sign"
    NO_BIAS = "no place for a shift"
    NOT_CHEAPER = "not cheaper"
    EXCLUDED = "excluded"
    UNINITIALIZED = "uninitialized"
    NONFINITE = "non-finite values"
    NO_PRODUCER = "model input"
    POST_NORM = "post-norm"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a rewrite is not legal at one place.

    Attributes:
        reason: The kind, for programs.
        detail: The thing at fault by name, for people: ``"layer1.0.conv1 is called 2 times"``.
        hint: What to do about it, if anything: ``"pass example_inputs=..."``.
    """

    reason: Reason
    detail: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return shown(f"{self.reason.value}: {self.detail}{hint}")


class Refused(Exception):  # noqa: N818 - control flow inside a check, never shown to the user
    """Carries a refusal out of a nested question; ``check`` turns it into its answer."""

    def __init__(self, reason: Reason, detail: str, hint: str = "") -> None:
        self.refusal = Refusal(reason, detail, hint)
        super().__init__(str(self.refusal))


@dataclass(frozen=True, slots=True)
class Match:
    """A place where a pass may apply. Holds names and nodes of one graph, so it prints and sorts.

    Attributes:
        subject: Qualified name of what the pass removes or rewrites (the norm, for the folding passes).
        layer: Class name of the subject, ``"BatchNorm2d"``.
        norm: Whether the subject is a normalization layer.
        partners: Qualified names of the layers that take part, known after ``check`` for the folding passes.
        remains: Whether the norm stays and only lost a part, its gain and shift.
        kept: Why it stays, where the rest of the rewrite was not legal.
        absorbed: ``(name, layer)`` of norms that vanish with the subject, where that is not itself a norm.
        payload: What ``check`` worked out for ``apply``, private to the pass.
    """

    subject: str
    layer: str
    norm: bool = True
    partners: tuple[str, ...] = ()
    remains: bool = False
    kept: Refusal | None = None
    absorbed: tuple[tuple[str, str], ...] = ()
    payload: Any = field(default=None, compare=False, repr=False)


class Pass(abc.ABC):
    """One rewrite of the user's module; see the module docstring for the contract of its three methods."""

    name: ClassVar[str]
    exactness: ClassVar[Exactness]
    reversible: ClassVar[bool] = False

    @abc.abstractmethod
    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield the places that have the shape; structure only, changes nothing."""

    @abc.abstractmethod
    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Return the match, completed for ``apply``, or why the rewrite is not legal; changes nothing."""

    @abc.abstractmethod
    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Rewrite the model at a match that ``check`` returned: arithmetic first, then the edit; asks nothing."""
