"""Statistics of stored-statistics norms from data: pooled re-estimation, alpha-BN fixed for good, and AdaBN.

Over the tokens S of all batches of all processes, per channel, with the stored ``mu_hat, var_hat``:

    mu = E_S[x];   var = E_S[x^2] - mu^2                                        (not the mean of the batches' variances)
    mu_hat <- (1 - w) mu_hat + w mu;   var_hat <- (1 - w) var_hat + w var       w = 1: re-estimation

``order="parallel"``: each norm reads what the present statistics of the norms before it make; one pass over the data.
``"sequential"``: what the new statistics of those before it make; one partial pass for each norm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from normfuse.calibration import Batch, Batches, Calibration, Enough, Listener, PaddingMask, listen
from normfuse.capture import unwrap
from normfuse.layers import change_of_class
from normfuse.norm_forms import as_tokens
from normfuse.order import Step, require
from normfuse.progress import tracked
from normfuse.statistics import stored
from normfuse.statistics.moments import ChannelMoments, gather
from normfuse.structure import restored_on_error

if TYPE_CHECKING:
    from normfuse.statistics.moments import Group

M = TypeVar("M", bound=nn.Module)
Order = Literal["parallel", "sequential"]
ORDERS: tuple[Order, ...] = ("parallel", "sequential")
_log = logging.getLogger("normfuse")


def reestimate(
    model: M,
    batches: Calibration,
    *,
    weight: float = 1.0,
    order: Order = "parallel",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    add_missing: bool = False,
    padding_mask: PaddingMask | None = None,
    process_group: Group = None,
    progress: bool = True,
) -> M:
    """Set the statistics of BatchNorm and UnifiedNorm to those of data, in place, and return the model.

    The result is that of one pass over all data at once, for any split into batches and processes: it is accumulated in
    float64. Variances are those of the data, not corrected for its size. Gains, shifts and weights stay. Models in Tune
    mode are read as they are outside of it.

    Args:
        model: Any module, in any mode; wrappers such as DDP are looked through.
        batches: A DataLoader, or any iterable that can be read more than once; an item is what the model is called on.
            See :class:`normfuse.calibration.Batches`.
        weight: w, of the statistics of the data; the rest is that of the stored ones. Below 1 this is alpha-BN (arXiv
            2110.04065) with the mixture fixed, which unlike alpha-BN at test time can be folded.
        order: ``"parallel"`` or ``"sequential"``.
        include: Globs of qualified names; only these norms. All, if empty.
        exclude: Globs of qualified names of norms to leave alone.
        add_missing: Give a BatchNorm that keeps no statistics (``track_running_stats=False``) those of the data, so
            that it can be folded; needs ``"sequential"``, and adds keys to the ``state_dict``.
        padding_mask: Returns for an item a bool tensor ``(B, T)``, True at padding, which is in no statistic.
        process_group: ``"world"`` or a process group: each process reads its share of the data, at least one item, and
            all get the same statistics. None: this process alone.
        progress: Show a bar, if standard error is a terminal.

    Raises:
        OrderError: The model is folded, has computed weights, or is being adapted.
        ValueError: No norm stores statistics, there is no data, an argument is none of those named, or a norm reads
            NaN or infinity. The model is then as it was, as after any other error.

    Example:
        >>> normfuse.statistics.reestimate(model, loader)  # doctest: +SKIP
    """
    if order not in ORDERS:
        raise ValueError(f"order is one of {', '.join(ORDERS)}, not {order!r}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is from 0 to 1, not {weight}")
    inner = unwrap(model)
    require(inner, Step.RECALIBRATE)
    with restored_on_error(inner, inner.buffers()), change_of_class.left(inner):
        if add_missing:
            _add_missing(inner, order, include, exclude)
        norms = norms_with_statistics(inner, include, exclude)
        data = Batches(batches, inner, padding_mask)
        if order == "parallel":
            found = observe(inner, norms, tracked(data, "re-estimating", shown=progress), process_group, data.device)
            _require_finite(found)
            for name, moments in found.items():
                if moments.count:
                    stored.assign(norms[name], stored.mixed(norms[name], moments, weight))
            seen = sum(moments.count > 0 for moments in found.values())
        else:

            def new(name: str, norm: nn.Module, moments: ChannelMoments) -> dict[str, Tensor]:
                return stored.mixed(norm, moments, weight)

            seen = in_order(inner, norms, data, new, process_group, progress=progress)
    left = f"; {len(norms) - seen} are not called with one tensor on this data" if seen < len(norms) else ""
    _log.log(logging.WARNING if left else logging.INFO, "re-estimated %d of %d norms%s", seen, len(norms), left)
    return model


def adabn(model: M, batches: Calibration, **options: Any) -> M:
    """Give a model the statistics of a target domain, layer by layer, in place, and return it.

    *Revisiting Batch Normalization For Practical Domain Adaptation*, arXiv 1603.04779: each norm is re-estimated on all
    data of the domain, behind the norms that are adapted already. It is :func:`reestimate` in sequential order, and
    takes its options. For several domains, keep each one's statistics: :func:`normfuse.statistics.snapshot`.
    """
    return reestimate(model, batches, **{"order": "sequential", **options})


def observe(
    model: nn.Module,
    norms: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    group: Group,
    device: torch.device,
    calls: int | None = None,
) -> dict[str, ChannelMoments]:
    """Return the moments of what norms read on data, in a model in eval mode, over all processes of a group.

    Args:
        model: The model.
        norms: By name.
        batches: The data.
        group: As for :func:`reestimate`.
        device: Where the model is.
        calls: Stop the run over a batch after so many calls of the norms; None runs it to its end.
    """
    moments = {name: ChannelMoments(stored.size(norm)) for name, norm in norms.items()}
    count = [0]

    def listener_of(name: str, norm: nn.Module) -> Listener:
        def listener(x: Tensor, _: Tensor, padding: Tensor | None) -> None:
            moments[name].add(as_tokens(x, stored.channel_axis(norm), padding))
            count[0] += 1
            if count[0] == calls:
                raise Enough

        return listener

    def counted() -> Iterable[Batch]:
        for batch in batches:
            count[0] = 0
            yield batch

    listen(model, {norm: listener_of(name, norm) for name, norm in norms.items()}, counted())
    gather(list(moments.values()), group, device)
    return moments


def calls_of(model: nn.Module, norms: Mapping[str, nn.Module], batch: Batch) -> dict[str, int]:
    """Return how often each norm is called on one item, in the order of the first calls; without those that are not."""
    calls: dict[str, int] = {}

    def listener_of(name: str) -> Listener:
        def listener(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return listener

    listen(model, {norm: listener_of(name) for name, norm in norms.items()}, [batch])
    return calls


def in_order(
    model: nn.Module,
    norms: Mapping[str, nn.Module],
    data: Batches,
    new: Callable[[str, nn.Module, ChannelMoments], Mapping[str, Tensor]],
    group: Group = None,
    *,
    progress: bool = False,
) -> int:
    """Give norms new statistics in order of execution, each from what it reads behind those before; return how many.

    Args:
        model: The model.
        norms: By name.
        data: To read.
        new: Returns the statistics of a norm, by the names of its buffers, from its name, itself, and its moments.
        group: As for :func:`reestimate`.
        progress: Show a bar.

    Raises:
        ValueError: A norm reads NaN or infinity; those before it have changed.
    """
    calls = calls_of(model, norms, next(iter(data)))
    for name in tracked(list(calls), "re-estimating", shown=progress):
        found = observe(model, {name: norms[name]}, data, group, data.device, calls[name])
        _require_finite(found)
        stored.assign(norms[name], new(name, norms[name], found[name]))
    return len(calls)


def norms_with_statistics(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Module]:
    """Return the norms that store statistics, those that globs choose, by name.

    Raises:
        ValueError: There is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if stored.stores_statistics(module) and stored.chosen(name, include, exclude)
    }
    if not found:
        raise ValueError("no norm of this model, of those chosen, stores statistics; a folded model has none left")
    return found


def _add_missing(model: nn.Module, order: str, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Give each BatchNorm without statistics some, which change nothing but for the norm itself."""
    if order != "sequential":
        raise ValueError("add_missing needs order='sequential': without statistics a norm depends on the batch")
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        known = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        if known and stored.chosen(name, include, exclude):
            like = next((t for t in (*module.parameters(), *model.parameters())), torch.empty(0))
            values = {"device": like.device, "dtype": like.dtype}
            module.register_buffer("running_mean", torch.zeros(module.num_features, **values))
            module.register_buffer("running_var", torch.ones(module.num_features, **values))
            module.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=like.device))
            module.track_running_stats = True


def _require_finite(found: Mapping[str, ChannelMoments]) -> None:
    for name, moments in found.items():
        if not moments.is_finite:
            raise ValueError(f"{name} reads NaN or infinity on this data")
