"""What the ShiftQuant layers share: their precision, and the quantized weight that they keep between calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from normfuse.quantization.matmul import Prepared
from normfuse.quantization.shiftquant import ShiftQuant

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Precision:
    """How a layer quantizes its operands.

    Args:
        bits: Of activations and weights, 3 to 8.
        groups: Of activations.
        weight_groups: Of weights; as ``groups`` by default.
        grad_bits: Of gradients; as ``bits`` by default.
        grad_groups: Of gradients; as ``groups`` by default.
        range: Of activations, as in :class:`ShiftQuant`. Weights and gradients are never clipped. The gradient passes
            what a percentile clips unchanged.

    Raises:
        ValueError: An argument out of its range.
    """

    bits: int = 8
    groups: int = 4
    weight_groups: int | None = None
    grad_bits: int | None = None
    grad_groups: int | None = None
    range: Literal["max"] | float = "max"

    def __post_init__(self) -> None:
        for quantizer in ("activation", "weight", "gradient"):
            getattr(self, quantizer)

    @property
    def activation(self) -> ShiftQuant:
        """The quantizer of inputs."""
        return ShiftQuant(self.bits, self.groups, range=self.range)

    @property
    def weight(self) -> ShiftQuant:
        """The quantizer of weights."""
        return ShiftQuant(self.bits, self.groups if self.weight_groups is None else self.weight_groups)

    @property
    def gradient(self) -> ShiftQuant:
        """The quantizer of gradients."""
        bits = self.bits if self.grad_bits is None else self.grad_bits
        return ShiftQuant(bits, self.groups if self.grad_groups is None else self.grad_groups, "stochastic")


class QuantizingLayer(nn.Module):
    """A layer with a precision, and a quantized weight that it keeps in eval mode while the weight stays.

    It keeps it until the parameter is replaced, changed in place or moved. A change through ``weight.data`` in eval
    mode is not seen: call ``train()`` or ``eval()`` after it.
    """

    precision: Precision
    _kept: tuple[weakref.ref[Tensor], tuple[int, int], list[Prepared]] | None = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget the quantized weight."""
        self._kept = None
        return super().train(mode)

    def extra_repr(self) -> str:
        """Show the layer as torch does, and the precision."""
        return f"{super().extra_repr()}, {self.precision}"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._kept = None
        return super()._apply(fn, recurse)

    def weight_rows(self, weight: Tensor) -> list[Tensor]:
        """Return the right operand ``(N, K)`` of each product."""
        raise NotImplementedError

    def prepared(self) -> list[Prepared]:
        """Return the right operand of each product, made now or kept from an earlier call."""
        weight = self._stored()
        if self.training or weight.is_inference():
            self._kept = None
            return self._quantize(weight, reused=False)
        state = (weight._version, weight.data_ptr())
        if self._kept is None or self._kept[0]() is not weight or self._kept[1] != state:
            self._kept = weakref.ref(weight), state, self._quantize(weight, reused=True)
        return self._kept[2]

    def _stored(self) -> Tensor:
        """Return the tensor that the right operands are made of."""
        return cast("Any", self).weight

    def _quantize(self, weight: Tensor, *, reused: bool) -> list[Prepared]:
        quantizer = self.precision.weight
        return [Prepared(quantizer(rows, dim=1), reused=reused) for rows in self.weight_rows(weight.detach())]


def require_plain(module: nn.Module, base: type[nn.Module]) -> None:
    """Raise TypeError unless ``module`` computes what ``base`` does, from plain parameters, with no hook."""
    name = type(module).__name__
    if not isinstance(module, base) or type(module).forward is not base.forward:
        raise TypeError(f"{name} does not compute what {base.__name__} does: write its quantized form by hand")
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise TypeError(f"the weight of this {name} is computed or parametrized: materialise it first")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise TypeError(f"this {name} has hooks, which the new layer would not call: remove them first")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function`` as one that ``torch.compile`` calls instead of reading: it picks engines by their time."""
    return cast("Callable[P, R]", torch.compiler.disable(function))
