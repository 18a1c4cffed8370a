"""What a case is: a sentence, a model of which it is true, and what to do about it where the sentence says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import api
from normfuse.report import Report, Status
from tests.parity import randomize_norms
from tests.zoo.trap import image


class Net(nn.Module):
    """A model by its parts and what it does with them: ``function(net, *inputs)``."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Alone(Net):
    """The same of one input, which can be traced."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x)


@dataclass(frozen=True)
class Case:
    """One sentence.

    Attributes:
        sentence: What the report says, or a part of it that holds what the code fills in; behind a bar, the hint.
        make: Makes the model; called with a fixed random state, so that a second model is the same.
        inputs: Its example inputs, by shape; None to trace.
        passes: What is run.
        prepare: Called with the model once its norms are random: what puts something in the way.
        advice: Returns what the hint says to do as arguments of the run, or changes the model; then something folds.
        options: Arguments of the run.
        positive: Whether every gain is positive.
        norms: Whether the norms get random values; lazy ones cannot.
    """

    sentence: str
    make: Callable[[], nn.Module]
    inputs: Sequence[Sequence[int]] | None = ((2, 4, 6, 6),)
    passes: Sequence[str] = ("fold-bn",)
    prepare: Callable[[Any], Any] | None = None
    advice: Callable[[Any], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    positive: bool = False
    norms: bool = True

    @property
    def detail(self) -> str:
        """What the refusal says."""
        return self.sentence.partition(" | ")[0]

    @property
    def hint(self) -> str:
        """What it advises, empty where nothing can be done."""
        return self.sentence.partition(" | ")[2]

    def run(self, *, advised: bool = False) -> Report:
        """Run the passes on the model, after the hint was followed if ``advised``, and return the report."""
        torch.manual_seed(0)
        model = self.make().eval()
        model = randomize_norms(model, positive=self.positive) if self.norms else model
        model = model if any(p.dtype != torch.float32 for p in model.parameters()) else model.double()
        if self.prepare is not None:
            self.prepare(model)
        options: dict[str, Any] = dict(self.options)
        if self.inputs is not None:
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
            options["example_inputs"] = tuple(image(*shape).to(dtype) for shape in self.inputs)
        if advised:
            assert self.advice is not None
            changed = self.advice(model)
            options |= changed if isinstance(changed, dict) else {}
        return api.apply(model, self.passes, **options).report


def sequence(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def applied(report: Report) -> bool:
    """Whether anything was changed."""
    return any(outcome.status is Status.APPLIED for outcome in report.outcomes)
