"""The order in which a model is worked on, and what a model shows of the steps it is past.

    materialize  ->  recalibrate or adapt  ->  tune  ->  fold  ->  quantize  ->  export

Each step reads what the next one removes. Recalibration sets the statistics of norms, which folding puts into weights:
statistics that move afterwards move nothing. Tune mode fixes them. Quantization rounds the weights that folding scales.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Sequence

from torch import nn

from normfuse import computed, deploy
from normfuse.errors import OrderError

ADAPTING = "_normfuse_adapting"
"""The attribute of a norm whose statistics follow the data it sees (:mod:`normfuse.statistics.adapting`)."""


class Step(enum.IntEnum):
    """The steps, in order."""

    MATERIALIZE = 0
    RECALIBRATE = 1
    TUNE = 2
    FOLD = 3
    QUANTIZE = 4
    EXPORT = 5


STEP_OF_PASS = {
    "materialize": Step.MATERIALIZE,
    "recalibrate": Step.RECALIBRATE,
    "prune-constant": Step.RECALIBRATE,
    "tune-mode": Step.TUNE,
    "fold-bn": Step.FOLD,
    "merge-branches": Step.FOLD,
    "fold-affine": Step.FOLD,
    "quantize": Step.QUANTIZE,
}
"""The step that a pass belongs to; the others may run at any place."""

_VERBS = {
    Step.MATERIALIZE: "materialize",
    Step.RECALIBRATE: "recalibrate",
    Step.TUNE: "tune",
    Step.FOLD: "fold",
    Step.QUANTIZE: "quantize",
    Step.EXPORT: "export",
}


def require(model: nn.Module, step: Step, *, planned: Collection[Step] = ()) -> None:
    """Raise unless a model is ready for a step: nothing later was done to it, and nothing earlier is left to do.

    Args:
        model: Any module.
        step: What is to be done.
        planned: Earlier steps that are about to be done before it.

    Raises:
        OrderError: It is not; the text names the step that must come first.
    """
    for later, is_past in _PAST.items():
        undone = step is Step.RECALIBRATE or (step is Step.FOLD and _foldable(model))
        if undone and later > step and is_past(model):
            here, there = _VERBS[step], _VERBS[later]
            raise OrderError(
                f"{here} before you {there}: this model is {_PARTICIPLES[later]} already; {here} the model that it was "
                f"made from, then {there} that"
            )
    for earlier, left in _LEFT.items():
        if earlier < step and earlier not in planned and (problem := left(model, step)):
            raise OrderError(f"{_VERBS[earlier]} before you {_VERBS[step]}: {problem}")


def require_sequence(names: Sequence[str]) -> None:
    """Raise if passes are named in an order in which one would undo, or miss, what another does.

    Raises:
        OrderError: A pass comes after one of a later step.
    """
    last: tuple[Step, str] | None = None
    for name in names:
        step = STEP_OF_PASS.get(name)
        if step is None:
            continue
        if last is not None and Step.RECALIBRATE in (step, last[0]) and step < last[0]:
            raise OrderError(f"{name} must come before {last[1]}: {' -> '.join(_VERBS[s] for s in Step)} is the order")
        last = max(last, (step, name)) if last is not None else (step, name)


def require_for_passes(model: nn.Module, names: Sequence[str]) -> None:
    """Raise unless passes are in order, and a model is ready for each of them.

    Raises:
        OrderError: As for :func:`require` and :func:`require_sequence`.
    """
    require_sequence(names)
    steps = dict.fromkeys(STEP_OF_PASS[name] for name in names if name in STEP_OF_PASS)
    for step in steps:
        require(model, step, planned={Step.MATERIALIZE} & set(steps))


# what a model shows


def is_folded(model: nn.Module) -> bool:
    """Whether a pass that folds has changed the model, or a part of it."""
    return _has_applied(model, Step.FOLD)


def is_quantized(model: nn.Module) -> bool:
    """Whether the model, or a part of it, has layers with integer weights, of normfuse or of torch."""
    return _has_applied(model, Step.QUANTIZE) or any(".quantized" in type(m).__module__ for m in model.modules())


def _has_applied(model: nn.Module, step: Step) -> bool:
    pairs = [pair for module in model.modules() for pair in (deploy.manifest_of(module) or {}).get("pairs", ())]
    return any(STEP_OF_PASS.get(pair["pass"]) is step and pair["action"] == "applied" for pair in pairs)


def is_adapting(module: nn.Module) -> bool:
    """Whether one norm has statistics that follow the data it sees."""
    return ADAPTING in vars(module)


def _computed_weights(model: nn.Module, step: Step) -> str:
    if step is not Step.RECALIBRATE:
        return ""  # folding materializes by itself, or refuses the layer with its reason
    for name, module in model.named_modules():
        for tensor, maker in computed.makers(module).items():
            return f"{name}.{tensor} is computed by {maker}; normfuse.apply(model, ['materialize']) makes it plain"
    return ""


def _adaptation(model: nn.Module, step: Step) -> str:
    found = [name for name, module in model.named_modules() if is_adapting(module)]
    return (
        f"the statistics of {found[0]} still follow the data; normfuse.statistics.freeze(model) fixes them as they "
        "are, normfuse.statistics.leave(model) as they were"
        if found
        else ""
    )


def _foldable(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


_PAST: dict[Step, Callable[[nn.Module], bool]] = {Step.FOLD: is_folded, Step.QUANTIZE: is_quantized}
_PARTICIPLES = {Step.FOLD: "folded", Step.QUANTIZE: "quantized"}
_LEFT: dict[Step, Callable[[nn.Module, Step], str]] = {
    Step.MATERIALIZE: _computed_weights,
    Step.RECALIBRATE: _adaptation,
}
