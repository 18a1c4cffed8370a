"""Layers in Tune mode: a product that applies the norm after it, and a norm that stays out of the way.

The product reads the statistics and the affine parameters of the norm at every call, through a reference that is no
part of the module tree, and returns the normalized value (:mod:`normfuse.layers.scaled`). The norm returns its input.
Where the two are a pair no longer (:mod:`normfuse.layers.handshake`), each does what it does in eval mode. A norm that
no product applies does that always. The statistics stay as they are, whatever ``train()`` says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.errors import TuneModeError
from normfuse.layers.change_of_class import STATE, TunedLayer, leave, original_class
from normfuse.layers.clamp import Clamp
from normfuse.layers.handshake import Member
from normfuse.layers.normalized_layer import Pairing, normalized
from normfuse.layers.normalized_value import mark, may_be_unmarked, refuse_value, taken
from normfuse.layers.scaled import (
    needs_plain,
)


@dataclass(slots=True)
class Applied(Member):
    """By which products a norm is applied.

    Attributes:
        tail: Names of the layers inside the norm's module that run after the normalization, in order.
    """

    tail: tuple[str, ...] = ()


class TunedProduct(TunedLayer):
    """A convolution or linear layer that returns the value after its norm."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``z`` of :mod:`normfuse.layers.scaled`, ``(N, out, *)`` or ``(*, out)``; takes what the layer takes.

        Raises:
            TuneModeError: In the place of the norm there is one that would normalize by the batch.
        """
        pairing: Pairing | None = vars(self).get(STATE)
        if pairing is None or not pairing.runs(self, _value(args, kwargs)):
            if pairing is not None:
                pairing.pair.require_fixed_statistics()
            return original_class(self).forward(self, *args, **kwargs)
        if kwargs:
            args = _value(args, kwargs), *args[1:], *(value for key, value in kwargs.items() if key == "output_size")
        return mark(normalized(self, pairing, *args), pairing)

    def __setstate__(self, state: Any) -> None:
        """Be a plain layer in a copy without the norm."""
        super().__setstate__(state)
        pairing = vars(self).get(STATE)
        if pairing is not None and pairing.seat.layer() is not self:
            leave(self)


class FixedStatistics(TunedLayer):
    """A norm by its stored statistics, in whichever mode the model is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer in eval mode where the instance has a ``forward`` of its own."""
        if "forward" not in vars(self):
            return super().__call__(*args, **kwargs)
        with _eval_mode(self):
            return super().__call__(*args, **kwargs)

    def reset_running_stats(self) -> None:
        """Refuse to lose the statistics.

        Raises:
            TuneModeError: Always.
        """
        raise TuneModeError(
            "statistics are fixed in Tune mode and this would lose them: call tune_mode(model, False) first, and "
            "tune_mode again when they are new; normfuse.statistics.reestimate does that by itself"
        )


class TunedNorm(FixedStatistics):
    """A norm that a product applies: returns its input, through whatever else the layer did after normalizing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the input after the layers that follow the normalization inside this one.

        Raises:
            TuneModeError: The input is not the value of a product that applies this norm.
        """
        applied: Applied | None = vars(self).get(STATE)
        x = _value(args, kwargs)
        value = None if applied is None else taken(x, applied, self)
        if applied is None or (value is None and not applied.runs(self, x)):
            return _by_statistics(self, *args, **kwargs)
        if value is None and not may_be_unmarked(x, applied):
            refuse_value(applied)
        for path in applied.tail:
            x = self.get_submodule(path)(x)
        return x


class FixedNorm(FixedStatistics):
    """A norm that no product applies."""

    prefix = "Fixed"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the layer does in eval mode."""
        return _by_statistics(self, *args, **kwargs)


def _by_statistics(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what the layer's class returns in eval mode; what it contains follows the mode of the model."""
    if STATE not in vars(layer):  # it has left Tune mode, and is called by a forward that somebody has kept
        return original_class(layer).forward(layer, *args, **kwargs)
    with _eval_mode(layer):
        return original_class(layer).forward(layer, *args, **kwargs)


@contextlib.contextmanager
def _eval_mode(layer: nn.Module) -> Iterator[None]:
    training, layer.training = layer.training, False
    try:
        yield
    finally:
        layer.training = training


def _value(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a layer's call, which its class may call ``input`` or ``x``."""
    return args[0] if args else next(value for key, value in kwargs.items() if key != "output_size")


class TunedReLU6(TunedLayer):
    """A clamp that keeps its output for backward, which the next layer keeps as well, in place of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input clamped to ``[min_val, max_val]``."""
        x, layer = input, cast(Any, self)
        if not (torch.is_grad_enabled() and x.requires_grad) or needs_plain(x):
            return F.hardtanh(x, layer.min_val, layer.max_val, layer.inplace)
        return cast(Tensor, Clamp.apply(x, layer.min_val, layer.max_val, layer.inplace))
