"""Fit a model whose norms were swapped to the original, on unlabelled data: block by block, then end to end.

    block i:     min over its parameters of  E |f_i'(x') - f_i(x)|^2 / Var(f_i(x))
    end to end:  the same of the outputs of the networks, over all parameters

with x' what the block reads in the swapped network and x in the original one, so that a block also takes back the
errors of those before it. Layer-wise fits on few samples are known from quantization (*Up or Down? Adaptive Rounding
for Post-Training Quantization*, arXiv 2004.10568; BRECQ, arXiv 2102.05426); their use for swapped norms is a
construction of ours, not a published method. Norms stay in eval mode: gain and shift are trained, statistics not. Every
choice follows from the seed, so an interrupted fit that goes on from its checkpoint ends where it would have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normfuse.atomic_files import staged
from normfuse.blocks import distance, find_blocks, float_pairs, outputs_of
from normfuse.calibration import Batch, Batches, Calibration, Moments, PaddingMask, listen, module_path
from normfuse.capture import eval_mode, unwrap
from normfuse.layers.second_moment import SecondMomentNorm
from normfuse.norm_forms import as_tokens
from normfuse.progress import tracked
from normfuse.unpickle import unpickle

M = TypeVar("M", bound=nn.Module)
_SAVE_EVERY = 50  # steps


def reconstruct(
    original: nn.Module,
    swapped: M,
    calibration: Calibration | None,
    *,
    steps: int = 200,
    lr: float = 3e-4,
    blocks: Sequence[str] | None = None,
    end_to_end: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    padding_mask: PaddingMask | None = None,
    progress: bool = True,
) -> M:
    """Fit a swapped model to the original one on data without labels, in place, and return it.

    Args:
        original: The model before the swap; not changed.
        swapped: Its copy with swapped norms, in float32 or wider. The parameters that require gradients are trained.
        calibration: As for :func:`normfuse.swap_norms`; the items are kept in a list.
        steps: Of Adam for each block, each on one item of the data; 0 leaves the blocks out.
        lr: Learning rate at the first step; it falls to 0 along a cosine.
        blocks: Globs of the qualified names of the blocks. By default the innermost children of a ``ModuleList`` or
            ``Sequential`` that hold a swapped norm.
        end_to_end: Steps on the outputs of the whole network afterwards; as many as ``steps`` by default.
        seed: Of the order of the items.
        checkpoint: A file that is written as the fit goes on, and that an interrupted fit goes on from.
        padding_mask: As for :func:`normfuse.swap_norms`; padding counts in no error.
        progress: Show a bar, if standard error is a terminal.

    Raises:
        ValueError: There is no data or no swapped norm, no block of such a name, the model is in half precision, or the
            checkpoint is of another fit.
    """
    source, work = unwrap(original), unwrap(swapped)
    names = find_blocks(source, work, blocks)
    batches = Batches(calibration, work, padding_mask)
    if batches.dtype in (torch.float16, torch.bfloat16):
        raise ValueError("a half-precision model cannot be fitted in small steps: use model.float(), and half() after")
    items = list(batches.items)
    if not items or steps < 0 or (end_to_end or 0) < 0:
        raise ValueError("give data, and a number of steps that is not negative")
    stages = [_Stage(name, steps) for name in names] if steps else []
    last = steps if end_to_end is None else end_to_end
    stages += [_Stage("", last)] if last else []
    plan = {"stages": [[s.name, s.steps] for s in stages], "lr": lr, "seed": seed, "items": len(items)}
    fit = _Fit(source, work, batches, items, lr, seed, progress, _Checkpoint(checkpoint, json.dumps(plan)))
    with eval_mode(source), eval_mode(work), module_path(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit.run(stages)
        _renew_statistics(work, [batches.batch(item) for item in items])
    return swapped


@dataclass(frozen=True, slots=True)
class _Stage:
    """One fit: of a block, or of the whole network (``""``)."""

    name: str
    steps: int


@dataclass(slots=True)
class _Checkpoint:
    """The file that a fit is written to; nothing happens where there is none."""

    path: str | Path | None
    plan: str
    state: dict[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        if self.path is None or not Path(self.path).exists():
            return
        state = unpickle(self.path)
        if not isinstance(state, dict) or state.get("plan") != self.plan:
            raise ValueError(f"{self.path} is the checkpoint of another fit: remove it, or name another file")
        self.state = state

    def save(self, **state: Any) -> None:
        if self.path is None:
            return
        with staged(self.path) as temporary:
            torch.save({"plan": self.plan, **state}, temporary)


@dataclass(slots=True)
class _Fit:
    """The two networks and the data; see :func:`reconstruct` for the arguments."""

    original: nn.Module
    swapped: nn.Module
    batches: Batches
    items: list[Any]
    lr: float
    seed: int
    progress: bool
    checkpoint: _Checkpoint

    def run(self, stages: list[_Stage]) -> None:
        """Carry out the stages, from where the checkpoint stands."""
        self.checkpoint.load()
        saved = self.checkpoint.state
        if saved:
            self.swapped.load_state_dict(saved["model"])
        for index in range(saved.get("stage", 0), len(stages)):
            self._stage(index, stages[index], saved if saved.get("step") and saved["stage"] == index else {})
            self.checkpoint.save(stage=index + 1, step=0, model=self.swapped.state_dict())

    def _stage(self, index: int, stage: _Stage, saved: Mapping[str, Any]) -> None:
        block = self.swapped.get_submodule(stage.name)
        parameters = [p for p in block.parameters() if p.requires_grad]
        if not parameters:
            return
        calls = self._count_calls(stage.name)
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        before = saved["before"] if saved else [p.detach().clone() for p in parameters]
        error = saved["error"] if saved else self._error(stage.name, calls)
        if saved:
            optimizer.load_state_dict(saved["optimizer"])
        first = int(saved.get("step", 0))
        what = f"fitting {stage.name or 'end to end'}"
        for step in tracked(range(first, stage.steps), what, shown=self.progress, done=first):
            if step % _SAVE_EVERY == 0 and step > first:
                kept = {"before": before, "error": error, "optimizer": optimizer.state_dict()}
                self.checkpoint.save(stage=index, step=step, model=self.swapped.state_dict(), **kept)
            optimizer.param_groups[0]["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
            loss = self._loss(stage.name, self._batch(index, step), calls, grad=True)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        if not self._error(stage.name, calls) <= error:  # also where it is no number any more
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)

    def _batch(self, stage: int, step: int) -> Batch:
        """Return the item of a step: every epoch of a stage has an order of its own, which the seed decides."""
        epoch, place = divmod(step, len(self.items))
        generator = torch.Generator().manual_seed(hash((self.seed, stage, epoch)) & 0x7FFFFFFF)
        return self.batches.batch(self.items[int(torch.randperm(len(self.items), generator=generator)[place])])

    def _error(self, name: str, calls: int) -> float:
        batches = [self.batches.batch(item) for item in self.items]
        return sum(float(self._loss(name, batch, calls, grad=False)) for batch in batches) / len(batches)

    def _count_calls(self, name: str) -> int:
        return len(outputs_of(self.original, name, self.batches.batch(self.items[0]), None, grad=False))

    def _loss(self, name: str, batch: Batch, calls: int, *, grad: bool) -> Tensor:
        wanted = outputs_of(self.original, name, batch, calls, grad=False)
        found = outputs_of(self.swapped, name, batch, calls, grad=grad)
        pairs = [pair for both in zip(wanted, found, strict=True) for pair in float_pairs(*both)]
        return torch.stack([distance(*pair, batch.padding) for pair in pairs]).mean()


def _renew_statistics(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Set each running second moment to that of what the norm reads now, and the gain so that its map stays."""
    seen = {m: Moments(m.num_features) for m in model.modules() if isinstance(m, SecondMomentNorm)}

    def listener(norm: SecondMomentNorm) -> Any:
        return lambda x, _, padding: seen[norm].add(*[as_tokens(x, norm.dim, padding)] * 2)

    listen(model, {norm: listener(norm) for norm in seen}, batches)
    with torch.no_grad():
        for norm, moments in seen.items():
            if moments.count and moments.is_finite:
                old, new = norm.running_second_moment, moments.second_moment.to(norm.running_second_moment)
                norm.weight.mul_(((new + norm.eps) / (old + norm.eps)).sqrt())
                norm.running_second_moment.copy_(new)
