"""Swap norms that divide by a standard deviation for norms that divide by a mean absolute deviation.

    BatchNorm:           y = gamma (x - mu) / (f s_hat + eps) + beta
                         gamma = gamma_2 (f s_hat + eps) / sqrt(v + eps_2):  the same in eval mode for any s_hat
                         f s_hat + eps = f k sqrt(v + eps_2),  k = s / sigma of the data:  near it in training mode
    LayerNorm, RMSNorm:  y = gamma z + beta,   z = (x - E[x]) / (f s + eps)  or  x / (f s + eps)         (per token)

    copy:           gamma and beta of the old norm, times f sqrt(2/pi): right for Gaussian tokens
    ratio:          gamma times one factor for the layer, beta kept; the factor by least squares
    least squares:  gamma = Cov(y, z) / Var(z),   beta = E[y] - gamma E[z]                             (per channel)

with f = sqrt(pi/2) by default, so that gains stay what they were. L1 BatchNorm is arXiv 1802.09769. For tokens the
conversion is not exact, as the ratio of s to the standard deviation differs from token to token; L1 layers of tokens,
and their fit to trained ones, are a *reconstruction* of arXiv 2411.10948.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normfuse import adapters, norms, surgery
from normfuse.base import Match, Reason, Refusal, Refused
from normfuse.calibration import Batches, Calibration, Listener, Moments, PaddingMask, listen
from normfuse.graph import ModelGraph
from normfuse.layers.l1_batch_norm import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d
from normfuse.layers.mean_deviation import GAUSSIAN_RATIO, ChannelDeviation, deviation_factor
from normfuse.legality import require_replaceable
from normfuse.norm_forms import Form, as_tokens
from normfuse.norm_swap import NormSwap, Order, Swap, layer_of, token_norms
from normfuse.norms import Norm
from normfuse.numerics import exact
from normfuse.scopes import common_tail

Start = Literal["least-squares", "ratio", "copy"]
STARTS: tuple[Start, ...] = ("least-squares", "ratio", "copy")
_RANKS = ((nn.BatchNorm1d, L1BatchNorm1d), (nn.BatchNorm2d, L1BatchNorm2d), (nn.BatchNorm3d, L1BatchNorm3d))
_DEFAULTS = {"eps": 1e-5, "gaussian": True}


class SwapL1(NormSwap):
    """BatchNorm, LayerNorm and RMSNorm into L1 norms; needs calibration data.

    Args:
        calibration: As for :func:`normfuse.swap_norms`.
        order: As for :func:`normfuse.swap_norms`. Errors of norms of tokens add up where it is ``"parallel"``.
        start: Gain and shift of the norms of tokens: ``"least-squares"``, ``"ratio"`` or ``"copy"``.
        padding_mask: As for :func:`normfuse.swap_norms`.
        options: As for :func:`normfuse.swap_norms`: ``eps`` and ``gaussian`` of the new norms.

    Raises:
        ValueError: There is no data, or an argument is none of those named.
    """

    name = "swap-l1"
    starts = STARTS
    family = "an L1 norm"

    def __init__(
        self,
        calibration: Calibration | None = None,
        *,
        order: Order = "sequential",
        start: str = "least-squares",
        padding_mask: PaddingMask | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(calibration, order=order, start=start, padding_mask=padding_mask, options=options)
        if set(self.options) - set(_DEFAULTS):
            raise ValueError(f"options of L1 norms are {', '.join(_DEFAULTS)}, not {', '.join(self.options)}")
        self.options = {**_DEFAULTS, **self.options}
        self._factor = deviation_factor(self.options["gaussian"])
        self._deviations: dict[str, ChannelDeviation] = {}

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every BatchNorm and every norm of a token that the captured run reached."""
        places = {norm.nodes[0]: norm for norm in (*_batch_norms(graph), *token_norms(graph))}
        for node in sorted(places, key=lambda node: graph.order[node]):
            yield Match(places[node].name, places[node].layer, payload=places[node])

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Look at the data, and work out the new norm."""
        norm: Norm = match.payload
        if not _is_batch_norm(norm, graph):
            return super().check(match, graph)
        try:
            return replace(match, payload=self._batch_swap(norm, graph))
        except Refused as refused:
            return refused.refusal

    # norms of tokens

    def normalised(self, form: Form, x: Tensor) -> Tensor:
        """Return the tokens over their mean absolute deviation, or mean magnitude."""
        d = x - x.mean(-1, keepdim=True) if form.kind == "layer" else x
        return d / (self._factor * d.abs().mean(-1, keepdim=True) + self.options["eps"])

    def replacement(self, form: Form, moments: Moments) -> tuple[surgery.Spec, dict[str, Tensor]]:
        """Return an L1LayerNorm or L1RMSNorm with gain and shift of the chosen start."""
        if form.dim != -1:
            raise Refused(Reason.AXIS, f"it normalises axis {form.dim}, and L1 norms of tokens the last one")
        if form.leading is not None:
            raise Refused(Reason.UNSUPPORTED_LAYER, f"it takes its statistics of {form.leading} channels alone")
        shifts = form.kind == "layer" or bool(form.shift.any())
        gain, shift = self._gain_and_shift(form, moments, shifts=shifts)
        if not bool(torch.isfinite(torch.stack([gain, shift])).all()):
            raise Refused(Reason.NONFINITE, "the fitted gain or shift is not finite")
        name = "L1LayerNorm" if form.kind == "layer" else "L1RMSNorm"
        kwargs = {"normalized_shape": [form.size], "bias": shifts, **self.options}
        spec = {"class": f"normfuse.layers.l1_layer_norm.{name}", "kwargs": kwargs}
        return spec, {"weight": gain, "bias": shift} if shifts else {"weight": gain}

    def _gain_and_shift(self, form: Form, moments: Moments, *, shifts: bool) -> tuple[Tensor, Tensor]:
        """Return gain and shift by the formulas of the module; without a shift, of the line through the origin."""
        if self.start == "copy":
            return self._factor * GAUSSIAN_RATIO * form.gain, form.shift
        if self.start == "least-squares" and shifts:
            return moments.line()
        squares = moments.second_moment
        products = moments.cov / moments.count + moments.mean_x * (moments.mean_y - form.shift)
        if self.start == "least-squares":
            return torch.where(squares > 0, products / torch.where(squares > 0, squares, 1.0), 0.0), form.shift
        total = float((form.gain.square() * squares).sum())
        return form.gain * (float((form.gain * products).sum()) / total if total > 0 else 1.0), form.shift

    # BatchNorm

    def further_listeners(self, graph: ModelGraph) -> dict[nn.Module, Listener]:
        """Measure the deviation of the channels of each BatchNorm."""
        names = [norm.module for norm in _batch_norms(graph) if norm.module is not None]
        self._deviations = {name: ChannelDeviation() for name in names}
        return {graph.module(name): _measure(self._deviations[name]) for name in names}

    def _batch_swap(self, norm: Norm, graph: ModelGraph) -> Swap:
        path = layer_of(norm)
        require_replaceable(path, graph)
        module = graph.module(path)
        if adapters.is_known(module):
            text = f"{norm.name} ({norm.layer}) is a fixed map that no training changes"
            raise Refused(Reason.UNSUPPORTED_LAYER, text, "fold it")
        for node in norm.nodes:
            norms.source(norm, node, graph)  # raises where it has no fixed map
        kind = next((new for old, new in _RANKS if isinstance(module, old)), None)
        if kind is None:
            text = f"{norm.name} ({norm.layer}) takes statistics over processes, which no L1 norm does"
            raise Refused(Reason.UNSUPPORTED_LAYER, text, "convert it to BatchNorm first")
        tail = [] if norm.nodes[0].op == "call_module" else common_tail(norm.nodes, path, graph)
        if tail is None:
            raise Refused(Reason.FORWARD_OVERRIDDEN, f"{norm.name} ({norm.layer}) does more than normalise")
        new: Any = kind.from_batch_norm(module, self._deviation(norm, path, graph), **self.options)
        kwargs = {"num_features": new.num_features, "momentum": new.momentum, **self.options}
        spec: surgery.Spec = {"class": f"normfuse.layers.l1_batch_norm.{kind.__name__}", "kwargs": kwargs}
        tensors = {name: value.detach() for name, value in new.state_dict().items()}
        if tail:
            spec = {"sequential": [spec, *({"ref": name} for name in tail)]}
            tensors = {f"0.{name}": value for name, value in tensors.items()}
        return Swap(path, spec, tensors)

    def _deviation(self, norm: Norm, path: str, graph: ModelGraph) -> Tensor:
        """Return the running deviation of each channel, by its ratio on the unchanged model or on that of now."""
        self.observe(graph)
        found = self._deviations[path]
        if self.order == "sequential":
            found = ChannelDeviation()
            batches = Batches(self.calibration, graph.root, self.padding_mask)
            listen(graph.root, {graph.module(path): _measure(found)}, batches)
        if found.count == 0:
            text = f"{norm.name} is not called with one tensor, or on no value of the data"
            raise Refused(Reason.UNSUPPORTED_LAYER, text)
        if not bool(torch.isfinite(found.value()).all()):
            raise Refused(Reason.NONFINITE, f"{norm.name} reads NaN or infinity on the calibration data")
        module: Any = graph.module(path)
        std = (exact(module.running_var) + module.eps).sqrt()
        return (found.ratio() * std - self.options["eps"] / self._factor).clamp(min=0)


def _measure(deviation: ChannelDeviation) -> Listener:
    return lambda x, _, padding: deviation.add(as_tokens(x, 1, padding))


def _batch_norms(graph: ModelGraph) -> Iterator[Norm]:
    yield from (norm for norm in norms.find_norms(graph) if norm.nodes and _is_batch_norm(norm, graph))


def _is_batch_norm(norm: Norm, graph: ModelGraph) -> bool:
    """Whether a norm is a BatchNorm by class, a frozen one, or a call of the function."""
    if norm.module is None:
        return norm.layer == "batch_norm"
    module = graph.module(norm.module)
    return isinstance(module, _BatchNorm) or adapters.is_known(module)
