"""A network while it is written: what was drawn so far runs, so that every statement is tried before it is kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tests.networks.network import HEADER, Network, Statement, float64

T = TypeVar("T")
LARGEST, ELEMENTS, AXES = 1e4, 3000, 5  # of the values of a network


class Draft:
    """A network that grows statement by statement.

    Attributes:
        random: What every choice is drawn from.
        values: The value of each name in scope of the forward.
        channels_at: The axis of the channels of pictures, signals and volumes: 0 where the network takes no batch.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.seed = seed
        self.scope: dict[str, Any] = {}
        exec(HEADER, self.scope)
        self.net = nn.Module()
        self.scope["self"] = self.net
        self.values: dict[str, Tensor] = {}
        self.inputs: dict[str, str] = {}
        self.flags: dict[str, str] = {}
        self.others: list[dict[str, Any]] = []
        self.setup: list[str] = []
        self.body: list[Statement] = []
        self.after: list[str] = []
        self.surroundings = ""
        self.channels_at = 1
        self._counts: dict[str, int] = {}

    # choices

    def one(self, *options: T) -> T:
        """Return one of the options."""
        return self.random.choice(options)

    def weighted(self, options: dict[T, float]) -> T:
        """Return one of the options, by weight."""
        return self.random.choices(list(options), list(options.values()))[0]

    def chance(self, share: float) -> bool:
        """Whether something happens that does so in this share of cases."""
        return self.random.random() < share

    def name(self, stem: str) -> str:
        """Return a name that is not taken: ``"conv1"``."""
        self._counts[stem] = self._counts.get(stem, 0) + 1
        return f"{stem}{self._counts[stem]}"

    # what stands

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value."""
        return tuple(self.values[name].shape)

    def channels(self, name: str) -> int:
        """Return the size of the channel axis of a value, 0 where it has none."""
        return dict(enumerate(self.shape(name))).get(self.channels_at, 0)

    def spatial(self, name: str) -> int:
        """Return how many axes follow the channels."""
        return len(self.shape(name)) - 1 - self.channels_at

    def same_shape(self, name: str) -> list[str]:
        """Return the names of other values of the same shape."""
        return [n for n, value in self.values.items() if n != name and value.shape == self.values[name].shape]

    def layers(self, *classes: type[nn.Module]) -> list[str]:
        """Return the attributes that are layers of these classes."""
        return [name for name, module in self.net._modules.items() if isinstance(module, classes)]

    # growth

    def input(self, code: str) -> str:
        """Add an input by an expression of the batch size ``n``; return its name."""
        name = "xyzw"[len(self.inputs)]
        self.inputs[name] = code
        self.values[name] = eval(code, {"torch": torch, "n": 2})
        return name

    def flag(self, name: str, default: str, other: Any) -> None:
        """Add a keyword argument of the forward, and a value of it for another call."""
        if name not in self.flags:
            self.flags[name] = default
            self.scope[name] = eval(default)
            self.others.append({name: other})

    def make(self, *lines: str) -> bool:
        """Add statements to ``__init__``; return whether they ran."""
        tables = (self.net._modules, self.net._parameters, self.net._buffers)
        before = [dict(table) for table in tables]
        try:
            with float64():
                for line in lines:
                    exec(line, self.scope)
        except Exception:  # a layer with these sizes does not exist
            for table, kept in zip(tables, before, strict=True):
                table.clear()
                table.update(kept)
            return False
        self.net.eval()
        self.setup += lines
        return True

    def say(self, source: str, code: str, *, like: Sequence[int] | None = None) -> str | None:
        """Add a statement that reads ``source``: an expression, or lines that assign ``OUT``.

        Returns:
            The name of its value; None where it does not run, or its value is of no use.
        """
        result = f"v{len(self.body) + 1}"
        lines = code.replace("OUT", result) if "OUT" in code else f"{result} = {code}"
        scope = {**self.scope, **{name: value.clone() for name, value in self.values.items()}}
        try:
            with torch.no_grad():
                exec(lines, scope)
        except Exception:  # an operation for other shapes than these
            return None
        value = scope[result]
        if not _usable(value) or (like is not None and tuple(value.shape) != tuple(like)):
            return None
        self.values |= {name: scope[name] for name in self.values}  # a statement may write into what it reads
        self.values[result] = value
        self.body.append(Statement(result, source, lines))
        return result

    def finish(self, output: str, gains: str, options: dict[str, Any], *, several: bool) -> Network:
        """Return the network."""
        code = (tuple(self.setup), tuple(self.body), output, self.flags, tuple(self.after))
        several = several and bool(self.others)
        return Network(self.seed, gains, self.inputs, *code, tuple(self.others), several, self.surroundings, options)


def _usable(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dim() > AXES or not 0 < value.numel() <= ELEMENTS:
        return False
    return not value.is_floating_point() or bool(value.isfinite().all() and value.abs().max() < LARGEST)
