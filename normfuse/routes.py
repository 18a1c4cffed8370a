"""Find weights that absorb a fixed affine map, along a route of operations that let it pass.

Backwards, from the value the map applies to: each step needs that nobody else reads the value. Forwards, from the value
it produces: every reader must take it. A route ends at absorbers; the finished :class:`Plan` knows for each the map of
each of its calls, and turns them into new tensors if every call of every absorber agrees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, fx
from torch.nn.modules.padding import _ConstantPadNd

from normfuse import absorbers, absorption, gather, rules
from normfuse.absorbers import Absorber
from normfuse.affine import AffineMap, compress
from normfuse.base import Reason, Refusal, Refused
from normfuse.graph import ModelGraph, occurrences
from normfuse.legality import require_plain
from normfuse.operations import describe, named
from normfuse.surgery import Edit

Side = Literal["output", "input"]


@dataclass(slots=True)
class Plan:
    """Which absorbers take which maps, call by call; the nodes passed; the new constants ``(C,)`` of pads."""

    maps: dict[tuple[Absorber, Side], dict[fx.Node, AffineMap]] = field(default_factory=dict)
    passed: list[fx.Node] = field(default_factory=list)
    pads: dict[fx.Node, Tensor] = field(default_factory=dict)

    def copy(self) -> Plan:
        """Return a plan that can grow on its own."""
        return Plan({key: dict(calls) for key, calls in self.maps.items()}, list(self.passed), dict(self.pads))

    def add(self, absorber: Absorber, side: Side, node: fx.Node, m: AffineMap) -> None:
        """Let one call of an absorber take a map, after what it already takes."""
        calls = self.maps.setdefault((absorber, side), {})
        calls[node] = compress(m.after(calls[node])) if node in calls else m

    @property
    def partners(self) -> tuple[str, ...]:
        """The names of the absorbing layers."""
        return tuple(dict.fromkeys(absorber.name for absorber, _ in self.maps))

    @property
    def changed(self) -> set[fx.Node]:
        """The values that are others when the plan is carried out."""
        return {node for (_, side), calls in self.maps.items() if side == "output" for node in calls} | set(self.passed)


class Router:
    """Searches a graph for routes."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph

    def backward(self, value: fx.Node, wanted: AffineMap, reader: fx.Node, plan: Plan) -> Plan:
        """Return ``plan`` extended so that ``value``, as ``reader`` sees it, becomes ``wanted`` of what it was.

        Raises:
            Refused: No route exists; the refusal is that of the furthest step.
        """
        if wanted.is_identity:
            return plan
        self._require_sole(value, reader)
        absorber = absorbers.output_side(value, self.graph)
        if absorber is not None:
            grown = plan.copy()
            grown.add(self._constant(absorber, reader, wanted), "output", value, wanted)
            return grown
        if value.op == "placeholder":
            raise Refused(Reason.NO_PRODUCER, f"{value.name} is an input of the model")
        return self._through(value, wanted, plan)

    def _constant(self, absorber: Absorber, reader: fx.Node, wanted: AffineMap) -> Absorber:
        """A parameter under a multiplication is a factor, which takes no shift."""
        if absorber.kind == "addend" and describe(reader, self.graph).name in ("mul", "div"):
            return Absorber("factor", absorber.name, absorber.weight)
        return absorber

    def _through(self, value: fx.Node, wanted: AffineMap, plan: Plan) -> Plan:
        operation = describe(value, self.graph)
        refused: Refused | None = None
        if self._pads_by_channel(value, wanted):
            layer: Any = self.graph.module_of(value)
            padded = _with_pad(plan, value, wanted.scale * layer.value + wanted.shift)
            return self.backward(operation.inputs[0], wanted, value, padded)
        ways = rules.backward(value, operation, wanted, self.graph)
        for way in ways:
            try:
                grown = plan.copy()
                grown.passed.append(value)
                for source, m in way:
                    grown = self.backward(source, m, value, grown)
                if len(ways) > 1:
                    self._require_absorbed(grown, plan)
                return grown
            except Refused as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _require_absorbed(self, grown: Plan, plan: Plan) -> None:
        """Refuse a way that ends at a layer which cannot take its map, so that the next way is tried."""
        for (absorber, side), calls in grown.maps.items():
            for node in calls.keys() - plan.maps.get((absorber, side), {}).keys():
                require_plain(absorber, self.graph)
                absorption.absorb_output(absorber, calls[node], self.graph)

    def _pads_by_channel(self, node: fx.Node, m: AffineMap) -> bool:
        """Whether a constant pad layer can pad with what the map makes of its constant, channel by channel."""
        layer = self.graph.module_of(node)
        if not isinstance(layer, _ConstantPadNd) or len(self.graph.call_sites(str(node.target))) > 1:
            return False
        if m.rank != len(layer.padding) // 2 + 2:
            return False
        m.require_constant(tuple(axis for axis in range(m.rank) if axis != 1), f"{node.target} pads")
        return m.has_shift or layer.value != 0

    def _value_before(self, node: fx.Node, given: AffineMap) -> Tensor:
        """Return with which constants a pad's output becomes, by the map behind it, what it was."""
        layer: Any = self.graph.module_of(node)
        value = given.preimage(float(layer.value))
        if value is None:
            text = f"{node.target} pads with {layer.value:g}, which a map with a scale of zero makes another constant"
            raise Refused(Reason.NONZERO_PADDING, text)
        return value

    def _require_sole(self, value: fx.Node, reader: fx.Node) -> None:
        readers = self.graph.consumers(value)
        own = reader.args[0] if reader.target is gather.pick else reader
        others = [node for node in readers if node is not own]
        if len(readers) == 1:
            return
        if not others:
            text = f"{named(reader, self.graph)} reads {named(value, self.graph)} more than once"
            raise Refused(Reason.EXTRA_CONSUMER, text)
        siblings = [part for node in others for part in self._parts(node)]
        gathers = all(gather.is_gather(part, self.graph) for part in (reader, *siblings))
        if gathers and gather.shows_apart(reader, siblings, self.graph):
            return
        other = others[0]
        what = "an output of the model" if other.op == "output" else f"read by {named(other, self.graph)}"
        raise Refused(Reason.EXTRA_CONSUMER, f"{named(value, self.graph)} is also {what}")

    def _parts(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that an operation makes: itself, or those of several results that anything reads."""
        picks = [user for user in node.users if user.target is gather.pick]
        return [part for part in picks if part.users] or picks[:1] or [node]

    def forward(self, value: fx.Node, given: AffineMap, plan: Plan) -> Plan:
        """Return ``plan`` extended so that all readers of ``value`` do on it what they did on ``given`` of it.

        Raises:
            Refused: A reader cannot take the map.
        """
        if given.is_identity:
            return plan
        if not self.graph.consumers(value):
            raise Refused(Reason.EXTRA_CONSUMER, f"nothing reads {named(value, self.graph)}")
        grown = plan.copy()
        grown.passed.append(value)
        return self._onwards(value, given, grown)

    def _onwards(self, value: fx.Node, given: AffineMap, plan: Plan) -> Plan:
        """Let every reader of a value take the map; who asks only for its shape, or nobody, need not."""
        for reader in [] if given.is_identity else dict.fromkeys(self.graph.consumers(value)):
            plan = self._into(reader, value, given, plan)
        return plan

    def _into(self, reader: fx.Node, value: fx.Node, given: AffineMap, plan: Plan) -> Plan:
        if reader.op == "output":
            raise Refused(Reason.EXTRA_CONSUMER, f"{named(value, self.graph)} is an output of the model")
        absorber = absorbers.input_side(reader, value, self.graph)
        if absorber is not None:
            grown = plan.copy()
            grown.add(absorber, "input", reader, given)
            return grown
        if occurrences(reader, value) != 1:
            text = f"{named(reader, self.graph)} reads {named(value, self.graph)} more than once"
            raise Refused(Reason.OPAQUE_OPERATION, text)
        if self._pads_by_channel(reader, given):
            return self._onwards(reader, given, _with_pad(plan, reader, self._value_before(reader, given)))
        grown = plan.copy()
        grown.passed.append(reader)
        for part in self._parts(reader):
            m = rules.forward(part, describe(part, self.graph), value, given, self.graph)
            grown = self._onwards(part, m, grown)
        return grown


def _with_pad(plan: Plan, node: fx.Node, value: Tensor) -> Plan:
    grown = plan.copy()
    grown.passed.append(node)
    grown.pads[node] = value.reshape(-1)
    return grown


def pad_edits(plan: Plan, graph: ModelGraph) -> tuple[list[Edit], dict[str, Tensor]]:
    """Return the edits that make the plan's pads pad by channel, and their values, to be assigned afterwards."""
    edits: list[Edit] = []
    values: dict[str, Tensor] = {}
    for node, value in plan.pads.items():
        name = str(node.target)
        layer: Any = graph.module(name)
        kwargs = {"padding": list(layer.padding), "channels": value.numel()}
        spec = {"class": "normfuse.layers.deployed.ChannelPad", "kwargs": kwargs}
        edits.append({"op": "replace", "path": name, "module": spec})
        values[f"{name}.value"] = value
    return edits, values


_SEARCH_ENDED = (Reason.OPAQUE_OPERATION, Reason.EXTRA_CONSUMER, Reason.NO_PRODUCER)


def joined(back: Refusal, ahead: Refusal) -> Refused:
    """One refusal of the two directions: the reason of the route that came closest, the details of both."""
    if back == ahead:
        return Refused(back.reason, back.detail, back.hint)
    closest = ahead if back.reason in _SEARCH_ENDED and ahead.reason not in _SEARCH_ENDED else back
    detail = f"backwards, {back.detail}; forwards, {ahead.detail}"
    return Refused(closest.reason, detail, closest.hint)
