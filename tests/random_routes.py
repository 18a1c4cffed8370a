"""Random small networks around one norm, with an oracle that knows whether a fold is allowed.

A network is a chain of steps. Each step knows, from its mathematics and not from the library, what it does to a map
``y = s x + t`` that is given element by element over the whole value: ``back`` turns the map wanted on its output into
the map needed on its input, ``ahead`` the map on its input into that on its output; ``None`` where no exact way exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.element_maps import (
    Map,
    Rule,
    Shape,
    moved,
    never,
    ordered,
    plus,
    rectifier,
    same,
    scale_only,
    times,
    windowed,
)


@dataclass
class Step:
    """One operation of a chain.

    Attributes:
        run: Called with the value, and with the values of ``others``.
        shape: Of its output.
        back: The map on its input; or a list of ways, each with the maps on all of its inputs.
        others: Chains that make its further inputs.
    """

    name: str
    run: Callable[..., Tensor]
    shape: Shape
    back: Callable[[Map], Any]
    ahead: Rule
    others: list[list[Step]] = field(default_factory=list)


class Net(nn.Module):
    """Runs chains of steps; their layers are its children, and what they read from outside are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.examples: list[Tensor] = []
        self.given: tuple[Tensor, ...] = ()
        self.body: Callable[[], Tensor]

    def keep(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """Add a layer; return what calls it, or what a fold puts in its place."""
        self.layers.append(layer.double().eval())
        index = len(self.layers) - 1
        return lambda x: self.layers[index](x)

    def input(self, example: Tensor) -> Callable[[], Tensor]:
        """Add an input; return what reads it."""
        self.examples.append(example)
        index = len(self.examples) - 1
        return lambda: self.given[index]

    def forward(self, *inputs: Tensor) -> Tensor:
        self.given = inputs
        try:
            return self.body()
        finally:
            self.given = ()


def run(steps: list[Step], value: Tensor | None = None) -> Tensor:
    """Return what a chain makes of a value; a chain that begins with a source needs none."""
    for step in steps:
        arguments = [run(other) for other in step.others]
        value = step.run(*arguments) if value is None else step.run(value, *arguments)
    assert value is not None
    return value


def allowed_back(steps: list[Step], m: Map | None, leak: int | None = None, *, strict: bool = False) -> bool:
    """Whether a map wanted on the output of a chain reaches layers that absorb it.

    Args:
        steps: The chain, from its source on.
        m: The map.
        leak: The step whose output is read elsewhere too, so that it may not change.
        strict: Ask for identity where nobody looks, as a fold may do that does not see how else to go on.
    """
    for index in range(len(steps) - 1, -1, -1):
        m = m.bound() if m is not None and strict else m
        if m is None or m.trivial or index == leak:
            return m is not None and m.trivial
        step, before = steps[index], steps[:index]
        ways = step.back(m)
        if isinstance(ways, list):
            return any(
                allowed_back(before, way[0], leak, strict=strict)
                and all(allowed_back(o, w, strict=strict) for o, w in zip(step.others, way[1:], strict=True))
                for way in ways
            )
        m = ways
    return m is not None


# steps on one value


def pointwise(draw: Any, net: Net, shape: Shape) -> Step:
    channels = shape[1]
    kind = draw(st.sampled_from(["identity", "dropout", "contiguous", "clone", "relu", "leaky", "prelu", "neg", "times",
                                 "plus", "vector", "gate", "scalar gate", "minus", "divide", "double"]))  # fmt: skip
    layers: dict[str, nn.Module] = {"identity": nn.Identity(), "dropout": nn.Dropout(), "relu": nn.ReLU(),
                                    "leaky": nn.LeakyReLU(0.3), "prelu": nn.PReLU(channels)}  # fmt: skip
    if kind in layers:
        slope = torch.tensor({"leaky": 0.3, "prelu": 0.25}.get(kind, 0.0)).double()
        back, ahead = rectifier(slope) if kind in ("relu", "leaky", "prelu") else (same, same)
        return Step(kind, net.keep(layers[kind]), shape, back, ahead)
    number = draw(st.sampled_from([0.5, -2.0, 3.0]))
    vector = nn.Parameter(torch.randn(channels, *[1] * (len(shape) - 2)).double())
    table: dict[str, tuple[Callable[[Tensor], Tensor], tuple[Rule, Rule]]] = {
        "contiguous": (lambda x: x.contiguous().detach(), (same, same)),
        "clone": (lambda x: x.clone(), (same, same)),
        "double": (lambda x: x.to(torch.float64), (same, same)),
        "neg": (lambda x: -x, times(torch.tensor(-1.0))),
        "times": (lambda x: x * number, times(torch.tensor(number))),
        "divide": (lambda x: x / number, times(torch.tensor(1 / number).double())),
        "plus": (lambda x: number + x, plus(number)),
        "minus": (lambda x: x - number, plus(-number)),
    }
    if kind == "vector":
        name = f"vector{len(net._parameters)}"
        net.register_parameter(name, vector)
        back, ahead = times(vector.detach())
        axes = tuple(a for a in range(len(shape)) if a != 1)
        own = lambda m: [] if m.shifts or m.varies(*axes) else [(_trivial(shape),)]  # noqa: E731 - the vector itself
        ways = lambda m: [(back(m),), *own(m)]  # noqa: E731
        return Step(kind, lambda x: x * getattr(net, name), shape, ways, ahead)
    if kind in ("gate", "scalar gate"):
        size = (shape[0], channels if kind == "gate" else 1, *[1] * (len(shape) - 2))
        gate = net.input(torch.randn(size).double())
        return Step(kind, lambda x: x * gate().sigmoid(), shape, scale_only, scale_only)
    return Step(kind, table[kind][0], shape, *table[kind][1])


def movement(draw: Any, net: Net, shape: Shape) -> Step:
    """An operation that only moves values; every one that the shape admits may be drawn."""
    options: dict[str, Callable[[Tensor], Tensor]] = {"flip": lambda x: x.flip(-1), "roll": lambda x: x.roll(1, -1)}
    options["unsqueeze"] = lambda x: x.unsqueeze(-1)
    options["there and back"] = lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)
    options["select"] = lambda x: x.narrow(1, 0, max(1, shape[1] - 1))
    options["rows"] = lambda x: x.movedim(1, -1).flatten(0, -2)
    if shape[1] % 2 == 0:
        options["chunk"] = lambda x: x.chunk(2, 1)[1]
        options["shuffle"] = lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    if len(shape) > 2:
        options["swap"] = lambda x: x.transpose(1, 2)
        options["flatten"] = lambda x: x.flatten(2)
        options["flatten all"] = lambda x: x.reshape(x.shape[0], -1)
        options["slice"] = lambda x: x[..., ::2]
        options["expand"] = lambda x: x[..., :1].expand(*shape[:-1], 3)
    if len(shape) == 4 and shape[1] % 4 == 0:
        options["pixel shuffle"] = lambda x: F.pixel_shuffle(x, 2)
    if len(shape) == 4 and shape[2] % 2 == shape[3] % 2 == 0:
        options["pixel unshuffle"] = lambda x: F.pixel_unshuffle(x, 2)
    if len(shape) == 5 or shape[len(shape) - 1] == 1:
        options["squeeze"] = lambda x: x.flatten(-2)
    usable = [k for k in options if 2 <= options[k](torch.zeros(shape)).dim() <= 5]
    kind = draw(st.sampled_from(sorted(usable)))
    back, ahead, after = moved(options[kind], shape)
    return Step(kind, options[kind], after, back, ahead)


def window(draw: Any, net: Net, shape: Shape) -> Step | None:
    """A pool, a mean, an interpolation or a pad."""
    n = len(shape) - 2
    if n < 1 or n > 3 or min(shape[2:]) < 3 or max(shape[2:]) > 16:
        return None
    axes = tuple(range(2, n + 2))
    pools = {"avg": ("AvgPool", same, {}), "avg padded": ("AvgPool", scale_only, {"padding": 1}),
             "avg uncounted": ("AvgPool", same, {"padding": 1, "count_include_pad": False}),
             "avg ceil": ("AvgPool", same, {"ceil_mode": True}),
             "max": ("MaxPool", ordered, {"padding": 1})}  # fmt: skip
    others = ["adaptive", "mean", "sum", "amax", "nearest", "linear", "bicubic", "reflect", "pad"]
    kind = draw(st.sampled_from([*pools, *others, "pad layer"]))
    rule: Rule = same
    if kind in pools:
        name, rule, options = pools[kind]
        run: Callable[[Tensor], Tensor] = net.keep(getattr(nn, f"{name}{n}d")(2 + (n < 3), 2, **options))
    elif kind == "adaptive":
        run = net.keep(getattr(nn, f"AdaptiveAvgPool{n}d")(2))
    elif kind in ("mean", "sum", "amax"):
        rule = {"mean": same, "sum": scale_only, "amax": pools["max"][1]}[kind]
        run = lambda x: getattr(x, kind)(axes, keepdim=True)  # noqa: E731
    elif kind == "nearest" or (kind == "bicubic" and n != 2):
        run = lambda x: F.interpolate(x, scale_factor=2)  # noqa: E731
    elif kind in ("linear", "bicubic"):
        mode = kind if kind == "bicubic" else {1: "linear", 2: "bilinear", 3: "trilinear"}[n]
        run = lambda x: F.interpolate(x, size=[5] * n, mode=mode)  # noqa: E731
    elif kind == "reflect":
        run = lambda x: F.pad(x, (1, 1) * n, mode="reflect")  # noqa: E731
    elif kind == "pad":
        rule, run = scale_only, lambda x: F.pad(x, (1, 0) * n)
    else:
        return _pad_layer(net, getattr(nn, f"ConstantPad{n}d")(1, draw(st.sampled_from([0.0, 1.5]))), shape)
    after = tuple(run(torch.zeros(shape).double()).shape)
    return Step(kind, run, after, *windowed(rule, axes, shape, after))


def _pad_layer(net: Net, layer: Any, shape: Shape) -> Step:
    """A pad layer takes a value per channel in place of its constant; forwards that needs scales that are not zero."""
    call, constant = net.keep(layer), layer.value  # the rule keeps no layer: a fold would have to refuse it
    after = tuple(call(torch.zeros(shape).double()).shape)
    axes = tuple(a for a in range(len(shape)) if a != 1)
    back, ahead = windowed(same, axes, shape, after)

    def rule(m: Map) -> Map | None:
        return None if bool(((m.scale == 0) & (m.shift != constant)).any()) else m

    return Step("pad layer", call, after, back, lambda m: rule(m) and ahead(m))


# layers that absorb, as the first step of a chain or as the last


def source(draw: Any, net: Net, shape: Shape) -> Step:
    """A layer whose output has this shape and that scales and shifts it along its channel axis."""
    n = len(shape) - 2
    kinds = ["linear", "embedding"] + (["conv", "transposed", "functional"] if n in (1, 2, 3) else [])
    kind = draw(st.sampled_from(kinds if n != 2 else ["conv", "transposed", "functional", "conv", "conv"]))
    axis = 1 if kind in ("conv", "transposed", "functional") else len(shape) - 1
    axes = tuple(a for a in range(len(shape)) if a != axis)
    bias = draw(st.booleans())
    if kind == "linear":
        layer: nn.Module = nn.Linear(3, shape[-1], bias=bias)
        x = torch.randn(*shape[:-1], 3).double()
    elif kind == "embedding":
        layer, x = nn.Embedding(7, shape[-1]), torch.randint(7, shape[:-1])
    else:
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if shape[1] % g == 0]))
        cls = getattr(nn, f"Conv{'Transpose' if kind == 'transposed' else ''}{n}d")
        layer = cls(2 * groups, shape[1], 3, padding=1, groups=groups, bias=bias or kind == "functional")
        x = torch.randn(shape[0], 2 * groups, *shape[2:]).double()
    read, call = net.input(x), net.keep(layer)
    if kind == "functional":
        call = lambda x: getattr(F, f"conv{n}d")(x, layer.weight, layer.bias, padding=1, groups=layer.groups)  # noqa: E731
    return Step(kind, lambda: call(read()), shape, lambda m: None if m.varies(*axes) else m, never)


def sink(draw: Any, net: Net, shape: Shape) -> Step:
    """A layer that reads this shape, and takes a map along its channel axis into its input side."""
    n = len(shape) - 2
    kinds = ["linear"] + (["valid", "padded", "reflect", "transposed"] * 2 if n in (1, 2, 3) else [])
    kind = draw(st.sampled_from(kinds))
    axes = tuple(a for a in range(len(shape)) if a != (len(shape) - 1 if kind == "linear" else 1))
    bias = draw(st.booleans())
    if kind == "linear":
        layer: nn.Module = nn.Linear(shape[-1], 3, bias=bias)
    else:
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if shape[1] % g == 0]))
        padding = {"padded": 1, "reflect": 1}.get(kind, 0)
        mode = {"padding_mode": "reflect"} if kind == "reflect" else {}
        size = 3 if min(shape[2:]) >= 3 else 1
        cls = getattr(nn, f"Conv{'Transpose' if kind == 'transposed' else ''}{n}d")
        padding = padding if min(shape[2:]) > padding else 0
        layer = cls(shape[1], 2 * groups, size, padding=padding, groups=groups, bias=bias, **mode)
        kind = kind if padding or kind == "transposed" else "valid"
    rule = scale_only if kind in ("padded", "transposed") else same
    call = net.keep(layer)
    after = tuple(call(torch.zeros(shape).double()).shape)
    return Step(kind, call, after, never, lambda m: None if m.varies(*axes) else rule(m))


# steps on several values


def joining(draw: Any, net: Net, shape: Shape) -> Step:
    """A sum, a product or a concatenation with what another layer makes."""
    kind = draw(st.sampled_from(["add", "sub", "broadcast", "product", "cat", "cat first", "cat last"]))
    if kind in ("cat", "cat first", "cat last"):
        axis = len(shape) - 1 if kind == "cat last" else 1
        return _concatenation(draw, net, shape, axis, kind == "cat first")
    small = (*shape[:2], *[1] * (len(shape) - 2)) if kind == "broadcast" else shape
    other = [source(draw, net, small)]
    reduced = windowed(same, tuple(range(2, len(shape))), small, shape)[0] if kind == "broadcast" else same
    if kind == "product":
        ways = lambda m: [] if m.shifts else [(m, _trivial(shape)), (_trivial(shape), m)]  # noqa: E731
        return Step(kind, lambda x, y: x * y, shape, ways, scale_only, [other])
    sign = -1.0 if kind == "sub" else 1.0

    def back(m: Map) -> list[tuple[Map | None, Map | None]]:
        scale = Map(m.scale, torch.zeros_like(m.shift))
        return [(m, reduced(scale)), (scale, reduced(Map(m.scale, m.shift * sign)))]

    shift_only: Rule = lambda m: m if bool((m.scale == 1).all()) else None  # noqa: E731
    operation = torch.sub if kind == "sub" else torch.add
    return Step(kind, operation, shape, back, shift_only, [other])


def _trivial(shape: Shape) -> Map:
    return Map(torch.ones(shape).double(), torch.zeros(shape).double())


def _concatenation(draw: Any, net: Net, shape: Shape, axis: int, other_first: bool) -> Step:
    extra = list(shape)
    extra[axis] = 2
    other = [source(draw, net, tuple(extra))]
    start, size = (2, shape[axis]) if other_first else (0, shape[axis])

    def back(m: Map) -> list[tuple[Map, Map]]:
        rest = 0 if other_first else size
        return [tuple(m.each(lambda t, s=s, n=n: t.narrow(axis, s, n)) for s, n in ((start, size), (rest, 2)))]  # type: ignore[list-item]

    def ahead(m: Map) -> Map:
        parts = (_trivial(tuple(extra)), m) if other_first else (m, _trivial(tuple(extra)))
        return Map(torch.cat([p.scale for p in parts], axis), torch.cat([p.shift for p in parts], axis))

    after = list(shape)
    after[axis] += 2
    order = (lambda x, y: torch.cat([y, x], axis)) if other_first else (lambda x, y: torch.cat([x, y], axis))
    return Step("cat", order, tuple(after), back, ahead, [other])


def step(draw: Any, net: Net, shape: Shape, *, join: bool = True) -> Step:
    """Draw any step that the shape admits."""
    makers = [pointwise, pointwise, movement, window, window] + ([joining] if join else [])
    while math.prod(shape) < 4000:
        found = draw(st.sampled_from(makers))(draw, net, shape)
        if found is not None and math.prod(found.shape) > 0 and len(found.shape) <= 5:
            return found
    return pointwise(draw, net, shape)


def norm(draw: Any, net: Net, shape: Shape) -> tuple[Callable[[Tensor], Tensor], Map]:
    """Draw a BatchNorm for a value and the map it applies; its gains may be negative or zero, its shift may be none."""
    cls = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2]
    layer = cls(shape[1])
    call = net.keep(layer)
    signs, shifted = draw(st.sampled_from(["positive", "any", "zero"])), draw(st.booleans())
    with torch.no_grad():
        layer.running_var.uniform_(0.5, 2.0)
        layer.weight.uniform_(0.5, 2.0)
        if signs != "positive":
            layer.weight[0] *= -1 if signs == "any" else 0
        if shifted:
            layer.running_mean.uniform_(-1, 1)
            layer.bias.uniform_(-1, 1)
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        shift = layer.bias - layer.running_mean * scale
    full = [t.reshape(-1, *[1] * (len(shape) - 2)).expand(shape).clone() for t in (scale, shift)]
    return call, Map(full[0], full[1])


def value_shape(draw: Any) -> Shape:
    """Draw the shape of a value: (N, C), tokens, an image or a volume."""
    channels = draw(st.sampled_from([2, 3, 4, 8]))
    return (2, channels, *draw(st.sampled_from([(), (5,), (4, 4), (3, 6), (4, 4, 4)])))
