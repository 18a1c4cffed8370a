"""Models that are hard to read: hooks, aliases, control flow, values that leave torch, wrappers, odd outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.base import Reason
from normfuse.report import Status
from tests.zoo.sharing import ConvBN, TwoNorms
from tests.zoo.trap import FOLDED, image, trap

# hooks


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


SEEN: list[float] = []


def watch(module: nn.Module, args: Any, output: Tensor) -> None:
    """Look at a value without a trace in the model."""
    SEEN[:] = [output.data_ptr()]


def hook(name: str, function: Any) -> Any:
    """Return what registers a forward hook on a part of a model."""

    def prepare(model: nn.Module) -> None:
        model.get_submodule(name).register_forward_hook(function)

    return prepare


trap(name="HookOnConv", prepare=hook("conv", double_output), bn=Reason.HAS_HOOKS)(ConvBN)
trap(name="HookOnNorm", prepare=hook("bn", double_output), bn=Reason.HAS_HOOKS)(ConvBN)
trap(name="WatcherOnConv", prepare=hook("conv", watch), bn=Reason.HAS_HOOKS)(ConvBN)


class Nested(ConvBN):
    """The conv stands in a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(self.conv)
        del self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.stem(x)).sigmoid()


trap(name="WatcherOnBlock", prepare=hook("stem", watch), bn=Reason.HAS_HOOKS)(Nested)
trap(name="WatcherOnModel", prepare=hook("", watch), bn=FOLDED)(Nested)

# aliases and in-place operations


@trap(bn=FOLDED)
class InPlaceReluReused(ConvBN):
    """``F.relu_`` changes the norm's output, which is read again afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu_(y) + y.sigmoid()


@trap(bn=Reason.EXTRA_CONSUMER)
class InPlaceReluBeforeNorm(ConvBN):
    """The activation writes into the conv's output, which two others read."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        F.leaky_relu_(y, 0.5)
        return self.bn(y).sigmoid() + y


@trap(bn=Reason.OPAQUE_OPERATION)
class WriteThroughView(ConvBN):
    """A view of the conv's output is written to before the norm reads it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :2].exp_()
        return self.bn(y).sigmoid()


@trap(bn=Reason.OPAQUE_OPERATION)
class WriteIntoBase(ConvBN):
    """The norm reads a view; its base is written to in between."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        view = y.view(2, 4, 6, 6)
        y.abs_()
        return self.bn(view).sigmoid()


@trap(bn=Reason.OPAQUE_OPERATION)
class WriteOverNothing(ConvBN):
    """``out=`` gives a tensor another value without returning it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        torch.exp(x, out=y)
        return self.bn(y).sigmoid()


# values that leave torch


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 3


class Unchanged(torch.autograd.Function):
    """Returns its input itself, as gradient reversal does: no operation runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


@trap(bn=Reason.EXTRA_CONSUMER)
class CustomFunctionReads(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y).sigmoid() + Tripled.apply(y)


@trap(bn=Reason.EXTRA_CONSUMER)
class CustomFunctionReturnsItsInput(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y).sigmoid() + Unchanged.apply(y)


@trap(bn=Reason.EXTRA_CONSUMER)
class ItemOfConv(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) * y[0, 0, 0, 0].item()


@trap(bn=Reason.EXTRA_CONSUMER)
class ListOfConv(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) * max(y.flatten().tolist())


@trap(bn=Reason.EXTRA_CONSUMER)
class NumpyOfConv(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + torch.from_numpy(y.numpy() * 2)


@trap(bn=Reason.OPAQUE_OPERATION)
class ThroughNumpy(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.from_numpy(self.conv(x).numpy() * 2)).sigmoid()


@trap(bn=Reason.EXTRA_CONSUMER)
class BranchOnConv(ConvBN):
    """The value decides which way the program goes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if y.sum() > 0 else self.bn(y).exp()


@trap(bn=FOLDED, bn2=Status.NOT_REACHED)
class BranchOnInput(TwoNorms):
    """One norm is not reached by this input, the other is."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return self.bn2(self.conv(x))
        return self.bn(self.conv(x)).sigmoid()


@trap(bn=Reason.EXTRA_CONSUMER)
class KeepsItsConv(ConvBN):
    """The conv's output is kept on the module, for the caller to read."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.conv(x)
        return self.bn(self.features).sigmoid()


@trap(bn=Reason.OPAQUE_OPERATION)
class FunctionalDropout(ConvBN):
    """``F.dropout`` is active in eval mode too, and scales what it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.dropout(self.conv(x), 0.5, training=True)).sigmoid()


# inputs and outputs


@dataclass
class Pyramid:
    """An output with tensors in a list; ``levels`` holds what must stay what it was."""

    final: Tensor
    levels: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Slotted:
    __slots__ = ("final", "level")
    final: Tensor
    level: Tensor


@trap(bn=Reason.EXTRA_CONSUMER)
class OutputInDictionary(ConvBN):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x)
        return {"final": self.bn(y).sigmoid(), "levels": [{"conv": y}]}


@trap(bn=Reason.EXTRA_CONSUMER)
class OutputInDataclass(ConvBN):
    def forward(self, x: Tensor) -> Pyramid:
        y = self.conv(x)
        return Pyramid(self.bn(y).sigmoid(), [y])


@trap(bn=Reason.EXTRA_CONSUMER)
class OutputInSlots(ConvBN):
    def forward(self, x: Tensor) -> Slotted:
        y = self.conv(x)
        return Slotted(self.bn(y).sigmoid(), y)


@trap(bn=FOLDED)
class OutputsInDataclass(ConvBN):
    def forward(self, x: Tensor) -> Pyramid:
        y = self.bn(self.conv(x))
        return Pyramid(y.sigmoid(), [y, y * 2])


@trap(inputs=lambda: {"scale": image(), "image": image() * 2}, bn=FOLDED)
class KeywordInputs(ConvBN):
    def forward(self, image: Tensor, *, scale: Tensor) -> Tensor:  # type: ignore[override]
        return self.bn(self.conv(image)) * scale


@trap(inputs=lambda: ([image()[0], image()[1]],), bn=FOLDED)
class ListInput(ConvBN):
    """As detectors take it: one argument, a list of images."""

    def forward(self, images: list[Tensor]) -> Tensor:  # type: ignore[override]
        return self.bn(self.conv(torch.stack(images))).sigmoid()


# models of unusual build


@trap()
def empty() -> nn.Module:
    return nn.Sequential()


@trap(name="OnlyANorm", **{"": Reason.NO_PRODUCER})
def only_a_norm() -> nn.Module:
    return nn.BatchNorm2d(4)


@trap(bn=FOLDED)
class NormUnderTwoNames(ConvBN):
    """The same module is a child twice: it is one norm, and goes from both places."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.conv(x)).sigmoid()


@trap(bn=FOLDED)
class ForwardOnInstance(ConvBN):
    """``forward`` of a layer is replaced on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.forward = Shifted(self.conv)  # type: ignore[method-assign]


class Shifted:
    """A conv on a shifted image."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x.roll(1, 3), self.conv.weight, self.conv.bias, padding=1)


trap(name="DataParallel", prepare=nn.DataParallel, bn=FOLDED)(ConvBN)
trap(name="Compiled", prepare=torch.compile, bn=FOLDED)(ConvBN)
