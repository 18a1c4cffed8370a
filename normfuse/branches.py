"""Values as one convolution of an earlier value.

    form(x) = W * x + b,   W with a stride, a padding, a dilation and groups

The identity, a per-channel map and a sum of forms are forms again: a map ``a x + c`` is a 1x1 kernel with ``a`` on its
diagonal, and kernels with a common centre add up once the smaller is padded with zeros to the larger (RepVGG,
arXiv 2101.03697). All arithmetic is in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.numerics import exact


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """A convolution ``W * x + b`` that was not run.

    Attributes:
        weight: ``(out, in/groups, *k)`` in float64; None for a per-channel map, which fits any groups.
        scale: ``(C,)``, the per-channel map where ``weight`` is None.
        bias: ``(out,)``.
        cost: Multiply-adds per output position of the convolutions that the form stands for.
        joins: Number of sums inside.
    """

    weight: Tensor | None
    scale: Tensor | None
    bias: Tensor
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    cost: int = 0
    joins: int = 0

    @classmethod
    def channelwise(cls, scale: Tensor, shift: Tensor) -> Form:
        """Return the form of ``scale * x + shift``, both ``(C,)``."""
        return cls(None, exact(scale), exact(shift))

    @classmethod
    def convolution(
        cls, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...],
        dilation: tuple[int, ...], groups: int,
    ) -> Form:  # fmt: skip
        """Return the form of a convolution that pads with zeros, each argument as in ``torch.nn.functional.conv2d``."""
        bias = torch.zeros(weight.shape[0]) if bias is None else bias
        return cls(exact(weight), None, exact(bias), stride, padding, dilation, groups, weight.numel())

    def then(self, scale: Tensor, shift: Tensor) -> Form:
        """Return the form followed by a per-channel map."""
        bias = scale * self.bias + shift
        if self.weight is None:
            assert self.scale is not None
            return self._with(None, scale * self.scale, bias)
        return self._with(self.weight * scale.reshape(-1, *[1] * (self.weight.dim() - 1)), None, bias)

    def _with(self, weight: Tensor | None, scale: Tensor | None, bias: Tensor) -> Form:
        geometry = (self.stride, self.padding, self.dilation, self.groups, self.cost, self.joins)
        return Form(weight, scale, bias, *geometry)

    def map(self, m: AffineMap) -> Form:
        """Return the form followed by an affine map over axis 1.

        Raises:
            Refused: The map varies along another axis, or is one of another number of channels.
        """
        return self.then(*m.vectors(1, self.bias.numel(), "the sum of branches"))


def add(left: Form, right: Form) -> Form:
    """Return the sum of two forms of the same value.

    Raises:
        Refused: Their geometry differs, so that no one convolution does both.
    """
    joins = left.joins + right.joins + 1
    if left.weight is None and right.weight is None:
        assert left.scale is not None
        assert right.scale is not None
        _require_same(left.scale.numel(), right.scale.numel(), "numbers of channels")
        return Form(None, left.scale + right.scale, left.bias + right.bias, joins=joins)
    if left.weight is None:
        left, right = right, left
    right = _as_convolution(right, left) if right.weight is None else right
    return _add_convolutions(left, right, joins)


def _as_convolution(channelwise: Form, like: Form) -> Form:
    """Return a per-channel map as a 1x1 convolution with the groups of another."""
    assert like.weight is not None
    assert channelwise.scale is not None
    out, rank = like.weight.shape[0], like.weight.dim() - 2
    channels = channelwise.scale.numel()
    _require_same(out, channels, "numbers of channels")
    _require_same(like.weight.shape[1] * like.groups, channels, "numbers of channels")
    per_group = channels // like.groups
    rows = torch.arange(channels)
    weight = torch.zeros(channels, per_group, dtype=torch.float64)
    weight[rows, rows % per_group] = channelwise.scale
    ones, zeros = (1,) * rank, (0,) * rank
    return Form(
        weight.reshape(channels, per_group, *ones), None, channelwise.bias, ones, zeros, ones, like.groups, 0,
        channelwise.joins,
    )  # fmt: skip


def _add_convolutions(left: Form, right: Form, joins: int) -> Form:
    assert left.weight is not None
    assert right.weight is not None
    _require_same(left.weight.shape[0], right.weight.shape[0], "numbers of channels")
    _require_same(left.weight.shape[1] * left.groups, right.weight.shape[1] * right.groups, "numbers of channels")
    _require_same(left.stride, right.stride, "strides")
    dilation = _common_dilation(left, right)
    groups = math.gcd(left.groups, right.groups)
    padding = tuple(map(max, left.padding, right.padding))
    parts = [_centred(form, padding, dilation, groups) for form in (left, right)]
    _require_same(parts[0].shape, parts[1].shape, "kernel centres")
    cost = left.cost + right.cost
    bias = left.bias + right.bias
    return Form(parts[0] + parts[1], None, bias, left.stride, padding, dilation, groups, cost, joins)


def _common_dilation(left: Form, right: Form) -> tuple[int, ...]:
    """A kernel of one tap has any dilation."""
    assert left.weight is not None
    assert right.weight is not None
    common = []
    for a, b, size_a, size_b in zip(
        left.dilation, right.dilation, left.weight.shape[2:], right.weight.shape[2:], strict=True
    ):
        if size_a > 1 and size_b > 1:
            _require_same(a, b, "dilations")
        common.append(a if size_a > 1 else b if size_b > 1 else 1)
    return tuple(common)


def _centred(form: Form, padding: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> Tensor:
    """Return the kernel with zero taps around it, so that it goes with a larger padding, and with fewer groups."""
    assert form.weight is not None
    border: list[int] = []
    for have, want, step in zip(reversed(form.padding), reversed(padding), reversed(dilation), strict=True):
        if (want - have) % step:
            raise Refused(Reason.NOT_CHEAPER, "parallel convolutions have different kernel centres")
        border += [(want - have) // step] * 2
    return torch.nn.functional.pad(_regrouped(form.weight, form.groups, groups), border)


def _regrouped(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """Return ``(out, in/groups, *k)`` as ``(out, in/fewer, *k)`` with zeros between groups."""
    if groups == fewer:
        return weight
    out, per_group = weight.shape[:2]
    ratio = groups // fewer
    wide = weight.new_zeros(out, ratio, per_group, *weight.shape[2:])
    rows = torch.arange(out)
    wide[rows, (rows // (out // groups)) % ratio] = weight
    return wide.reshape(out, ratio * per_group, *weight.shape[2:])


def _require_same(left: object, right: object, what: str) -> None:
    if left != right:
        raise Refused(Reason.NOT_CHEAPER, f"parallel branches have different {what}")
