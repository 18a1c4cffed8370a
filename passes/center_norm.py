"""Turn LayerNorm into RMSNorm by centring everything that writes to the residual stream.

    LN(x) = gamma J x / sqrt(mean((J x)^2) + eps) + beta,    J = I - 1 1^T / C          (a reconstruction)
    J x = x   =>   LN(x) = gamma x / sqrt(mean(x^2) + eps) + beta

``J`` is linear, and the same for all channels: it passes sums, so it can be moved into the weights of every writer of
the stream. Besides LayerNorms, which do not see the mean, nothing may read the stream. The writers of a stream change
together; a norm of it that cannot be replaced stays a LayerNorm, of the same value. A weight that a writer shares with
another layer, as the embedding of GPT-2 does with its head, is untied: the writer gets a centred copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from normfuse import as_rms_norm, legality
from normfuse.as_rms_norm import Layer
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.centering import Writer, center
from normfuse.graph import ModelGraph
from normfuse.norms import Norm, find_norms
from normfuse.streams import Stream, StreamFinder


@dataclass(eq=False, slots=True)
class _Centring:
    """What centring a stream does, worked out by the first norm of it and carried out by the first that is applied.

    Attributes:
        stream: The stream.
        tensors: The new tensors of its writers, by name; empty before they are worked out, and once they are assigned.
        untied: The tensors that are tied to another layer's and not untied yet.
        done: Whether the tensors were assigned.
    """

    stream: Stream
    tensors: dict[str, Tensor] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    done: bool = False


Answer = tuple[_Centring, ...] | Refusal


@dataclass(frozen=True, slots=True)
class _Change:
    """What ``apply`` does at one norm."""

    centrings: tuple[_Centring, ...]
    layer: Layer


class CenterNorm(Pass):
    """LayerNorms that read a stream whose writers can be centred."""

    name = "center-norm"
    exactness = Exactness.EXACT

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield the tied weights that centring needs a copy of, each with its stream, and then every LayerNorm."""
        found = _found(graph)
        for centring in dict.fromkeys(c for _, answer in found if isinstance(answer, tuple) for c in answer):
            if any(_is_ready(norm, answer, centring, graph) for norm, answer in found):
                for name in centring.untied:
                    layer = type(graph.module(name.rpartition(".")[0])).__name__
                    yield Match(name, layer, norm=False, partners=_also(name, graph), payload=centring)
        for norm, answer in found:
            yield Match(norm.name, norm.layer, payload=(norm, answer))

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Refuse a stream that is read or written by anything else, and a norm that is more than a LayerNorm."""
        if not match.norm:
            return match
        norm, answer = match.payload
        if isinstance(answer, Refusal):
            return answer
        try:
            layer = _layer(norm, answer, graph)
            for centring in answer:
                _require_untied(centring, graph)
        except Refused as refused:
            return refused.refusal
        return replace(match, partners=_partners(answer, graph), payload=_Change(answer, layer))

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Untie a weight; or centre the writers, if no other norm of the stream did, and replace the norm."""
        if not match.norm:
            graph.perform({"op": "untie", "tensor": match.subject})
            match.payload.untied.remove(match.subject)
            return
        change: _Change = match.payload
        for centring in change.centrings:
            if not centring.done:
                graph.note_changed(centring.stream.values)
                graph.assign(centring.tensors)
                centring.tensors, centring.done = {}, True
        graph.perform({"op": "replace", "path": match.subject, "module": change.layer.spec})
        graph.assign({f"{match.subject}.{key}": value for key, value in change.layer.tensors.items()})


# detect


def _found(graph: ModelGraph) -> list[tuple[Norm, Answer]]:
    """Return every LayerNorm that is reached, with the streams its calls read or why there are none."""
    finder = StreamFinder(graph)
    centrings: dict[Stream, _Centring] = {}
    found = []
    for norm in find_norms(graph):
        plain = norm.module is not None and isinstance(graph.module(norm.module), nn.LayerNorm)
        if norm.nodes and (plain or any(node in finder.layer_norms for node in norm.nodes)):
            found.append((norm, _read_by(norm, finder, centrings)))
    return found


def _read_by(norm: Norm, finder: StreamFinder, centrings: dict[Stream, _Centring]) -> Answer:
    if not all(node in finder.layer_norms for node in norm.nodes):
        return Refusal(Reason.FORWARD_OVERRIDDEN, f"{norm.name} ({norm.layer}) has a forward that is no LayerNorm")
    try:
        streams = dict.fromkeys(finder.of(node) for node in norm.nodes)
    except Refused as refused:
        return refused.refusal
    return tuple(centrings.setdefault(stream, _Centring(stream)) for stream in streams)


def _is_ready(norm: Norm, answer: Answer, centring: _Centring, graph: ModelGraph) -> bool:
    """Whether a norm reads a stream and can be replaced, so that what is tied is worth a copy."""
    if isinstance(answer, Refusal) or centring not in answer:
        return False
    try:
        _layer(norm, answer, graph)
    except Refused:
        return False
    return True


def _layer(norm: Norm, centrings: tuple[_Centring, ...], graph: ModelGraph) -> Layer:
    """Return what a norm becomes, when everything that is asked of its streams and of itself is so."""
    for centring in centrings:
        _work_out(centring, graph)
    return as_rms_norm.replacement(norm, [centring.stream for centring in centrings], graph)


# the writers


def _work_out(centring: _Centring, graph: ModelGraph) -> None:
    """Find the new tensors of the writers of a stream.

    Raises:
        Refused: Something else reads, writes or watches the stream, or the weights of a writer.
    """
    if centring.done or centring.tensors:
        return
    stream = centring.stream
    if stream.refusal is not None:
        raise Refused(stream.refusal.reason, stream.refusal.detail, stream.refusal.hint)
    try:
        centring.tensors, centring.untied = _centred(stream, graph)
    except Refused as refused:
        stream.refuse(refused)
        raise


def _centred(stream: Stream, graph: ModelGraph) -> tuple[dict[str, Tensor], list[str]]:
    """Return the new tensors of the writers of a stream, and which of them are tied to others."""
    _require_unwatched(stream, graph)
    untied = [name for writer in stream.writers for name in _ties(writer, stream, graph)]
    tensors = {}
    for writer in stream.writers:
        legality.require_plain(writer.absorber, graph)
        for name, axis in writer.axes:
            tensors[name] = center(graph.tensor(name), axis)
            legality.require_in_range(name, tensors[name], graph)
    return tensors, list(dict.fromkeys(untied))


def _partners(centrings: tuple[_Centring, ...], graph: ModelGraph) -> tuple[str, ...]:
    """Return the writers that applying a norm centres, in order of execution: all of a stream, at its first norm."""
    places = {
        writer.absorber.name: min(map(graph.order.__getitem__, nodes))
        for centring in centrings
        if not centring.done
        for writer, nodes in centring.stream.writers.items()
    }
    return tuple(sorted(places, key=places.__getitem__))


def _require_unwatched(stream: Stream, graph: ModelGraph) -> None:
    """Refuse where a hook would see a value of the stream."""
    for node in (*stream.values, *stream.norms):
        legality.require_no_hooks(str(node.target) if node.op == "call_module" else None, graph)
    for call in graph.hooked_calls:
        if any(node in stream.values for node in (*call.inputs, *call.outputs)):
            legality.require_no_hooks(call.name, graph)


def _ties(writer: Writer, stream: Stream, graph: ModelGraph) -> Iterator[str]:
    """Yield the tensors of a writer that other layers hold too, and that it needs a copy of.

    Raises:
        Refused: Something reads one that cannot be told from the writer.
    """
    for name, _ in writer.axes:
        others = [use for use in graph.uses(name) if not stream.holds(use)]
        tied = len(graph.owners(name)) > 1
        apart = tied and all(use.op == "call_module" for use in graph.uses(name))
        own = name.rpartition(".")[0]
        if tied and not apart:
            text = f"{name} is also {', '.join(_also(name, graph))}, and read by a function"
            raise Refused(Reason.SHARED_PARAMETER, text)
        if any(not apart or str(use.target) == own for use in others):
            text = f"{name} is also read by {others[0].name}, which does not write to the stream"
            raise Refused(Reason.SHARED_PARAMETER, text)
        if tied:
            yield name


def _also(name: str, graph: ModelGraph) -> tuple[str, ...]:
    return tuple(owner for owner in graph.owners(name) if owner != name)


def _require_untied(centring: _Centring, graph: ModelGraph) -> None:
    """Refuse where the user left out a tied weight that would get a copy of its own."""
    if centring.untied:
        name = centring.untied[0]
        raise Refused(Reason.EXCLUDED, f"{name}, which is also {', '.join(_also(name, graph))}, may not be untied")
