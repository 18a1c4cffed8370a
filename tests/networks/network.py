"""A network as Python source: how it reads, how it is built, what it is called with.

The forward of a network is a straight list of statements, each of which names its result. That makes a network easy to
read where it fails, and easy to shrink: a statement is left out by letting its readers read what it read.
"""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

HEADER = """\
import functools
from types import SimpleNamespace

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from tests.networks import parts
"""
Call = tuple[tuple[Any, ...], dict[str, Any]]
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Statement:
    """Some lines of a forward: ``code`` assigns ``result``, and reads ``source`` among others."""

    result: str
    source: str
    code: str


@dataclass(frozen=True)
class Network:
    """A network that can be printed and built.

    Attributes:
        seed: Of its values.
        gains: Signs of the gains of its norms: ``"positive"``, ``"signed"``, ``"zeros"``.
        inputs: By name, an expression of the batch size ``n``.
        flags: Further keyword arguments of the forward, with their defaults.
        setup: Statements of ``__init__``.
        body: Statements of ``forward``.
        output: The expression that is returned.
        after: Statements that change ``net`` once it is built: hooks, patches, ties.
        others: Values of flags with which the network is called as well, after it was read without them.
        several: Whether the calls with those flags are examples too, so that the fold must be right in them.
        surroundings: An expression of the handle of a hook of all modules, registered while the network is folded and
            run; empty for none.
        options: Keywords for the fold.
    """

    seed: int
    gains: str
    inputs: dict[str, str]
    setup: tuple[str, ...] = ()
    body: tuple[Statement, ...] = ()
    output: str = "x"
    flags: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    others: tuple[dict[str, Any], ...] = ()
    several: bool = False
    surroundings: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def takes_batches(self) -> bool:
        """Whether its inputs have an axis of samples."""
        return all("(n, " in code for code in self.inputs.values())

    def source(self) -> str:
        """Return the network as Python."""
        arguments = ", ".join(["self", *self.inputs, *(f"{k}={v}" for k, v in self.flags.items())])
        body = "\n".join(s.code for s in self.body)
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [*_indented("\n".join(self.setup)), "", f"    def forward({arguments}):"]
        lines += [*_indented(body), f"        return {self.output}"]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        call = ", ".join(f"{k}={v}" for k, v in self.inputs.items())
        notes = [f"# seed {self.seed}, gains {self.gains}, built in float64, eval mode; called with {call}, n=2"]
        also = "an example too" if self.several else "no example"
        notes += [f"# also called with {other}, {also}" for other in self.others]
        notes += [f"# inside of {self.surroundings}"] if self.surroundings else []
        notes += [f"# fold options: {self.options}"] if self.options else []
        return "\n".join([*notes, self.source(), *self.after])

    def build(self) -> nn.Module:
        """Return the network in float64 and eval mode, its norms with random statistics, gains and shifts."""
        module = _module(f"network_{self.seed}", HEADER + "\n\n" + self.source())
        torch.manual_seed(self.seed)
        with float64():
            net = module.Net().eval()
        randomize_norms(net, self.gains)
        scope = {**vars(module), "net": net}
        for line in self.after:
            exec(line, scope)
        return scope["net"]

    @contextlib.contextmanager
    def surrounded(self) -> Iterator[None]:
        """Run a block with the hooks of all modules that this network is made for."""
        scope: dict[str, Any] = {}
        exec(HEADER, scope)
        handle = eval(self.surroundings, scope) if self.surroundings else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def call(self, seed: int, n: int = 2, **flags: Any) -> Call:
        """Return positional and keyword arguments for the forward, with a batch of ``n``."""
        torch.manual_seed(seed)
        return tuple(eval(code, {"torch": torch, "n": n}) for code in self.inputs.values()), flags

    def shrunk(self) -> Iterator[Network]:
        """Yield networks that have a little less than this one."""
        for index in range(len(self.after)):
            yield replace(self, after=self.after[:index] + self.after[index + 1 :])
        if self.several:
            yield replace(self, several=False)
        if self.surroundings:
            yield replace(self, surroundings="")
        for option in self.options:
            yield replace(self, options={k: v for k, v in self.options.items() if k != option})
        for statement in self.body[:-1]:
            yield self._ends_at(statement.result)
        for index in range(len(self.body)):
            yield self._without(index)
        for index in range(len(self.setup)):
            yield replace(self, setup=self.setup[:index] + self.setup[index + 1 :])
        for name in [] if len(self.inputs) == 1 else self.inputs:
            yield replace(self, inputs={k: v for k, v in self.inputs.items() if k != name})
        for name in self.flags:
            kept = tuple({k: v for k, v in other.items() if k != name} for other in self.others)
            flags = {k: v for k, v in self.flags.items() if k != name}
            yield replace(self, flags=flags, others=tuple(o for o in kept if o))

    def _ends_at(self, name: str) -> Network:
        last = next(i for i, s in enumerate(self.body) if s.result == name)
        return replace(self, body=self.body[: last + 1], output=name)

    def _without(self, index: int) -> Network:
        gone = self.body[index]
        rename: Callable[[str], str] = lambda text: re.sub(rf"\b{gone.result}\b", gone.source, text)  # noqa: E731
        rest = [Statement(s.result, rename(s.source), rename(s.code)) for s in self.body[index + 1 :]]
        return replace(self, body=(*self.body[:index], *rest), output=rename(self.output))


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Make new tensors in float64 inside a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _module(name: str, source: str) -> types.ModuleType:
    """Return a module that runs a source, the same one for the same source: pickles name its classes."""
    module = sys.modules.get(name)
    if module is None or module.__doc__ != source:
        module = sys.modules[name] = types.ModuleType(name, source)
        exec(compile(source, name, "exec"), vars(module))
    return module


def _indented(text: str) -> list[str]:
    return [f"        {line}" for line in text.splitlines()]


@torch.no_grad()
def randomize_norms(net: nn.Module, gains: str) -> None:
    """Give every norm random statistics, gain and shift."""
    for module in net.modules():
        if not isinstance(module, NORMS):
            continue
        for name, low, high in (("running_mean", -1.0, 1.0), ("running_var", 0.5, 2.0), ("bias", -1.0, 1.0)):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                tensor.uniform_(low, high)
        if isinstance(module.weight, Tensor):
            module.weight.uniform_(0.5, 1.5)
            if gains != "positive":
                module.weight.view(-1)[::2] *= -1 if gains == "signed" else 0
