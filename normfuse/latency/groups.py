"""One group of rows: all forms of a model on one backend, timed by turns, with a control.

The unfolded form takes two turns in each round. The ratio of the second to the first is the control: it would be 1 on
a quiet machine, and how far its quartiles are from 1 is what no other ratio may be smaller than to mean anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from normfuse.latency.backends import Prepared
from normfuse.latency.clock import Spread, ratios, take_turns
from normfuse.latency.memory import peak_bytes
from normfuse.latency.results import Row

BASELINE = "unfolded"


@dataclass(frozen=True, slots=True)
class Group:
    """What the rows have in common, and how long they are timed.

    Attributes:
        model: The name of the model.
        backend: The name of the backend.
        precision: The type of the weights.
        batch: The size of the first axis.
        seconds: How long each form is timed.
        warmup: Rounds before.
        on_gpu: Whether torch works on a GPU.
    """

    model: str
    backend: str
    precision: str
    batch: int
    seconds: float
    warmup: int
    on_gpu: bool = False

    def rows(self, forms: Mapping[str, Prepared], errors: Mapping[str, float]) -> list[Row]:
        """Return one row for each form; ``errors`` are their relative differences to the source."""
        calls = {form: prepared.call for form, prepared in forms.items()}
        turns = {**calls, "control": calls[BASELINE]}
        by_events = self.on_gpu and self.backend != "onnxruntime"
        times = take_turns(turns, seconds=self.seconds, warmup=self.warmup, on_gpu=by_events)
        control = Spread.of(ratios(times["control"], times[BASELINE]))
        noise = max(abs(control.low - 1), abs(control.high - 1))
        return [
            Row(
                model=self.model,
                variant=form,
                backend=self.backend,
                precision=self.precision,
                batch=self.batch,
                seconds=Spread.of(times[form]),
                ratio=Spread.of(ratios(times[form], times[BASELINE])),
                noise=noise,
                peak_bytes=self._peak(prepared.call),
                nodes=prepared.nodes,
                norms=prepared.norms,
                max_rel=errors[form],
            )
            for form, prepared in forms.items()
        ]

    def _peak(self, call: Callable[[], object]) -> int | None:
        if self.backend in ("onnxruntime", "tensorrt", "cudagraph"):  # their memory is their own, or taken once
            return None
        return peak_bytes(call, on_gpu=self.on_gpu)
