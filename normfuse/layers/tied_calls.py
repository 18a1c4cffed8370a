"""Layers that a fold made one, and that must run together: a norm, and the layer that took its map.

Where code leaves one of them out (``self.norm(y) if use_norm else y``), the other gives values that the source never
computed. Hooks of a folded model count the calls of both, in each run and each thread, and compare them at its end.
"""

from __future__ import annotations

import collections
import threading
from typing import Any

import torch
from torch import nn

from normfuse.errors import DeployedModelError


class TiedCalls:
    """The ties of a folded model, and what ran of them so far.

    Attributes:
        ties: ``(norm, layer, m, n, led)``, by qualified names: the norm runs ``m`` times where the layer runs ``n``
            times, and not before it where it is ``led``. The layer ``""`` is the model itself.
        counts: The calls of each layer, by thread; only of runs that have not ended.
    """

    def __init__(self) -> None:
        self.ties: list[tuple[str, str, int, int, bool]] = []
        self.counts: dict[int, collections.Counter[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: the ties, and no run."""
        return {"ties": list(self.ties), "counts": {}}

    def count(self, name: str, counts: collections.Counter[str]) -> None:
        """Count a call.

        Raises:
            DeployedModelError: It is that of a norm, and the layer that it follows has not run.
        """
        counts[name] += 1
        for norm, layer, m, n, led in self.ties:
            others = max(m - n, 0)  # calls of the norm that other copies of the layer lead
            if led and norm == name and (counts[norm] - others) * n > counts[layer] * m:
                raise DeployedModelError(
                    f"{norm} runs before {layer}, into which it was folded: the calls of a duplicated layer come in "
                    "another order than in the examples. Fold the source without duplicate_shared"
                )

    def require(self, counts: collections.Counter[str]) -> None:
        """Compare the calls of a run.

        Raises:
            DeployedModelError: A norm and its layer did not run together.
        """
        for norm, layer, m, n, _ in self.ties:
            if counts[norm] * n != counts[layer] * m:
                raise DeployedModelError(
                    f"a branch of this run leaves out a norm, or the layer that it was folded into: {norm} ran "
                    f"{counts[norm]} times and {layer or 'the model'} {counts[layer]} times, in the examples {m} and "
                    f"{n}. Fold the source with example_inputs that take this branch too (normfuse.Examples)"
                )


class _Counting:
    """A hook that knows the ties of its model."""

    def __init__(self, ties: TiedCalls) -> None:
        self.ties = ties


class BeginRun(_Counting):
    """Forward pre-hook of the model: nothing has run yet."""

    def __call__(self, model: nn.Module, args: object) -> None:
        """Start to count."""
        self.ties.counts[_thread()] = collections.Counter({"": 1})


class CountCall(_Counting):
    """Forward hook of a tied layer."""

    def __init__(self, ties: TiedCalls, name: str) -> None:
        super().__init__(ties)
        self.name = name

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        """Count the call; outside of a run of the model nobody asks."""
        if _thread() in self.ties.counts:
            self.ties.count(self.name, self.ties.counts[_thread()])


class EndRun(_Counting):
    """Forward hook of the model."""

    def __call__(self, model: nn.Module, args: object, output: object) -> None:
        """Compare.

        Raises:
            DeployedModelError: A norm and its layer did not run together.
        """
        counts = self.ties.counts.pop(_thread(), None)
        if counts is not None:
            self.ties.require(counts)


def tie_calls(model: nn.Module, norm: str, layer: str, calls: tuple[int, int], *, led: bool = False) -> None:
    """Let a folded model raise where a norm does not run ``calls[0]`` times for ``calls[1]`` runs of its layer.

    With ``led`` also where it runs before that.
    """
    ties = next((hook.ties for hook in model._forward_hooks.values() if isinstance(hook, EndRun)), None)
    if ties is None:
        ties = TiedCalls()
        model.register_forward_pre_hook(BeginRun(ties))
        model.register_forward_hook(EndRun(ties))
    counted = {"", *(name for tie in ties.ties for name in tie[:2])}
    for name in {norm, layer} - counted:
        model.get_submodule(name).register_forward_hook(CountCall(ties, name))
    ties.ties.append((norm, layer, *calls, led))


def counts_only(hook: object) -> bool:
    """Whether a hook does nothing but count calls."""
    return isinstance(hook, _Counting)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
