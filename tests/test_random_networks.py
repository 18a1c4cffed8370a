"""Random networks as users write them: folded, they compute what they did, or say why not."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.networks import oracles
from tests.networks.network import Network, Statement
from tests.networks.oracles import READERS, Verdict, check
from tests.networks.programs import network
from tests.networks.shrinking import shrink

NETWORKS, AT_ONCE = 200, 20
FAILURES = ("wrong", "crash")

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of layers that are used as random networks use them


@pytest.mark.parametrize("first", range(0, NETWORKS, AT_ONCE))
def test_random_networks(first: int):
    counts: Counter[str] = Counter()
    for seed in range(first, first + AT_ONCE):
        net = network(seed)
        readers = ("recorded", "traced", "exported") if seed % 20 == 0 else ("recorded", "traced")
        for verdict in check(net, readers, extras=seed % 10 == 0):
            assert verdict.kind not in FAILURES, f"{verdict.reader}: {verdict.detail}\n{net}"
            counts[verdict.kind] += 1
            counts["folded"] += verdict.folded
    assert counts["right"] > AT_ONCE
    assert counts["folded"] > AT_ONCE // 2


def test_a_seed_is_one_network():
    for seed in range(5):
        one, other = network(seed), network(seed)
        assert str(one) == str(other)
        torch.manual_seed(1)
        values = [[t.clone() for t in net.build().state_dict().values()] for net in (one, other)]
        assert all(map(torch.equal, *values))


def test_a_network_is_python():
    for seed in range(20):
        ast.parse(str(network(seed)))


# The oracle finds what is wrong, and shrinks it.

PLAIN = Network(
    seed=3,
    gains="signed",
    inputs={"x": "torch.randn(n, 3, 6, 6, dtype=torch.float64)"},
    setup=("self.conv = nn.Conv2d(3, 4, 3)", "self.bn = nn.BatchNorm2d(4)", "self.act = nn.ReLU()"),
    body=(
        Statement("v1", "x", "v1 = self.act(x)"),
        Statement("v2", "v1", "v2 = self.conv(v1)"),
        Statement("v3", "v2", "v3 = self.bn(v2)"),
        Statement("v4", "v3", "v4 = self.act(v3)"),
    ),
    output="v4",
)


def verdict_of(net: Network, reader: str = "recorded") -> Verdict:
    (verdict,) = check(net, (reader,), extras=True)
    return verdict


@pytest.mark.parametrize("reader", READERS)
def test_a_plain_network_is_folded(reader: str):
    assert verdict_of(PLAIN, reader) == Verdict(reader, "right", "", 1, 1)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module, nn.Module], object]) -> None:
    """Let every fold change its result, or its source, as well."""
    apply = oracles.api.apply

    def spoilt(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = apply(model, *args, **kwargs)
        with torch.no_grad():
            change(model, result.model)
        return result

    monkeypatch.setattr(oracles.api, "apply", spoilt)


SPOILT: dict[str, tuple[Callable[[nn.Module, Any], object], str, str]] = {
    "a value": (lambda source, model: model.conv.weight.mul_(1 + 1e-6), "wrong", "differs by .* on the example"),
    "a layer": (lambda source, model: delattr(model, "conv"), "wrong", "raises AttributeError on the example"),
    "the source": (lambda source, model: source.conv.bias.add_(1), "wrong", "the source model was changed"),
    "its mode": (lambda source, model: source.train(), "wrong", "the source model was changed"),
    "an error": (lambda source, model: source.bn.nothing, "crash", "AttributeError: 'BatchNorm2d' object has no"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_is_found_and_shrunk(what: str, monkeypatch: pytest.MonkeyPatch):
    change, kind, detail = SPOILT[what]
    spoil(monkeypatch, change)
    verdict = verdict_of(PLAIN)
    assert verdict.kind == kind
    assert re.match(detail, verdict.detail)
    small, again = shrink(PLAIN, verdict, extras=False)
    assert (again.kind, len(small.body)) == (kind, 0 if kind == "crash" or "source" in detail else 1)


def test_a_norm_that_the_report_leaves_out_is_found(monkeypatch: pytest.MonkeyPatch):
    apply = oracles.api.apply
    monkeypatch.setattr(
        oracles.api, "apply", lambda *a, **k: replace(r := apply(*a, **k), report=replace(r.report, outcomes=()))
    )
    assert verdict_of(PLAIN) == Verdict("recorded", "wrong", "the report does not list once: bn")
