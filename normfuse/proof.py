"""Does the result of exact passes compute what its source computed? Both are run before the result is returned.

Let ``s`` be an output of the source, ``t`` that of the result, and ``n`` how far rounding takes this output of this
network on this input, as :mod:`normfuse.rounding` measures it by one more run of the source. The result passes when,
for every output,

    max|t - s| <= min(K n + eps^(3/4) max|s|, eps^(1/2) max|s|)        K = 10

The second term, three quarters of the digits of the type, covers an ``n`` that is small by chance; and where rounding
leaves less than half of the digits, it would cover defects as well. ``eps`` is that of the digits which are really
kept. So a result is the same to

    float64  1.8e-12 to 1.5e-8,   float32  6.4e-6 to 3.5e-4,   float16  0.5 to 3 %,   bfloat16  3 to 9 %

of its largest value; what is smaller shows when the model is folded in a wider type.

The recorded run of a capture has ``s`` already, so this costs one more run of the source and one of the result. Where
the inequality fails the question is settled at the cost of two copies in float64 (:mod:`normfuse.settlement`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import rerun
from normfuse.comparison import FLOOR, Comparison, K, OutputError, summarize
from normfuse.errors import DeployedModelError
from normfuse.examples import Examples, Inputs, calls_of
from normfuse.made_up_inputs import made_up_inputs
from normfuse.outputs import describe, map_tensors
from normfuse.report import Verification
from normfuse.rounding import Leaves, moved_run, run, working_eps

SIZES = (64, 224, 32, 28, 128, 256)  # of pictures that are made up: the smallest that most networks take comes first


@dataclass
class Proof:
    """What the source returns on some inputs, and how far rounding moves that.

    Attributes:
        samples: The inputs; made up at the first look at the model, where there are none.
        returned: What the source returns on each, where that is known.
        origin: What made-up inputs follow from; empty where the user gave them.
        reason: Why nothing can be compared; empty where something can.
    """

    samples: list[Inputs]
    returned: list[Leaves]
    origin: str = ""
    reason: str = ""
    moved: list[Leaves] = field(default_factory=list)
    shown: str = ""
    dtype: torch.dtype = torch.float32
    eps: float = 0.0

    @classmethod
    def of(cls, example_inputs: Inputs | Examples | None) -> Proof:
        """Return the proof on what the user gave."""
        return cls([] if example_inputs is None else list(calls_of(example_inputs)), [])

    def observe(self, model: nn.Module) -> None:
        """Run the source, once, before anything of it is edited."""
        if self.eps:
            return
        if not self.samples:
            self._make_up(model)
        while len(self.returned) < len(self.samples):
            self.returned.append(run(model, self.samples[len(self.returned)]))
        self.dtype = rerun.main_dtype(model) or torch.float32
        self.eps = max(working_eps(model, self.dtype), *(torch.finfo(t.dtype).eps for t in self._floats()), 0.0)
        self.reason = self.reason or self._unusable()
        if not self.reason:
            self.shown = "; ".join(describe(model, sample) for sample in self.samples)
            found = [moved_run(model, sample, self.eps) for sample in self.samples]
            self.moved, self.eps = [moved for moved, _ in found], max(eps for _, eps in found)

    def _make_up(self, model: nn.Module) -> None:
        self.reason = "no example_inputs were given, and the model runs on none that could be made up"
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            candidates = made_up_inputs(model, SIZES)
            while (made := _next(candidates)) is not None:
                inputs = _placed(made.inputs, model)
                try:
                    self.returned = [run(model, inputs)]
                except Exception:  # the model's own code may raise anything on what is but a guess
                    continue
                self.samples, self.origin, self.reason = [inputs], made.origin, ""
                return

    def _floats(self) -> list[Tensor]:
        found = [leaf for one in self.returned for leaf in one.values() if isinstance(leaf, Tensor)]
        return [tensor for tensor in found if tensor.is_floating_point()]

    def _unusable(self) -> str:
        tensors = [(name, leaf) for one in self.returned for name, leaf in one.items() if isinstance(leaf, Tensor)]
        if not any(tensor.numel() for _, tensor in tensors):
            return "the model returns no tensor with elements"
        bad = next((name for name, tensor in tensors if bool(tensor.isnan().any())), None)
        return f"the model itself gives NaN in output {bad!r}" if bad is not None else ""

    @property
    def floor(self) -> float:
        """What is allowed in any case, of the largest value of an output."""
        return self.eps**0.75

    @property
    def ceiling(self) -> float:
        """What is allowed at most."""
        return self.eps**0.5

    def errors(self, model: nn.Module) -> list[OutputError]:
        """Run the result, and return how far each output is from the source's.

        Raises:
            DeployedModelError: The inputs were made up, and lead to a part of the model that was not folded for.
        """
        names = {n for one in self.returned for n, leaf in one.items() if isinstance(leaf, Tensor)}
        outputs = {name: OutputError(name) for one in self.returned for name in one if name in names}
        for index, (sample, expected) in enumerate(zip(self.samples, self.returned, strict=True)):
            found = self._found(model, sample, expected)
            if isinstance(found, str):
                next(iter(outputs.values())).fault = found
                continue
            for name in expected.keys() & names:
                moved = self.moved[index].get(name)
                noise = [(moved, 1.0)] if isinstance(moved, Tensor) else []
                outputs[name].add(expected[name], found[name], noise)
        return list(outputs.values())

    def _found(self, model: nn.Module, sample: Inputs, expected: Leaves) -> Leaves | str:
        """Return what the result returns, or why it does not correspond."""
        try:
            found = run(model, sample)
        except Exception as error:
            if self.origin and isinstance(error, DeployedModelError):
                raise
            return f"the result does not run: {type(error).__name__}: {error}".splitlines()[0]
        if found.keys() != expected.keys():
            return f"the result returns {len(found)} outputs, expected {len(expected)}"
        return found

    def explains(self, error: OutputError, times: float = 1.0) -> bool:
        """Whether rounding explains an error, or one so many times as large, be it ever so large itself."""
        allowed = [K * part.noise + self.floor * part.scale for part in error.parts()]
        within = all(p.unexplained <= times * a for p, a in zip(error.parts(), allowed, strict=True))
        return not error.fault and within

    def comparison(self, errors: Sequence[OutputError]) -> Comparison:
        """Return the verdict on the errors of all outputs."""
        word = str(self.dtype).removeprefix("torch.")
        details = {"judge": word, "dtype": word, "inputs": len(self.samples)}
        return summarize(errors, None, self.floor / FLOOR, ceiling=self.ceiling, **details)

    def verification(self, comparison: Comparison) -> Verification:
        """Return what the report says of a result that passed."""
        allowed = min(K * comparison.reference_error + self.floor, self.ceiling)
        return Verification(True, self.shown, self.origin, comparison.max_rel, allowed, comparison.dtype)

    def unverified(self, reason: str) -> Verification:
        """Return what the report says of a result that could not be judged."""
        return Verification(False, self.shown, self.origin, reason=reason)


def _next(candidates: Any) -> Any:
    """Return the next guess; None after the last, or where the model does not even say what it takes."""
    try:
        return next(candidates, None)
    except Exception:  # a property of the user's, or a forward without a signature
        return None


def _placed(inputs: Inputs, model: nn.Module) -> Inputs:
    """Return made-up inputs where the model is, floating-point ones in its precision."""
    dtype = rerun.main_dtype(model)
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    device = tensor.device if tensor is not None else None
    return map_tensors(inputs, lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))
