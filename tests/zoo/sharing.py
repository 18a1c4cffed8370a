"""Models where somebody else reads the value, the weights or the norm: a fold may not change what they see."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.base import Reason
from tests.zoo.trap import FOLDED, trap


class ConvBN(nn.Module):
    """One conv, one norm; what the models of this file vary."""

    def __init__(self, **conv: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, **conv)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).sigmoid()


class TwoNorms(ConvBN):
    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(4)


@trap(bn=Reason.SHARED_MODULE)
class SharedConv(ConvBN):
    """The conv is also called without its norm: the value has one reader, the weights have two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv(x * 2).sigmoid()


@trap(bn=Reason.SHARED_MODULE, bn2=Reason.SHARED_MODULE)
class SharedConvTwoNorms(TwoNorms):
    """One conv called twice, each call with a norm of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).sigmoid() + self.bn2(self.conv(x.flip(3))).sigmoid()


@trap(bn=FOLDED)
class SharedBlock(ConvBN):
    """Conv and norm are shared together: every call of one goes with a call of the other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x)) + super().forward(x[:, :, ::2, ::2]).mean()


@trap(bn=FOLDED)
class SharedNorm(ConvBN):
    """One norm after two convs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).sigmoid() + self.bn(self.conv2(x)).sigmoid()


@trap(bn=Reason.EXTRA_CONSUMER)
class SharedNormOneFree(ConvBN):
    """One norm after a conv and on the input: it cannot go."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).sigmoid() + self.bn(x).sigmoid()


@trap(bn=Reason.SHARED_PARAMETER)
class TiedParameters(ConvBN):
    """Another conv holds the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 3)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).sigmoid() + self.other(x).mean()


@trap(bn=Reason.SHARED_PARAMETER)
class WeightReadDirectly(ConvBN):
    """The forward pass also reads the weight, without a call of its layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv.weight.mean()


@trap(bn=Reason.EXTRA_CONSUMER, bn2=Reason.EXTRA_CONSUMER)
class ConvIntoTwoNorms(TwoNorms):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y).sigmoid() + self.bn2(y).sigmoid()


@trap(bn=Reason.EXTRA_CONSUMER)
class ConvIsAlsoOutput(ConvBN):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y), y


@trap(bn=Reason.EXTRA_CONSUMER)
class SkipAroundNorm(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


@trap(bn=Reason.EXTRA_CONSUMER)
class ConvIntoShapeAndValue(ConvBN):
    """One reader wants only the shape, the other a value."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y).reshape_as(y) + y.amax()


@trap(bn=FOLDED)
class ConvIntoShapeOnly(ConvBN):
    """Readers of shape and dtype do not see the values."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        ones = torch.ones_like(y) * y.shape[1] + y.new_zeros(y.size(0), 1, 1, 1)
        return self.bn(y).view_as(y).sigmoid().type_as(y) + ones


@trap(bn=FOLDED, bn2=FOLDED)
class ChainedNorms(TwoNorms):
    """torchao drops the second of two chained norms."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.bn(self.conv(x))).sigmoid()


@trap(bn=FOLDED, bn2=FOLDED)
class ChainedNormsForward(TwoNorms):
    """Two norms on the input, in front of an unpadded conv."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn2(self.bn(x))).sigmoid()


@trap(bn=FOLDED)
class ConcatOfConvs(ConvBN):
    """mixnet: each conv takes its slice of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(4, 3, 1)
        self.bn = nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.conv(x), self.conv2(x)], 1)).sigmoid()


@trap(bn=Reason.EXTRA_CONSUMER)
class ConcatWithInput(ConvBN):
    """DenseNet: one part of the concatenation has no weights to scale."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.conv(x), x], 1)).sigmoid()


@trap(bn=FOLDED, bn2=FOLDED)
class ChunkedChannels(TwoNorms):
    """One conv, a norm on each half of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.bn2 = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).chunk(2, 1)
        return self.bn(left).sigmoid() * self.bn2(right)


@trap(bn=Reason.EXTRA_CONSUMER)
class OverlappingSlices(ConvBN):
    """The norm's half of the channels is also part of another slice."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y[:, :2]).sigmoid() + y[:, 1:3]


@trap(bn=FOLDED)
class SumOfConvs(ConvBN):
    """Both branches are scaled, one is shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + self.conv2(x)).sigmoid()


@trap(bn=Reason.EXTRA_CONSUMER)
class SumWithItself(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y + y.flip(2)).sigmoid()


@trap(bn=FOLDED)
class ForwardIntoBranches(ConvBN):
    """A norm on the input, read by three unpadded convs, one of them behind a crop that ignores a half."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        half, _ = y.chunk(2, 1)
        return F.softmax(self.q(y) * self.k(y), 1) * self.v(half)


@trap(bn=Reason.NO_PRODUCER)
class ForwardOneBranchStays(ForwardIntoBranches):
    """As above, but one reader cannot take the map."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.q(y) * self.k(y).sigmoid() + y


@trap(bn=Reason.SHARED_MODULE)
class MapOnBothSides(nn.Module):
    """One 1x1 conv is in front of the norm and behind it: backwards it has a second call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(self.conv(x)))
