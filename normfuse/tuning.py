"""Tune mode for a whole model.

Tune mode trains what eval mode trains, with eval mode's gradients, at the cost of the folded model (arXiv 2305.11624):
see :mod:`normfuse.passes.tune_mode`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from normfuse.base import Reason
from normfuse.capture import understood, unwrap
from normfuse.errors import CaptureError
from normfuse.examples import Examples, Inputs
from normfuse.graph import is_uninitialized
from normfuse.layers.change_of_class import enter, leave_all, restore, tuned_layers
from normfuse.layers.tuned import FixedNorm
from normfuse.passes.tune_mode import TuneMode
from normfuse.pipeline import Selection, run
from normfuse.structure import restored_on_error

M = TypeVar("M", bound=nn.Module)
_log = logging.getLogger("normfuse")


def tune_mode(
    model: M,
    mode: bool = True,
    *,
    example_inputs: Inputs | Examples | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> M:
    """Put a model into Tune mode, in place, or take it out of it; call it before fine-tuning.

    Every BatchNorm works by its stored statistics from now on, whatever ``train()`` says, and those that normalize the
    output of a convolution or linear layer are applied by that layer, in its weight. Outputs and gradients are those of
    eval mode, memory is that of the folded model, and time lies between the two. Dropout and everything else follow
    ``train()``.

    The layers change their class, to a subclass. Objects, parameters, buffers, ``state_dict`` keys and order stay, so
    an optimizer may exist before, and checkpoints fit with and without.

    Args:
        model: Any module; wrappers such as DDP are looked through. A model already in Tune mode is read afresh.
        mode: False restores every class; what was learned stays.
        example_inputs: Not needed where the model can be traced; as for :func:`normfuse.fold`.
        include: Globs of qualified names; only these norms are touched. All, if empty.
        exclude: Globs of qualified names of norms and layers to leave alone, such as those of a new head.

    Returns:
        The same model. What was done is logged, as a warning where no norm was paired with a layer; for the report, use
        ``normfuse.inspect(model, ["tune-mode"])`` or ``normfuse.apply(model, ["tune-mode"], inplace=True)``.

    Raises:
        CaptureError: The model does not run on the example inputs.

    Example:
        >>> model = normfuse.tune_mode(model).train()  # doctest: +SKIP
    """
    inner = unwrap(model)
    if not mode:
        leave_all(inner)
        return model
    selection = Selection(tuple(include), tuple(exclude))
    example_inputs = understood(inner, example_inputs)
    try:
        report = run(inner, [TuneMode()], example_inputs=example_inputs, selection=selection, inplace=True).report
    except CaptureError as error:
        if example_inputs is not None:
            raise
        with restored_on_error(inner):
            leave_all(inner)
            _fix_all(inner, selection)
        _log.warning("Tune mode only fixes the statistics of this model's norms: %s", error)
        return model
    paired = any(outcome.partners for outcome in report.norms)
    _log.log(logging.INFO if paired or not report.norms else logging.WARNING, report.summary())
    for note in report.notes:
        _log.info(note)
    for outcome in report.refused:
        if outcome.refusal is not None and outcome.refusal.reason is Reason.BATCH_STATISTICS:
            _log.warning("%s is not in Tune mode: %s", outcome.subject, outcome.refusal)
    return model


@contextlib.contextmanager
def tuned(model: M, **options: Any) -> Iterator[M]:
    """Run a block with ``model`` in Tune mode; takes the options of :func:`tune_mode`. Yields the model.

    Afterwards it is as it was before: a model that was in Tune mode already is in it still, with the same layers.
    """
    before = tuned_layers(unwrap(model))
    tune_mode(model, **options)
    try:
        yield model
    finally:
        tune_mode(model, False)
        restore(before)


def _fix_all(model: nn.Module, selection: Selection) -> None:
    """Fix the statistics of every norm that has some, in a model of which no part can be read."""
    for name, module in model.named_modules():
        known = isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
        if known and not is_uninitialized(module) and not selection.refuses(name):
            enter(module, FixedNorm)
