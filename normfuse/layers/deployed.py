"""Layers that stand only in folded models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import DeployedModelError


class ChannelPad(nn.Module):
    """Pad the trailing axes of ``(N, C, *)`` with one constant per channel.

    What a constant pad becomes when a shift moves through it.

    Args:
        padding: As for ``torch.nn.functional.pad``, last axis first.
        channels: C. The values are the buffer ``value``, ``(C,)``.
    """

    value: Tensor

    def __init__(self, padding: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.padding = tuple(padding)
        self.register_buffer("value", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` of shape ``(N, C, *)``, padded."""
        value = self.value.reshape(-1, *[1] * (x.dim() - 2))
        border = nn.functional.pad(torch.zeros_like(x[:1, :1]), self.padding, value=1.0)
        return nn.functional.pad(x, self.padding) + border * value

    def extra_repr(self) -> str:
        """Show the padding."""
        return f"padding={self.padding}, channels={self.value.numel()}"


class Placeholder(nn.Identity):
    """Stands where a norm was whose attributes the code of the model reads: an identity that answers for them.

    Its tensors answer for type, device and shape; their values are those of a norm that is gone, and NaN.

    Args:
        attributes: Pairs of a name and a number, a text, a tuple or None.
        tensors: Pairs of the name and the shape of a parameter or buffer; they are no part of the ``state_dict``.
    """

    def __init__(self, attributes: Sequence[tuple[str, Any]], tensors: Sequence[tuple[str, Sequence[int]]]) -> None:
        super().__init__()
        for name, value in attributes:
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        for name, shape in tensors:
            self.register_buffer(name, torch.full(tuple(shape), torch.nan), persistent=False)


class OneRank(Placeholder):
    """Stands where a BatchNorm1d was that was folded without an example: an identity of values of one rank.

    A signal without a batch, ``(C, L)``, has its channels on another axis than ``(N, C, L)``, and the norm took both.

    Args:
        rank: How many axes the fold took the value to have.
        attributes: As for :class:`Placeholder`, and ``tensors``.
    """

    def __init__(
        self, rank: int, attributes: Sequence[tuple[str, Any]] = (), tensors: Sequence[tuple[str, Sequence[int]]] = ()
    ) -> None:
        super().__init__(attributes, tensors)
        self.rank = rank

    def forward(self, input: Tensor) -> Tensor:
        """Return the input.

        Raises:
            DeployedModelError: It has another rank.
        """
        if isinstance(input, Tensor) and input.dim() != self.rank:
            raise DeployedModelError(
                f"this model was folded without an example, for values of {self.rank} axes where this one has "
                f"{input.dim()}: fold the source with example_inputs"
            )
        return input


class NotReached:
    """Stands in for the ``forward`` of a layer that no example reached and that could read a changed value.

    Args:
        name: Qualified name of the layer.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise, whatever the layer is called with.

        Raises:
            DeployedModelError: Always.
        """
        raise DeployedModelError(
            f"{self.name} ran in no example that this model was folded with, and may be given values that the fold "
            "changed: fold the source with example_inputs that run it, several if need be (normfuse.Examples)"
        )


class CallSites(nn.Module):
    """One layer that a model calls several times per run, as so many layers, one for each call.

    The calls are counted from the start of each run of the model; :func:`reset_calls`, a forward pre-hook of the model,
    sets the count back.

    Args:
        module: The layer; it serves the first call.
        copies: Number of calls per run.
    """

    def __init__(self, module: nn.Module, copies: int) -> None:
        super().__init__()
        self.sites = nn.ModuleList([module, *(copy.deepcopy(module) for _ in range(copies - 1))])
        self.turn = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer whose turn it is.

        Raises:
            DeployedModelError: There were as many calls in this run as there are layers.
        """
        if self.turn == len(self.sites):
            raise DeployedModelError(
                f"a layer with weights of its own for each of {self.turn} calls is called once more, unlike in any "
                "example: fold the source with example_inputs that call it so often"
            )
        site = self.sites[self.turn]
        self.turn += 1
        return site(*args, **kwargs)


def reset_calls(model: nn.Module, args: object) -> None:
    """Forward pre-hook: let every :class:`CallSites` of ``model`` start with its first layer."""
    for module in model.modules():
        if isinstance(module, CallSites):
            module.turn = 0


class FirstArgument(nn.Module):
    """What is left of a norm that is called with more than its input (a padding mask): a module on the input alone.

    Args:
        module: Runs on the first argument.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """Return what the module makes of ``x``."""
        return self.module(x)


class ChannelClamp(nn.Module):
    """Clamp between zero and one bound per channel: what ReLU6 becomes when the channels in front of it are scaled.

    Args:
        channels: C. The bounds are the buffer ``bound``, ``(C,)``.
        dim: The axis of the channels.
    """

    bound: Tensor

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("bound", torch.full((channels,), 6.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``min(max(x, 0), bound)``, of the shape of ``x``."""
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return torch.minimum(torch.relu(x), self.bound.reshape(shape))

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return f"channels={self.bound.numel()}, dim={self.dim}"
