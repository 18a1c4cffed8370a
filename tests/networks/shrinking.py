"""Make a network that fails smaller, as long as it fails in the same way."""

from __future__ import annotations

import re

from tests.networks.network import Network
from tests.networks.oracles import Verdict, check

ATTEMPTS = 150


def shrink(network: Network, verdict: Verdict, *, extras: bool) -> tuple[Network, Verdict]:
    """Return a small network with a verdict of the same kind, and that verdict."""
    attempts, smaller = 0, True
    while smaller:
        smaller = False
        for candidate in network.shrunk():
            attempts += 1
            if attempts > ATTEMPTS:
                return network, verdict
            found = _verdict(candidate, verdict.reader, extras)
            if found is not None and kind(found) == kind(verdict):
                network, verdict, smaller = candidate, found, True
                break
    return network, verdict


def _verdict(network: Network, reader: str, extras: bool) -> Verdict | None:
    try:
        verdicts = check(network, (reader,), extras=extras)
    except Exception:  # what was left out is needed: the network cannot be built
        return None
    return verdicts[0] if verdicts else None


def kind(verdict: Verdict) -> str:
    """Return a verdict without its numbers and names, to count verdicts of one kind together."""
    text = re.sub(r"'[^']*'|\d[\d.e+-]*|\b(v|self|net)[\w.]*", "~", verdict.detail)
    return f"{verdict.reader} {verdict.kind}: {text[:110]}"
