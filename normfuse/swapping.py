"""Swap the norms of a model for norms that fold, or that run in integers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from normfuse import api, surgery
from normfuse.calibration import Batches, Calibration, PaddingMask
from normfuse.capture import unwrap
from normfuse.norm_swap import NormSwap, Order
from normfuse.passes import PASSES
from normfuse.pipeline import Result
from normfuse.progress import tracked
from normfuse.reconstruction import reconstruct as fit_blocks
from normfuse.structure import restored_on_error

M = TypeVar("M", bound=nn.Module)
Target = Literal["unified", "l1"]
TARGETS: dict[str, str] = {"unified": "swap-unified", "l1": "swap-l1"}
"""The pass behind each value of ``to``: a :class:`normfuse.norm_swap.NormSwap`."""


def swap_norms(
    model: M,
    to: Target = "unified",
    calibration: Calibration | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    inplace: bool = False,
    reconstruct: int | Mapping[str, Any] | None = None,
    order: Order | None = None,
    padding_mask: PaddingMask | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> M:
    """Return the model with its norms replaced by norms of another kind, fitted to data.

    The result is *not* the same function. To ``"unified"``: each LayerNorm and RMSNorm becomes the best fixed map per
    channel of what it computed on the data, which :func:`normfuse.fold` takes into weights. To ``"l1"``: they divide by
    the mean absolute deviation, gain and shift fitted to the data, and so does each BatchNorm, which stays the same
    function in eval mode. ``reconstruct``, or fine-tuning with labels, wins back most of the rest.

    LayerNorm and RMSNorm of any class are found by their attributes and checked against their formulas on the data. A
    layer that is called at several places stays one layer, fitted to all calls. For the report, run the pass:
    ``normfuse.apply(model, [SwapUnified(data)], example_inputs=...)`` (:mod:`normfuse.passes.swap_unified`), or
    ``SwapL1`` (:mod:`normfuse.passes.swap_l1`).

    Args:
        model: Any module; it is not changed unless ``inplace``.
        to: The norm: ``"unified"`` for :class:`normfuse.layers.UnifiedNorm` (arXiv 2208.01313), ``"l1"`` for
            :class:`normfuse.layers.L1LayerNorm`, ``L1RMSNorm`` and ``L1BatchNorm`` (arXiv 1802.09769, 2411.10948).
        calibration: A DataLoader, or any iterable that can be read more than once. Each item is what the model is
            called on: a tensor, a tuple of positional arguments or a mapping of keyword arguments; of a *list*, which
            a DataLoader makes of ``(input, label)`` pairs, the first element. Some hundred samples do.
        include: Globs of qualified names; only these norms are swapped. All, if empty.
        exclude: Globs of qualified names of norms to leave alone.
        inplace: Edit ``model`` itself.
        reconstruct: Steps of :func:`normfuse.reconstruct` per block, or a mapping of its arguments. None: no fit.
        order: ``"parallel"`` fits every norm to the unchanged network, in one pass over the data; ``"sequential"``
            each behind those that are swapped already, in two partial passes for each norm. By default what suits the
            norm: ``"parallel"`` for ``"unified"``, ``"sequential"`` for ``"l1"``.
        padding_mask: Returns for an item of the data a bool tensor ``(B, T)``, True at padding. By default the
            ``attention_mask`` of a mapping is read. Padding is in no moment.
        options: Further arguments of the new norms, such as ``{"warmup_steps": 100}``; ``eps`` and ``gaussian`` of L1
            norms.
        seed: Of the order of data, where a loader or the reconstruction shuffles.
        progress: Show a bar, if standard error is a terminal.

    Returns:
        A model of the same class in eval mode, which may train. The step count of each new UnifiedNorm is 0, as
        :meth:`normfuse.layers.UnifiedNorm.reset_step` would set it.

    Raises:
        ValueError: There is no such norm, or no data.
        CaptureError: The model does not run on the data.

    Example:
        >>> swapped = normfuse.swap_norms(vit, "unified", loader, exclude=["head*"])  # doctest: +SKIP
    """
    original = surgery.copy(unwrap(model)) if reconstruct and inplace else unwrap(model)
    one = swap_pass(to, calibration, order=order, padding_mask=padding_mask, options=options, progress=progress)
    tensors = (*unwrap(model).parameters(), *unwrap(model).buffers())
    written = tensors if reconstruct else ()  # a fit trains them in place
    with restored_on_error(unwrap(model), written) if inplace else contextlib.nullcontext():
        swapped = run_swap(model, one, include=include, exclude=exclude, inplace=inplace, seed=seed).model
        if reconstruct:
            arguments = {"steps": reconstruct} if isinstance(reconstruct, int) else dict(reconstruct)
            arguments = {"seed": seed, "progress": progress, "padding_mask": padding_mask, **arguments}
            fit_blocks(original, swapped, calibration, **arguments)
    return swapped


def swap_pass(
    to: str, calibration: Calibration | None, *, progress: bool = False, what: str = "calibrating", **arguments: Any
) -> NormSwap:
    """Return the pass of a target; arguments and errors as for :func:`swap_norms`."""
    if to not in TARGETS:
        raise ValueError(f"norms are swapped to {', '.join(TARGETS)}, not to {to!r}")
    given = {name: value for name, value in arguments.items() if value is not None}
    one = PASSES[TARGETS[to]](calibration, **given)  # type: ignore[call-arg]
    assert isinstance(one, NormSwap)
    one.track = lambda batches: tracked(batches, what, shown=progress)
    return one


def run_swap(
    model: M, one: NormSwap, *, include: Sequence[str] = (), exclude: Sequence[str] = (), inplace: bool, seed: int = 0
) -> Result[M]:
    """Run a swapping pass on a model, read on the first item of its data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = Batches(one.calibration, unwrap(model), one.padding_mask).first()
        return api.apply(model, [one], example_inputs=first, include=include, exclude=exclude, inplace=inplace)
