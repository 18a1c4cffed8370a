"""Run a random loop on a model in Tune mode and on a plain one in eval mode's norms, and compare all they hold."""

from __future__ import annotations

import copy
import random
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

import normfuse
from tests.gradients import FLOOR
from tests.loops.losses import LOSSES
from tests.loops.networks import Case, random_case
from tests.loops.operations import BREAKING, OPERATIONS
from tests.loops.sides import OPTIMIZERS, Side
from tests.parity import error

T = TypeVar("T")
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a loop went.

    Attributes:
        seed: The seed that it is made from.
        kind: ``right``; ``wrong``: the two models differ; ``crash``: only Tune mode raises; ``refused``: it asks for
            another call of ``tune_mode`` where nothing has been taken apart; ``invalid``: the plain model raises too.
        steps: What was done, in order.
        detail: What differs, or the error.
        pairs: How many norms were applied by a product.
    """

    seed: int
    kind: str
    steps: tuple[str, ...]
    detail: str = ""
    pairs: int = 0


class _Differs(Exception):  # noqa: N818 - a verdict, not an error
    pass


class _Invalid(Exception):  # noqa: N818 - a verdict, not an error
    pass


def run_loop(seed: int) -> Verdict:
    """Return the verdict on one loop."""
    steps: list[str] = []
    pairs = 0
    try:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        case = random_case(draw)
        example = case.inputs(0) if draw.random() < 0.5 else None
        steps.append("tuned " + ("by an example" if example is not None else "by tracing"))
        report = normfuse.inspect(case.model, ["tune-mode"], example_inputs=example)
        pairs = sum(bool(outcome.partners) for outcome in report.norms)
        _run(case, draw, steps, example)
    except _Differs as found:
        return Verdict(seed, "wrong", tuple(steps), str(found), pairs)
    except _Invalid as found:
        return Verdict(seed, "invalid", tuple(steps), str(found), pairs)
    except normfuse.TuneModeError as found:
        return Verdict(seed, "refused", tuple(steps), str(found), pairs)
    except Exception as found:
        where = traceback.extract_tb(found.__traceback__)[-1]
        detail = f"{type(found).__name__}: {found} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        return Verdict(seed, "crash", tuple(steps), detail, pairs)
    return Verdict(seed, "right", tuple(steps), "", pairs)


def _run(case: Case, draw: random.Random, steps: list[str], example: Tensor | None) -> None:
    optimizer = draw.choice(list(OPTIMIZERS))
    steps.append(optimizer)
    tuned = normfuse.tune_mode(copy.deepcopy(case.model), example_inputs=example)
    plain = Side(case.model, case.inputs, optimizer, tuned=False)
    tune = Side(tuned, case.inputs, optimizer, tuned=True)
    for _ in range(draw.randint(3, 8)):
        if draw.random() < 0.75:
            operation = draw.choice(OPERATIONS)
            steps.append(operation.__name__.replace("_", " "))
            _both(plain, tune, operation, draw.randrange(10**9), breaks=operation in BREAKING)
        _step(plain, tune, draw, steps)


def _step(plain: Side, tune: Side, draw: random.Random, steps: list[str]) -> None:
    """Train both on a batch, and compare all that they hold and their outputs."""
    name = draw.choice(list(LOSSES)) if draw.random() < 0.5 else "plain"
    clip, seed = draw.choice((None, None, 1.0)), draw.randrange(10**6)
    steps.append(f"step: {name}{', clipped' if clip else ''}")
    x = plain.inputs(seed)
    _both(plain, tune, lambda side, _: side.step(x, seed, LOSSES[name], clip), 0)
    _compare(plain.state(), tune.state())
    _compare({"outputs": _evaluated(plain, x)}, {"outputs": _evaluated(tune, x)})
    _compare_seen(plain, tune)


def _both(
    plain: Side, tune: Side, call: Callable[[Side, random.Random], Tensor | None], seed: int, *, breaks: bool = False
) -> None:
    """Do the same to both sides, and compare what it returns."""
    try:
        expected = call(plain, random.Random(seed))
        plain.settle()
    except Exception as found:
        raise _Invalid(f"{type(found).__name__}: {found}") from found
    found = call(tune, random.Random(seed))
    _compare(*({} if value is None else {"returned": value} for value in (expected, found)))
    _compare_seen(plain, tune)
    if breaks:
        _follow_advice(tune)
    tune.settle()


def _compare_seen(plain: Side, tune: Side) -> None:
    """Compare what hooks have seen."""
    _compare(*({f"seen {i}": t for i, t in enumerate(side.seen)} for side in (plain, tune)))
    plain.seen.clear()
    tune.seen.clear()


def _follow_advice(tune: Side) -> None:
    """Call ``tune_mode`` again where the model says so; the call that asks leaves no trace."""
    state = {name: tensor.clone() for name, tensor in tune.model.state_dict().items()}
    try:
        _evaluated(tune, tune.inputs(1))
    except normfuse.TuneModeError as found:
        if "call tune_mode again" not in str(found):
            raise
        normfuse.tune_mode(tune.model)
    tune.model.load_state_dict(state)
    tune.seen.clear()


def _evaluated(side: Side, x: Tensor) -> Tensor:
    with torch.no_grad():
        return side.values(x, 0)


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    if expected.keys() != found.keys():
        raise _Differs(f"names: {sorted(expected.keys() ^ found.keys())}")
    largest = max((float(t.abs().max()) for t in expected.values() if t.is_floating_point()), default=0.0)
    if not all(bool(t.isfinite().all()) for t in expected.values()):
        raise _Invalid("not finite")
    for name, one in expected.items():
        small = one.numel() > 0 and float(one.abs().max()) < FLOOR * largest
        apart = float((one - found[name]).abs().max()) / (FLOOR * largest) if small else error(one, found[name])
        if apart > TOLERANCE:
            raise _Differs(f"{name} by {apart:.3g}")
