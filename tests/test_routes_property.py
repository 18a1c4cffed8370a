"""Random networks around a norm: what the table of rules allows is folded, exactly; what it does not is refused."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normfuse import api
from normfuse.report import Status
from tests import random_routes as routes
from tests.parity import EXACT, error, outputs
from tests.random_routes import Net, Step


def check(net: Net, bounds: tuple[bool, bool], trail: list[str]) -> None:
    """Fold a network with one norm; compare its outputs, and the verdict with what must and what may be folded."""
    inputs = tuple(net.examples)
    expected = outputs(net.eval(), inputs)
    (outcome,) = api.apply(net, ["fold-bn"], example_inputs=inputs, inplace=True).report.norms
    worst = max(map(error, expected, outputs(net, inputs)))
    assert worst <= EXACT, f"{' > '.join(trail)} differs by {worst:.3g}"
    folded = outcome.status is Status.APPLIED
    must, may = bounds
    assert must <= folded <= may, f"{' > '.join(trail)}: {outcome.refusal or 'folded'}"


@settings(max_examples=250)
@given(st.data())
def test_backwards(data: st.DataObject):
    """A source, some steps, the norm, and behind it what no map passes."""
    net, draw = Net(), data.draw
    steps: list[Step] = [routes.source(draw, net, routes.value_shape(draw))]
    for _ in range(draw(st.integers(0, 4))):
        steps.append(routes.step(draw, net, steps[-1].shape))
    norm, m = routes.norm(draw, net, steps[-1].shape)
    leak = draw(st.sampled_from([None] * 5 + list(range(len(steps)))))
    net.body = lambda: _with_leak(steps, norm, leak)
    bounds = (routes.allowed_back(steps, m, leak, strict=True), routes.allowed_back(steps, m, leak))
    check(net, bounds, [s.name for s in steps])


def _with_leak(steps: list[Step], norm: Any, leak: int | None) -> Any:
    """Run the chain, the norm and a sigmoid; return a value on the way as well."""
    if leak is None:
        return norm(routes.run(steps)).sigmoid()
    early = routes.run(steps[: leak + 1])
    return norm(routes.run(steps[leak + 1 :], early)).sigmoid(), early


@settings(max_examples=250)
@given(st.data())
def test_forwards(data: st.DataObject):
    """The norm on an input, and behind it one or two chains that end in a layer."""
    net, draw = Net(), data.draw
    shape = routes.value_shape(draw)
    read = net.input(torch.randn(shape).double())
    norm, m = routes.norm(draw, net, shape)
    chains = [_branch(draw, net, shape) for _ in range(draw(st.integers(1, 2)))]
    net.body = lambda: _fan_out(norm(read()), chains)
    allowed = all(_absorbed(chain, m) for chain in chains)
    check(net, (allowed, allowed), [s.name for chain in chains for s in chain])


def _branch(draw: Any, net: Net, shape: routes.Shape) -> list[Step]:
    steps: list[Step] = []
    for _ in range(draw(st.integers(0, 3))):
        steps.append(routes.step(draw, net, steps[-1].shape if steps else shape))
    return [*steps, routes.sink(draw, net, steps[-1].shape if steps else shape)]


def _fan_out(value: Tensor, chains: list[list[Step]]) -> Any:
    return [routes.run(chain, value).sigmoid() for chain in chains]


def _absorbed(chain: list[Step], m: routes.Map | None) -> bool:
    for step in chain:
        if m is None or m.trivial:
            break
        m = step.ahead(m)
    return m is not None
