"""Models with extreme values and other number formats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normfuse.base import Reason
from tests.zoo.layers import chain
from tests.zoo.sharing import ConvBN
from tests.zoo.trap import FOLDED, image, trap


@trap(dtype=torch.float32, tolerance=1e-5, _1=FOLDED)
def float32() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@trap(dtype=torch.float16, tolerance=3e-3, _1=FOLDED)
def float16() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@trap(dtype=torch.bfloat16, tolerance=3e-2, _1=FOLDED)
def bfloat16() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@trap(dtype=torch.float16, tolerance=3e-3, prepare=lambda model: model.bn.float() and None, bn=FOLDED)
class MixedPrecision(ConvBN):
    """The usual half model: the norm stays in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).float()).half().sigmoid()


@trap(inputs=lambda: image().to(memory_format=torch.channels_last), _1=FOLDED)
def channels_last() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def spread(value: float, eps: float = 0.0) -> Callable[[nn.Module], None]:
    """Return what gives the norm of a model this running variance."""

    def prepare(model: nn.Module) -> None:
        norm = model.get_submodule("1")
        norm.eps = eps
        norm.get_buffer("running_var").fill_(value)

    return prepare


@trap(prepare=spread(1e-30, eps=1e-5), _1=FOLDED)
def near_zero_variance() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@trap(dtype=torch.float16, tolerance=0.0, prepare=spread(0.0, eps=1e-12), _1=Reason.RANGE)
def out_of_range() -> nn.Module:
    """The folded weights would leave float16; the outputs, behind a sigmoid, do not."""
    return chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@trap(prepare=lambda model: model[0].bias.data[0].fill_(float("inf")), _1=Reason.NONFINITE)
def broken_bias() -> nn.Module:
    """An infinite bias, whose outputs a sigmoid makes finite."""
    return chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@trap(prepare=lambda model: model[1].weight.data.zero_(), _1=FOLDED)
def gains_of_zero() -> nn.Module:
    """Dead channels: their weights become zero."""
    return chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@trap(_2=Reason.DTYPE)
def rounded_to_integers() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), Rounded(), nn.BatchNorm2d(4))


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 10).to(torch.int32).to(x.dtype)
