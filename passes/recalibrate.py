"""Set the stored statistics of norms to those of data, per channel, over all tokens of all batches.

    mu_hat <- (1 - w) mu_hat + w E[x];    var_hat <- (1 - w) var_hat + w Var[x]

``pooled``: w = 1 (re-estimation);  ``adabn``: w = 1, each norm behind those that are set already (arXiv 1603.04779);
``alpha``: w = 0.1, a fixed mixture as in alpha-BN (arXiv 2110.04065). See :mod:`normfuse.statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

from torch import Tensor

from normfuse import norms
from normfuse.base import Exactness, Match, Pass, Reason, Refusal
from normfuse.calibration import Batch, Batches, Calibration, PaddingMask
from normfuse.graph import ModelGraph
from normfuse.norms import Norm
from normfuse.statistics import stored
from normfuse.statistics.moments import ChannelMoments
from normfuse.statistics.reestimation import ORDERS, Order, observe

Method = Literal["pooled", "alpha", "adabn"]
DEFAULTS: dict[Method, tuple[float, Order]] = {
    "pooled": (1.0, "parallel"),
    "alpha": (0.1, "parallel"),
    "adabn": (1.0, "sequential"),
}
"""Weight and order of each method."""


class Recalibrate(Pass):
    """Statistics of BatchNorm and UnifiedNorm from data.

    Args:
        calibration: Data, as :class:`normfuse.calibration.Batches` takes it.
        method: ``"pooled"``, ``"alpha"`` or ``"adabn"``.
        weight: Of the statistics of the data; that of the method, if None.
        order: ``"parallel"`` or ``"sequential"``, as for :func:`normfuse.statistics.reestimate`; that of the method, if
            None.
        padding_mask: As for :func:`normfuse.statistics.reestimate`.

    Attributes:
        moved: How far each norm was from the data: ``mean_c |mu - mu_hat| / sigma_hat`` before the change.

    Raises:
        ValueError: There is no data, or an argument is none of those named.
    """

    name = "recalibrate"
    exactness = Exactness.APPROXIMATE

    def __init__(
        self,
        calibration: Calibration | None = None,
        *,
        method: Method = "pooled",
        weight: float | None = None,
        order: Order | None = None,
        padding_mask: PaddingMask | None = None,
    ) -> None:
        if calibration is None:
            raise ValueError("recalibrate needs calibration data: normfuse.statistics.reestimate(model, batches)")
        if method not in DEFAULTS or (order is not None and order not in ORDERS):
            text = f"method is one of {', '.join(DEFAULTS)} and order one of {', '.join(ORDERS)}"
            raise ValueError(f"{text}, not {method!r} and {order!r}")
        usual = DEFAULTS[method]
        self.calibration, self.padding_mask = calibration, padding_mask
        self.weight, self.order = usual[0] if weight is None else weight, order or usual[1]
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is from 0 to 1, not {weight}")
        self.moved: dict[str, float] = {}
        self.track: Callable[[Iterable[Batch]], Iterable[Batch]] = iter
        self._graph: ModelGraph | None = None
        self._moments: dict[str, ChannelMoments] = {}

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every norm that the captured run reached."""
        for norm in norms.find_norms(graph):
            if norm.nodes:
                yield Match(norm.name, norm.layer, payload=norm)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Take the statistics of the data, and refuse a norm that stores none."""
        norm: Norm = match.payload
        module = graph.module(norm.module) if norm.module is not None else None
        if module is None or norm.module is None:
            return Refusal(Reason.UNSUPPORTED_LAYER, f"{norm.name} is a call of {norm.layer}, not a layer")
        if not stored.stores_statistics(module):
            return _refusal(norm, module)
        moments = self._observed(norm.module, graph)
        if moments.count == 0:
            return Refusal(Reason.UNSUPPORTED_LAYER, f"{norm.name} is not called with one tensor on this data")
        if not moments.is_finite:
            return Refusal(Reason.NONFINITE, f"{norm.name} reads NaN or infinity on the calibration data")
        self.moved[norm.name] = _distance(module, moments)
        return replace(match, payload=(norm.module, stored.mixed(module, moments, self.weight)))

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Write the statistics."""
        path, statistics = match.payload
        values: dict[str, Tensor] = {f"{path}.{key}": value for key, value in statistics.items()}
        graph.assign(values)

    def _observed(self, name: str, graph: ModelGraph) -> ChannelMoments:
        data = Batches(self.calibration, graph.root, self.padding_mask)
        if self.order == "sequential":
            calls = graph.most_calls(name) or None
            return observe(graph.root, {name: graph.module(name)}, data, None, data.device, calls)[name]
        if graph is not self._graph:
            every = {n: m for n, m in graph.root.named_modules() if stored.stores_statistics(m)}
            self._graph, self._moments = graph, observe(graph.root, every, self.track(data), None, data.device)
        return self._moments[name]


def _refusal(norm: Norm, module: object) -> Refusal:
    if getattr(module, "track_running_stats", None) is False or getattr(module, "running_mean", 0) is None:
        text = f"{norm.name} keeps no statistics"
        return Refusal(Reason.BATCH_STATISTICS, text, "normfuse.statistics.reestimate(..., add_missing=True)")
    return Refusal(Reason.UNSUPPORTED_LAYER, f"{norm.name} ({norm.layer}) stores no mean and variance of data")


def _distance(norm: object, moments: ChannelMoments) -> float:
    found = stored.measured(norm, moments)  # type: ignore[arg-type]
    first = next(iter(found))
    old = getattr(norm, first).detach().double().cpu()
    scale = getattr(norm, "running_var", old.square()).detach().double().cpu().clamp(min=1e-12).sqrt()
    return float(((found[first] - old).abs() / scale).mean())
