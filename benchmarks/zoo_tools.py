"""What each tool makes of a network: ours, ``torch.fx``'s fuser, and the folding inside torchao's ``prepare_pt2e``.

Every tool gets its own deep copy. An exception is a result, not a failure of the benchmark: it is kept as one line.
"""

from __future__ import annotations

import collections
import copy
import importlib
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zoo_census
import zoo_outputs
from torch import nn


@dataclass
class Subject:
    """A calibrated network with what it must keep returning."""

    model: nn.Module
    inputs: Any
    others: Any
    expected: dict[str, Any]
    expected_others: dict[str, Any]
    limit: float
    adjacent: set[str]
    frozen: int

    def errors(self, candidate: nn.Module) -> dict[str, float]:
        """Return the candidate's difference on the example that a tool saw, and on one that it did not."""
        return {
            "error": zoo_outputs.difference(self.expected, zoo_outputs.results(candidate, self.inputs)),
            "error_second": zoo_outputs.difference(self.expected_others, zoo_outputs.results(candidate, self.others)),
        }

    def judged(self, candidate: nn.Module, unseen: int = 0) -> dict[str, Any]:
        """Return the errors, ``"status"`` ``"ok"`` or ``"wrong"``, and the batch norms still evaluated.

        ``unseen`` norms are evaluated too, but not counted: a tool that traces a FrozenBatchNorm leaves its arithmetic.
        """
        errors = self.errors(candidate)
        status = "ok" if max(errors.values()) <= self.limit else "wrong"
        return {"status": status, **errors, "left": zoo_census.evaluations(candidate, self.inputs) + unseen}


def ours(subject: Subject) -> dict[str, Any]:
    """Fold with normfuse and check everything it promises: the result, the report, the user's model, copies."""
    import normfuse
    from normfuse import api

    before = zoo_census.fingerprint(subject.model)
    start = time.perf_counter()
    try:
        result = normfuse.apply(subject.model, api.EXACT_PASSES, example_inputs=subject.inputs)
    except normfuse.CaptureError as error:
        return {"status": "capture error", "message": one_line(error)}
    seconds = time.perf_counter() - start
    found = {"seconds": round(seconds, 3), "original_unchanged": zoo_census.fingerprint(subject.model) == before}
    found |= report_counts(result.report, subject.model, subject.adjacent) | subject.judged(result.model)
    found["copy_works"] = copy_works(result.model, subject)
    return found


def report_counts(report: Any, model: nn.Module, adjacent: set[str]) -> dict[str, Any]:
    """Compare a report with the norms found independently, and count what became of them."""
    expected = zoo_census.norm_modules(model).keys()
    batch = zoo_census.batch_norms(model)
    listed = collections.Counter(outcome.subject for outcome in report.norms)
    of_batch = [outcome for outcome in report.norms if outcome.subject in batch]
    applied = {outcome.subject for outcome in report.norms if outcome.status.value == "applied"}
    return {
        "folded": len(applied & batch),
        "not_folded": tally(outcome for outcome in of_batch if outcome.status.value != "applied"),
        "gains_moved": len(applied - batch),
        "adjacent_left": {
            o.subject: str(o.refusal or o.status.value) for o in of_batch if o.subject in adjacent - applied
        },
        "missing": sorted(expected - listed.keys()),
        "twice": sorted(name for name, times in listed.items() if times > 1),
        "unknown": sorted(listed.keys() - expected),
    }


def tally(outcomes: Any) -> dict[str, int]:
    """Count outcomes by status and reason: ``{"refused: sign": 2, "not reached": 1}``."""
    keys = (f"{o.status.value}: {o.refusal.reason.value}" if o.refusal else o.status.value for o in outcomes)
    return dict(collections.Counter(keys).most_common())


def copy_works(folded: nn.Module, subject: Subject) -> bool:
    """Return whether a deep copy of the folded model computes, bit for bit, what the folded model computes."""
    expected = zoo_outputs.results(folded, subject.inputs)
    return zoo_outputs.difference(expected, zoo_outputs.results(copy.deepcopy(folded), subject.inputs)) == 0


def fx_fuse(subject: Subject) -> dict[str, Any]:
    """Run ``torch.fx.experimental.optimization.fuse``."""
    from torch.fx.experimental.optimization import fuse

    return subject.judged(fuse(copy.deepcopy(subject.model), inplace=True), subject.frozen)


def torchao_fold(subject: Subject) -> dict[str, Any]:
    """Export, and run torchao's ``prepare_pt2e`` with a quantizer that quantizes nothing: its folding remains."""
    from torchao.quantization.pt2e import quantize_pt2e, quantizer

    class Nothing(quantizer.Quantizer):
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            return None

    positional = subject.inputs if isinstance(subject.inputs, tuple) else (subject.inputs,)
    exported = torch.export.export(copy.deepcopy(subject.model), positional).module()
    return subject.judged(quantize_pt2e.prepare_pt2e(exported, Nothing()), subject.frozen)


def guarded(tool: Callable[[Subject], dict[str, Any]], subject: Subject) -> dict[str, Any]:
    """Run a tool; an exception becomes its result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return tool(subject)
        except Exception as error:
            return {"status": "raised", "message": one_line(error), "at": innermost(error)}


def preload() -> None:
    """Import what the tools import late, so that processes forked from this one need not."""
    for module in ("torch._dynamo", "torch.export", "torch.fx.experimental.optimization", "normfuse.api"):
        importlib.import_module(module)
    importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")


def one_line(error: BaseException) -> str:
    """Return the class and the first line that says something, at most 200 characters, without directories."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return " ".join(Path(word).name if word.startswith("/") and word != "/" else word for word in text.split())[:200]


def innermost(error: BaseException, frames: int = 4) -> str:
    """Return the last frames of a traceback as ``file:line function``, outermost first."""
    found = traceback.extract_tb(error.__traceback__)[-frames:]
    return " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in found)
