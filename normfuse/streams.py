"""Residual streams: the values that must all be centred for the LayerNorms that read them to become RMSNorms.

A stream grows from the input of a LayerNorm: backwards to everything the value is made of, down to its writers, and
forwards to everything that is made of it, up to the norms that read it. Each step is an operation that treats all
channels alike and is linear, so that it keeps the mean over the channels at zero; anything else ends in a refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from normfuse import gather
from normfuse.base import Reason, Refusal, Refused
from normfuse.call_arguments import arguments_of
from normfuse.capture.leaves import base_layer
from normfuse.centering import Writer, results, writer_of
from normfuse.graph import ModelGraph, function_name
from normfuse.norms import Norm, find_norms, has_affine_form
from normfuse.operations import describe, named
from normfuse.stream_rules import Place, keeps_centred, sources


@dataclass(eq=False, slots=True)
class Stream:
    """The values that are centred together.

    Attributes:
        values: The axis of the channels in each of them.
        writers: What writes to it, each with the nodes that do.
        norms: The calls of LayerNorm that read it.
        refusals: What stands in the way, in the order of execution; the first is that of the report.
    """

    values: dict[fx.Node, int] = field(default_factory=dict)
    writers: dict[Writer, list[fx.Node]] = field(default_factory=dict)
    norms: list[fx.Node] = field(default_factory=list)
    refusals: list[tuple[tuple[bool, int], Refusal]] = field(default_factory=list)

    @property
    def refusal(self) -> Refusal | None:
        """Why the stream cannot be centred: a norm that writes to it, if there is one, or what comes first."""
        return min(self.refusals, key=lambda item: item[0])[1] if self.refusals else None

    def refuse(self, refused: Refused, order: int = 0) -> None:
        """Note what stands in the way, and where in the order of execution."""
        self.refusals.append(((refused.refusal.reason is not Reason.POST_NORM, order), refused.refusal))

    def holds(self, node: fx.Node) -> bool:
        """Whether a value, or what is taken out of it, belongs to the stream."""
        return any(value in self.values for value in results(node))


def layer_norms(graph: ModelGraph) -> dict[fx.Node, Norm]:
    """Return the calls of LayerNorm, as a layer or as a function."""
    return {node: norm for norm in find_norms(graph) for node in norm.nodes if _is_layer_norm(node, graph)}


def _is_layer_norm(node: fx.Node, graph: ModelGraph) -> bool:
    module = graph.module_of(node)
    return function_name(node) == "layer_norm" if module is None else base_layer(module) is nn.LayerNorm


def input_of(node: fx.Node) -> Any:
    """Return what a call of LayerNorm normalises."""
    return node.args[0] if node.args else node.kwargs.get("input")


def normalized_shape(node: fx.Node, graph: ModelGraph) -> tuple[int, ...]:
    """Return the sizes of the trailing axes that a call of LayerNorm normalises."""
    module: Any = graph.module_of(node)
    if module is not None:
        return tuple(module.normalized_shape)
    return tuple(arguments_of(node)["normalized_shape"])


class StreamFinder:
    """Finds the streams of a graph, each once."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.norms = {node: norm for norm in find_norms(graph) for node in norm.nodes}
        self.layer_norms = layer_norms(graph)
        self.found: list[Stream] = []

    def of(self, node: fx.Node) -> Stream:
        """Return the stream that a call of LayerNorm reads.

        Raises:
            Refused: Only parts of the model were read, no shapes are known, or the norm has several axes.
        """
        for stream in self.found:
            if node in stream.norms:
                return stream
        value = input_of(node)
        if self.graph.partial:
            text = "only parts of the model could be traced, other readers may be unseen"
            raise Refused(Reason.PARTIAL_CAPTURE, text, "pass example_inputs")
        if len(normalized_shape(node, self.graph)) > 1:
            raise Refused(Reason.AXIS, f"{self.layer_norms[node].name} takes one mean over several axes")
        shape = self.graph.shape(value) if isinstance(value, fx.Node) else None
        if shape is None:
            name = self.layer_norms[node].name
            raise Refused(Reason.RANK_UNKNOWN, f"the shape of what {name} reads is not known", "pass example_inputs")
        stream = Stream()
        self._grow(stream, [(value, len(shape) - 1)])
        self.found.append(stream)
        return stream

    def _grow(self, stream: Stream, queue: list[Place]) -> None:
        while queue:
            value, axis = queue.pop()
            if value in stream.values:
                if stream.values[value] != axis:
                    text = f"{value.name} would have to be centred along axes {stream.values[value]} and {axis}"
                    stream.refuse(Refused(Reason.AXIS, text), self.graph.order[value])
                continue
            stream.values[value] = axis
            steps: list[tuple[fx.Node, Callable[[], list[Place]]]]
            steps = [(value, lambda v=value, a=axis: self._behind(v, a, stream))]
            for reader in dict.fromkeys(self.graph.consumers(value)):
                steps.append((reader, lambda r=reader, v=value, a=axis: self._ahead(r, v, a, stream)))
            for node, step in steps:
                try:
                    queue += step()
                except Refused as refused:
                    stream.refuse(refused, self.graph.order[node])

    def _behind(self, value: fx.Node, axis: int, stream: Stream) -> list[Place]:
        """Return what must be centred for ``value`` to be, and note its writer if it is written here."""
        if value.op == "placeholder":
            raise Refused(Reason.NO_PRODUCER, f"the input of the model, {value.name}, writes to the stream")
        if value in self.norms and not value.meta.get("removed"):
            return self._behind_norm(value, axis)
        writer = writer_of(value, axis, self.graph)
        if writer is None:
            return sources(value, axis, self.graph)
        stream.writers.setdefault(writer, []).append(value)
        return self._other_calls(writer, value)

    def _behind_norm(self, value: fx.Node, axis: int) -> list[Place]:
        """A LayerNorm's output is centred if it has one gain for all channels, and no shift; no other norm's is."""
        norm = self.norms[value]
        if value in self.layer_norms and self.graph.shape(value) is not None:
            rank = len(self.graph.shape(value) or ())
            if axis == rank - 1 and len(normalized_shape(value, self.graph)) == 1 and self._is_plain(value):
                return []
        hint = "fold-bn may fold it first" if has_affine_form(norm, self.graph) else ""
        text = f"{norm.name} ({norm.layer}) writes to the stream, and its gain and shift leave a mean"
        raise Refused(Reason.POST_NORM, text, hint)

    def _is_plain(self, node: fx.Node) -> bool:
        module: Any = self.graph.module_of(node)
        if module is None:
            given = arguments_of(node)
            return given.get("weight") is None and given.get("bias") is None
        weight, bias = module.weight, module.bias
        uniform = weight is None or bool((weight == weight.flatten()[0]).all())
        return uniform and (bias is None or not bool(bias.any()))

    def _other_calls(self, writer: Writer, value: fx.Node) -> list[Place]:
        """Return the other calls of the layer: its weights change for all of them."""
        places = []
        uses = self.graph.uses(writer.absorber.weight) if value.op != "get_attr" else []
        for call in (result for use in uses for result in results(use)):
            other = writer_of(call, None, self.graph) if call is not value else None
            if other is not None and other.absorber == writer.absorber:
                places.append((call, other.output))
        return places

    def _ahead(self, reader: fx.Node, value: fx.Node, axis: int, stream: Stream) -> list[Place]:
        """Return what becomes centred with ``value`` in one of its readers; a LayerNorm ends the way."""
        if reader.op == "output":
            raise Refused(Reason.EXTRA_CONSUMER, f"{named(value, self.graph)} is an output of the model")
        if reader in self.layer_norms:
            self._note_norm(reader, value, axis, stream)
            return []
        if not keeps_centred(describe(reader, self.graph)):
            what, other = named(value, self.graph), named(reader, self.graph)
            text = f"{what} is also read by {other}, which would see it centred"
            raise Refused(Reason.EXTRA_CONSUMER, text)
        parts = [user for user in reader.users if user.target is gather.pick]
        return [place for part in parts or [reader] for place in self._through(part, value, axis)]

    def _note_norm(self, reader: fx.Node, value: fx.Node, axis: int, stream: Stream) -> None:
        single = len(normalized_shape(reader, self.graph)) == 1
        if not single or input_of(reader) is not value or axis != len(self.graph.shape(value) or ()) - 1:
            name, what = self.layer_norms[reader].name, named(value, self.graph)
            text = f"{name} normalises other axes of {what} than axis {axis}"
            raise Refused(Reason.AXIS, text)
        if reader not in stream.norms:
            stream.norms.append(reader)

    def _through(self, reader: fx.Node, value: fx.Node, axis: int) -> list[Place]:
        """Return the axis of the channels in what an operation makes of ``value``."""
        refusals = []
        shape = self.graph.shape(reader)
        for out_axis in reversed(range(len(shape or ()))):
            try:
                if (value, axis) in sources(reader, out_axis, self.graph):
                    return [(reader, out_axis)]
            except Refused as refused:
                refusals.append(refused)
        text = f"{named(reader, self.graph)} takes the channels of {named(value, self.graph)} apart"
        raise next(iter(refusals), None) or Refused(Reason.AXIS, text)
