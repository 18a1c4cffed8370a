"""What the passes have in common that replace LayerNorm and RMSNorm by another norm, fitted to data.

A new norm is ``y = gamma z + beta`` with z what it makes of x; gamma and beta are chosen by the moments of z and y.

The data runs through the model once, and the moments of every norm are taken together (``order="parallel"``). Or norm
by norm (``"sequential"``): each is fitted to what the original norm writes, on what it will read behind the norms that
were swapped before it; the cost is two partial runs over the data for each norm.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from normfuse import norms, surgery
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.calibration import Batch, Batches, Calibration, Enough, Listener, Moments, PaddingMask, listen
from normfuse.graph import ModelGraph
from normfuse.legality import require_replaceable
from normfuse.norm_forms import Form, as_tokens, may_be_token_norm, recognise
from normfuse.norms import Norm

Order = Literal["parallel", "sequential"]
ORDERS: tuple[Order, ...] = ("parallel", "sequential")


@dataclass(slots=True)
class Observation:
    """What the data shows of one norm: its form and its moments, or why it cannot be swapped."""

    form: Form | None = None
    moments: Moments | None = None
    refused: Refused | None = None


@dataclass(frozen=True, slots=True)
class Swap:
    """What ``apply`` does at one norm."""

    path: str
    spec: surgery.Spec
    tensors: dict[str, Tensor]


class NormSwap(Pass):
    """Base of the passes that swap token norms.

    Args:
        calibration: Data, as :class:`normfuse.calibration.Batches` takes it.
        order: ``"parallel"`` or ``"sequential"``.
        start: Where gain and shift of the new norms come from, one of ``starts``.
        padding_mask: As for :class:`normfuse.calibration.Batches`.
        options: Further arguments of the new norms.

    Raises:
        ValueError: There is no data, or the order or the start is not known.
    """

    exactness = Exactness.APPROXIMATE
    starts: ClassVar[tuple[str, ...]]
    family: ClassVar[str] = "a fixed map"
    """What the new norms are, in a sentence on how well they fit."""

    def __init__(
        self,
        calibration: Calibration | None = None,
        *,
        order: Order = "parallel",
        start: str = "least-squares",
        padding_mask: PaddingMask | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if calibration is None:
            text = f"{self.name} needs calibration data: normfuse.swap_norms(model, calibration=...) takes it"
            raise ValueError(text)
        if order not in ORDERS:
            raise ValueError(f"order is one of {', '.join(ORDERS)}, not {order!r}")
        if start not in self.starts:
            raise ValueError(f"start is one of {', '.join(self.starts)}, not {start!r}")
        self.calibration, self.order, self.padding_mask = calibration, order, padding_mask
        self.start = start
        self.options = dict(options or {})
        self.unexplained: dict[str, float] = {}
        self.track: Callable[[Iterable[Batch]], Iterable[Batch]] = iter
        self._seen: dict[str, Observation] = {}
        self._original: nn.Module | None = None
        self._graph: ModelGraph | None = None

    @abc.abstractmethod
    def replacement(self, form: Form, moments: Moments) -> tuple[surgery.Spec, dict[str, Tensor]]:
        """Return how to build the new norm, and its tensors by attribute, in float64.

        Raises:
            Refused: The new norm cannot take the place of such a one.
        """

    def normalised(self, form: Form, x: Tensor) -> Tensor:
        """Return z, what the new norm makes of tokens ``(n, size)`` before its gain and shift; x itself by default."""
        return x

    def further_listeners(self, graph: ModelGraph) -> dict[nn.Module, Listener]:
        """Return what else listens while the data runs through the unchanged model."""
        return {}

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every norm of a token that the captured run reached, and every call of a function that is one."""
        for norm in token_norms(graph):
            yield Match(norm.name, norm.layer, payload=norm)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Look at the data, and work out the new norm."""
        norm: Norm = match.payload
        try:
            module = layer_of(norm)
            require_replaceable(module, graph)
            form, moments = self._observed(module, graph)
            spec, tensors = self.replacement(form, moments)
        except Refused as refused:
            return refused.refusal
        self.unexplained[norm.name] = moments.unexplained()
        return replace(match, payload=Swap(module, spec, tensors))

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Put the new norm in the place of the old one."""
        swap: Swap = match.payload
        old = graph.module(swap.path)
        frozen = [not parameter.requires_grad for parameter in old.parameters()]
        for path in _fused_owners(old, graph):
            graph.perform({"op": "separate", "path": path})
        graph.perform({"op": "replace", "path": swap.path, "module": swap.spec})
        graph.assign({f"{swap.path}.{name}": value for name, value in swap.tensors.items()})
        if frozen and all(frozen):
            graph.module(swap.path).requires_grad_(False)

    # what the data shows

    def observe(self, graph: ModelGraph) -> None:
        """Take the moments of every norm of the unchanged model, in one pass over the data; once for each model."""
        if graph is not self._graph:
            self._start(graph)

    def _observed(self, name: str, graph: ModelGraph) -> tuple[Form, Moments]:
        self.observe(graph)
        seen = self._seen[name]
        if seen.form is not None and seen.refused is None and self.order == "sequential":
            self._seen[name] = seen = self._behind_the_swapped(name, seen.form, graph)
        if seen.refused is not None:
            raise seen.refused
        if seen.form is None or seen.moments is None or seen.moments.count == 0:
            raise Refused(Reason.UNSUPPORTED_LAYER, f"{name} is not called with one tensor, or on no token of the data")
        if not seen.moments.is_finite:
            raise Refused(Reason.NONFINITE, f"{name} reads or writes NaN or infinity on the calibration data")
        return seen.form, seen.moments

    def _start(self, graph: ModelGraph) -> None:
        self._graph, self._seen = graph, {}
        listeners = self.further_listeners(graph)
        for norm in token_norms(graph):
            if norm.module is not None:
                seen = self._seen[norm.module] = Observation()
                module = graph.module(norm.module)
                listeners[module] = self._listener(norm.module, module, seen)
        batches = Batches(self.calibration, graph.root, self.padding_mask)
        if self.order == "parallel":
            listen(graph.root, listeners, self.track(batches))
        else:
            self._original = surgery.copy(graph.root)
            listen(graph.root, listeners, [batches.batch(next(iter(batches.items)))])

    def _behind_the_swapped(self, name: str, form: Form, graph: ModelGraph) -> Observation:
        """Take the moments of what the norm reads in the model as it is now and writes in the original one."""
        assert self._original is not None
        seen = Observation(form, Moments(form.size))
        last = graph.most_calls(name) or 1
        original = self._original.get_submodule(name)
        for batch in Batches(self.calibration, graph.root, self.padding_mask):
            reads = _first_calls(graph.root, graph.module(name), batch, last)
            writes = _first_calls(self._original, original, batch, last)
            for (read, _), (_, written) in zip(reads, writes, strict=True):
                x, y = (as_tokens(values, form.dim, batch.padding) for values in (read, written))
                if seen.moments is not None:
                    seen.moments.add(self.normalised(form, x), y)
        return seen

    def _listener(self, name: str, module: nn.Module, seen: Observation) -> Listener:
        """Return what recognises a norm at its first call and adds every call to its moments."""

        def listener(x: Tensor, y: Tensor, padding: Tensor | None) -> None:
            try:
                if seen.form is None or seen.moments is None:
                    seen.form = recognise(name, module, x, y)
                    seen.moments = Moments(seen.form.size)
                dim = seen.form.dim
                read = self.normalised(seen.form, as_tokens(x, dim, padding))
                seen.moments.add(read, as_tokens(y, dim, padding))
            except Refused as refused:
                seen.refused = refused

        return listener


def layer_of(norm: Norm) -> str:
    """Return the name of the module that a norm is.

    Raises:
        Refused: It is a call of a function.
    """
    if norm.module is None:
        text = f"{norm.name} is a call of {norm.layer} inside a forward, not a layer"
        raise Refused(Reason.UNSUPPORTED_LAYER, text, "make it a layer of its own")
    return norm.module


def token_norms(graph: ModelGraph) -> Iterator[Norm]:
    """Yield the norms of tokens that the captured run reached: layers that may be such, and calls of functions."""
    for norm in norms.find_norms(graph):
        module = graph.module(norm.module) if norm.module is not None else None
        called = norm.layer in ("layer_norm", "rms_norm") if module is None else may_be_token_norm(module)
        if norm.nodes and called:
            yield norm


def _first_calls(model: nn.Module, norm: nn.Module, batch: Batch, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return what the first calls of a norm read and write; the model runs no further."""
    calls: list[tuple[Tensor, Tensor]] = []

    def listener(x: Tensor, y: Tensor, _: Tensor | None) -> None:
        calls.append((x, y))
        if len(calls) == count:
            raise Enough

    listen(model, {norm: listener}, [batch])
    return calls


def _fused_owners(norm: nn.Module, graph: ModelGraph) -> list[str]:
    """Return the layers of ``nn.TransformerEncoder`` that would compute a norm of theirs without calling it."""
    layers = [(n, m) for n, m in graph.root.named_modules() if isinstance(m, nn.TransformerEncoderLayer)]
    return [name for name, layer in layers if norm in (layer.norm1, layer.norm2) and layer.activation_relu_or_gelu]
