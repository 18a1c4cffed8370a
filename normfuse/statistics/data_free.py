"""Data-free quantization: inputs made from a network alone, ranges of its activations, and BatchNorm that follows.

A *reconstruction* of arXiv 2204.04215 (accurate activation clipping, AAC, and adaptive BatchNorm, ABN), whose losses
and update were not obtained. What is established of the paper: the range of an activation after ReLU is ``[0, u]`` with
u the peak on synthetic inputs; inputs matched to the statistics of BatchNorms underestimate it, so AAC makes inputs to
which the full-precision network responds strongly; ABN updates BatchNorms to what quantized convolutions write. Here:

    AAC:  x* = argmax over x of the logit z_k(x), for each class k, by Adam in a box;    u = max over x* of an output
    ABN:  x0 = argmin over x of the sum over BatchNorms of MSE(E[x_l], mu_l) + MSE(std[x_l], sigma_l)
          in order, behind quantized layers:  mu_l <- (1 - w) mu_l + w E[x_l];  var_l likewise    (w = 1: re-estimation)

Run ABN before folding, fold, then quantize the folded weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.calibration import Batches, Calibration
from normfuse.capture import unwrap
from normfuse.capture.modes import eval_mode
from normfuse.order import Step, require
from normfuse.progress import tracked
from normfuse.statistics import stored
from normfuse.statistics.adapting import moments_of
from normfuse.statistics.moments import ChannelMoments
from normfuse.statistics.reestimation import in_order, norms_with_statistics, observe
from normfuse.statistics.simulated import simulated_integers
from normfuse.statistics.stored import batch_norms
from normfuse.structure import restored_on_error

M = TypeVar("M", bound=nn.Module)
RECTIFIED = (nn.ReLU, nn.ReLU6)
"""Activations whose outputs are from 0 on."""


def peak_inputs(
    model: nn.Module,
    shape: Sequence[int],
    *,
    classes: Iterable[int] | None = None,
    steps: int = 100,
    lr: float = 0.1,
    bounds: tuple[float, float] = (-3.0, 3.0),
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Return inputs to which a classifier responds strongly, one for each class: ``(classes, *shape)``.

    The logit itself is driven up; a cross-entropy would saturate.

    Args:
        model: Returns logits ``(N, classes)``; run in eval mode, not changed.
        shape: Of one input, without the batch.
        classes: Which; all, if None.
        steps: Of Adam.
        lr: Of Adam.
        bounds: Lowest and highest value of an input; those of normalized pictures by default.
        seed: Of the start.
        progress: Show a bar, if standard error is a terminal.
    """
    inner = unwrap(model)
    x = _noise(inner, (1, *shape), seed)
    with torch.no_grad(), eval_mode(inner):
        count = inner(x).shape[1]
    wanted = torch.tensor(list(range(count) if classes is None else classes), device=x.device)
    x = _noise(inner, (len(wanted), *shape), seed)

    def loss(inputs: Tensor) -> Tensor:
        return -inner(inputs).gather(1, wanted[:, None]).sum()

    return _optimized(inner, x, loss, steps, lr, bounds, progress)


def matched_inputs(
    model: nn.Module,
    shape: Sequence[int],
    count: int = 32,
    *,
    steps: int = 200,
    lr: float = 0.1,
    bounds: tuple[float, float] = (-3.0, 3.0),
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Return inputs on which BatchNorms read what their stored statistics say: ``(count, *shape)``.

    Args:
        model: Has BatchNorms with stored statistics; run in eval mode, not changed.
        shape: Of one input, without the batch.
        count: How many.
        steps: As for :func:`peak_inputs`, like the arguments that follow.
        lr: As above.
        bounds: As above.
        seed: As above.
        progress: As above.

    Raises:
        ValueError: There is no such norm.
    """
    inner = unwrap(model)
    norms = batch_norms(inner)
    if not norms:
        raise ValueError("no BatchNorm of this model stores statistics to match; a folded model has none left")
    terms: list[Tensor] = []

    def hook(norm: Any, args: tuple[Any, ...]) -> None:
        mean, variance = moments_of(args[0])
        found, wanted = (v.to(mean.dtype).add(norm.eps).sqrt() for v in (variance, norm.running_var))
        terms.append(F.mse_loss(mean, norm.running_mean.to(mean.dtype)) + F.mse_loss(found, wanted))

    def loss(inputs: Tensor) -> Tensor:
        terms.clear()
        inner(inputs)
        return torch.stack(terms).sum()

    handles = [norm.register_forward_pre_hook(hook) for norm in norms.values()]
    try:
        return _optimized(inner, _noise(inner, (count, *shape), seed), loss, steps, lr, bounds, progress)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def peak_activations(
    model: nn.Module, inputs: Tensor, *, kinds: tuple[type[nn.Module], ...] = RECTIFIED
) -> dict[str, float]:
    """Return the largest output of each activation module on some inputs, by name; without those that are not called.

    A module that is called at several places has one peak for all of them.

    Args:
        model: Run in eval mode.
        inputs: A batch.
        kinds: Which modules.
    """
    inner = unwrap(model)
    peaks: dict[str, float] = {}
    names = {module: name for name, module in inner.named_modules() if isinstance(module, kinds)}

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        peaks[names[module]] = max(peaks.get(names[module], 0.0), float(output.max()))

    handles = [module.register_forward_hook(hook) for module in names]
    try:
        with eval_mode(inner):
            inner(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return peaks


def adaptive_batch_norm(
    model: M,
    batches: Calibration,
    *,
    weight: float = 1.0,
    relative: bool = False,
    weight_bits: int = 8,
    activation_bits: int = 8,
    per_channel: bool = True,
    peaks: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: bool = True,
) -> M:
    """Give BatchNorms the statistics of what rounded layers write, norm by norm in order, in place; return the model.

    The weights stay as they are: fold the model and quantize it. Scales per channel commute with the fold, so that the
    folded weights round as the simulated ones; a scale per weight does not.

    Args:
        model: Any module with BatchNorms.
        batches: One batch of :func:`matched_inputs`, or real data. Data that is not of the domain the statistics were
            learned on moves them to its own, unless ``relative``.
        weight: w.
        relative: Move the stored statistics by the change that rounding makes, ``mu + w (E[x_q] - E[x])`` and
            ``var (1 - w + w Var[x_q] / Var[x])``, and not to those of the data.
        weight_bits: As for :func:`normfuse.statistics.simulated_integers`, like the three that follow.
        activation_bits: As above.
        per_channel: As above.
        peaks: As above; activations that are not named are not rounded.
        include: As for :func:`normfuse.statistics.reestimate`.
        exclude: As above.
        progress: As above.

    Raises:
        OrderError: The model is folded, or has computed weights.
        ValueError: As for :func:`normfuse.statistics.reestimate`.
    """
    inner = unwrap(model)
    require(inner, Step.RECALIBRATE)
    norms = norms_with_statistics(inner, include, exclude)
    data = Batches(batches, inner)
    plain = observe(inner, norms, data, None, data.device) if relative else {}

    def new(name: str, norm: nn.Module, moments: ChannelMoments) -> dict[str, Tensor]:
        return _changed(norm, plain[name], moments, weight) if relative else stored.mixed(norm, moments, weight)

    rounding = {"weight_bits": weight_bits, "activation_bits": activation_bits, "per_channel": per_channel}
    with restored_on_error(inner, inner.buffers()), simulated_integers(inner, peaks=peaks, **rounding):
        in_order(inner, norms, data, new, progress=progress)
    return model


def _changed(norm: nn.Module, plain: ChannelMoments, rounded: ChannelMoments, weight: float) -> dict[str, Tensor]:
    """Return the stored statistics, moved as rounding moves those of the data: means by a sum, others by a factor."""
    old, new = stored.measured(norm, plain), stored.measured(norm, rounded)
    values: dict[str, Tensor] = {}
    for key in new:
        held = getattr(norm, key).detach().double().cpu()
        ratio = torch.where(old[key] > 0, new[key] / old[key], 1.0)
        moved = held + new[key] - old[key] if key == "running_mean" else held * ratio
        values[key] = (1 - weight) * held + weight * moved
    return values


def _noise(model: nn.Module, shape: Sequence[int], seed: int) -> Tensor:
    like = next(p for p in model.parameters() if p.is_floating_point())
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.to(like)


def _optimized(
    model: nn.Module, x: Tensor, loss: Any, steps: int, lr: float, bounds: tuple[float, float], progress: bool
) -> Tensor:
    """Return ``x`` after steps of Adam, kept between the bounds; the parameters get no gradients."""
    x = x.clamp(*bounds).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    with torch.enable_grad(), eval_mode(model):
        for _ in tracked(range(steps), "making inputs", shown=progress):
            (x.grad,) = torch.autograd.grad(loss(x), [x])
            optimizer.step()
            with torch.no_grad():
                x.clamp_(*bounds)
    return x.detach()
