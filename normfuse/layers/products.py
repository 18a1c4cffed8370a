"""Convolutions and linear layers as functions of ``(x, weight, bias)``, with their two gradients.

    y = W x + b        dx = W^T dy        dW = dy x^T        db = sum of dy over all but the channels

Layouts of the weight: ``(out, in/groups, *k)`` for convolutions, ``(in, out/groups, *k)`` for transposed ones,
``(out, in)`` for linear layers. Channels are axis 1 of a convolution's output and the last axis of a linear layer's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from normfuse import numerics

Needed = tuple[bool, bool, bool]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


class Product(Protocol):
    """A layer that multiplies by a weight."""

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``W x + b``."""
        ...

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needed: Needed, dtype: torch.dtype) -> Gradients:
        """Return the gradients of ``x``, the weight and, in ``dtype``, a bias; None where not needed."""
        ...

    def total(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum of the gradient of the output over all but the channels, ``(out,)``, in ``dtype``."""
        ...

    def by_output(self, weight: Tensor) -> Tensor:
        """Return a view of the weight in which the output channels are the axes that :meth:`per_output` fills."""
        ...

    def per_output(self, vector: Tensor, weight: Tensor) -> Tensor:
        """Return a vector of the output channels, ``(out,)``, that broadcasts over :meth:`by_output`."""
        ...

    def per_channel(self, vector: Tensor, y: Tensor) -> Tensor:
        """Return a vector of the output channels that broadcasts over the output ``y``."""
        ...

    def output_size(self, x: torch.Size, weight: torch.Size) -> int:
        """Return the number of elements of the output, for shapes of the input and the weight."""
        ...


class Convolution(NamedTuple):
    """The geometry of a convolution over a batch; padding is with zeros and equal on both sides."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``W x + b``, ``(N, out, *)``."""
        return torch.convolution(x, weight, bias, *self._geometry())

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needed: Needed, dtype: torch.dtype) -> Gradients:
        """Return the gradients of ``x``, the weight and, in ``dtype``, a bias; None where not needed."""
        for_x, for_weight, for_bias = needed
        dx, dw = None, None
        if for_x or for_weight:
            run = torch.ops.aten.convolution_backward.default
            dx, dw, _ = run(grad, x, weight, None, *self._geometry(), [for_x, for_weight, False])
        return dx if for_x else None, dw if for_weight else None, self.total(grad, dtype) if for_bias else None

    def total(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum over all but the channels, in ``dtype``; oneDNN's, made one by one, is less precise."""
        return grad.sum((0, *range(2, grad.dim())), dtype=dtype)

    def _geometry(self) -> Any:
        output_padding = self.output_padding or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, self.transposed, output_padding, self.groups

    def by_output(self, weight: Tensor) -> Tensor:
        """Return the weight as it is, ``(out, in/g, *k)``, or of a transposed one ``(g, in/g, out/g, *k)``."""
        return numerics.by_output(weight, self.groups, True) if self.transposed else weight

    def per_output(self, vector: Tensor, weight: Tensor) -> Tensor:
        """Return ``(out, 1, 1...)``, or of a transposed one ``(g, 1, out/g, 1...)``."""
        return numerics.per_output(vector, weight, self.groups, self.transposed)

    def per_channel(self, vector: Tensor, y: Tensor) -> Tensor:
        """Return ``(out, 1...)``."""
        return vector.reshape(-1, *[1] * (y.dim() - 2))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - of a value that only tells a geometry
    def output_size(self, x: torch.Size, weight: torch.Size) -> int:
        """Return the number of elements of the output, for shapes of the input and the weight."""
        out = weight[1] * self.groups if self.transposed else weight[0]
        lengths = (self._length(axis, size, weight[axis + 2]) for axis, size in enumerate(x[2:]))
        return x[0] * out * math.prod(lengths)

    def _length(self, axis: int, size: int, taps: int) -> int:
        reach = self.dilation[axis] * (taps - 1)
        if self.transposed:
            more = self.output_padding[axis] if self.output_padding else 0
            return (size - 1) * self.stride[axis] - 2 * self.padding[axis] + reach + more + 1
        return (size + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer, over the last axis."""

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``W x + b``, ``(*, out)``."""
        return F.linear(x, weight, bias)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needed: Needed, dtype: torch.dtype) -> Gradients:
        """Return the gradients of ``x``, the weight and, in ``dtype``, a bias; None where not needed."""
        dx = grad @ weight if needed[0] else None
        dw = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]) if needed[1] else None
        return dx, dw, self.total(grad, dtype) if needed[2] else None

    def total(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum over all but the channels, ``(out,)``, in ``dtype``."""
        return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype)

    def by_output(self, weight: Tensor) -> Tensor:
        """Return the weight, ``(out, in)``."""
        return weight

    def per_output(self, vector: Tensor, weight: Tensor) -> Tensor:
        """Return ``(out, 1)``."""
        return vector.unsqueeze(1)

    def per_channel(self, vector: Tensor, y: Tensor) -> Tensor:
        """Return ``(out,)``."""
        return vector

    def output_size(self, x: torch.Size, weight: torch.Size) -> int:
        """Return the number of elements of the output, for shapes of the input and the weight."""
        return math.prod(x[:-1]) * weight[0]
