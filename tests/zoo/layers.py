"""Models about which layer and which axis: what a fold scales, and along which routes the map gets there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.ops.misc import FrozenBatchNorm2d

from normfuse.base import Reason
from normfuse.report import Status
from tests.zoo.sharing import ConvBN
from tests.zoo.trap import FOLDED, trap


class Then(nn.Module):
    """A function as a layer without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor], **named: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in named.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def chain(*modules: nn.Module) -> nn.Sequential:
    """Return the modules in a row with a sigmoid behind them, so that no map escapes forwards."""
    return nn.Sequential(*modules, nn.Sigmoid())


def swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def shuffle(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)


def unbatched(x: Tensor) -> Tensor:
    return x[0]


def negate(x: Tensor) -> Tensor:
    return -x


# linear layers and embeddings


@trap(3, 5, 5, _1=Reason.AXIS)
def linear_3d() -> nn.Module:
    """BatchNorm1d on (N, C, L) normalises axis 1, the linear layer writes axis 2; both have length 5."""
    return chain(nn.Linear(5, 5), nn.BatchNorm1d(5))


@trap(3, 4, 5, _2=FOLDED)
def linear_transposed() -> nn.Module:
    return chain(nn.Linear(5, 6), Then(swap), nn.BatchNorm1d(6))


@trap(3, 4, 5, _2=FOLDED)
def linear_flattened() -> nn.Module:
    """LeViT: the tokens are flattened into the batch."""
    return chain(nn.Linear(5, 6), Then(rows), nn.BatchNorm1d(6))


@trap(3, 5, _1=FOLDED)
def linear_without_affine() -> nn.Module:
    return chain(nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False))


@trap(inputs=lambda: torch.arange(10).reshape(2, 5) % 7, _2=FOLDED)
def embedding() -> nn.Module:
    return chain(nn.Embedding(7, 6, padding_idx=0), Then(swap), nn.BatchNorm1d(6))


@trap(inputs=lambda: torch.arange(10).reshape(2, 5) % 7, _2=Reason.OPAQUE_OPERATION)
def embedding_with_max_norm() -> nn.Module:
    """The forward pass renormalises the rows it reads, so scaled rows would not stay scaled."""
    return chain(nn.Embedding(7, 6, max_norm=0.5), Then(swap), nn.BatchNorm1d(6))


@trap(2, 5, 4, bn=FOLDED)
class PositionEmbedding(nn.Module):
    """Tokens plus a learned position: both are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)
        self.position = nn.Parameter(torch.randn(1, 5, 6))
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.proj(x) + self.position).transpose(1, 2)).sigmoid()


@trap(2, 5, 4, bn=Reason.PARAMETRIZED)
class PositionNotSaved(PositionEmbedding):
    """The position is a buffer that the state_dict leaves out: a new value for it would be lost."""

    def __init__(self) -> None:
        super().__init__()
        value = self.position.detach()
        del self.position
        self.register_buffer("position", value, persistent=False)


# convolutions


@trap(_1=FOLDED)
def without_affine_and_bias() -> nn.Module:
    return chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False))


@trap(_1=FOLDED)
def grouped_transposed() -> nn.Module:
    return chain(nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, output_padding=1), nn.BatchNorm2d(4))


@trap(prepare=lambda model: center(model[0]), _0=FOLDED)
def forward_into_grouped_transposed() -> nn.Module:
    """Only a scale enters a transposed convolution."""
    return chain(nn.BatchNorm2d(4, affine=False), nn.ConvTranspose2d(4, 6, 3, groups=2))


@trap(_0=Reason.NONZERO_PADDING)
def shift_into_transposed() -> nn.Module:
    return chain(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, groups=2))


def center(norm: nn.Module) -> None:
    """Take the shift out of a norm."""
    norm.get_buffer("running_mean").zero_()


@trap(_0=FOLDED)
def before_unpadded_conv() -> nn.Module:
    return chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2))


@trap(_0=FOLDED)
def before_reflecting_conv() -> nn.Module:
    return chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))


@trap(_0=Reason.NONZERO_PADDING)
def before_padded_conv() -> nn.Module:
    """A shift would be missing in the zeros around the image."""
    return chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1))


@trap(_0=Reason.NONZERO_PADDING)
def before_same_conv() -> nn.Module:
    return chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same"))


@trap(_0=Reason.NO_PRODUCER)
def norm_on_input() -> nn.Module:
    return chain(nn.BatchNorm2d(4))


@trap(4, 6, 6, _1=Reason.AXIS)
def unbatched_conv() -> nn.Module:
    """A conv on (C, H, W) writes axis 0; BatchNorm1d then normalises the rows, of which there are as many."""
    return chain(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm1d(6))


@trap(2, 4, 6, _2=Reason.AXIS)
def unbatched_pool() -> nn.Module:
    """AvgPool2d on a (N, C, L) value takes N for the channels and averages over C."""
    return chain(nn.Conv1d(4, 6, 1), nn.AvgPool2d(3, 1, 1), nn.BatchNorm1d(6))


# routes


@trap(_2=FOLDED)
def channel_shuffle() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), Then(shuffle), nn.BatchNorm2d(4))


@trap(_2=Reason.AXIS)
def pixel_shuffle() -> nn.Module:
    """Four channels become one: they all want the same map, so it passes; the unshuffled ones differ in place."""
    return chain(nn.Conv2d(4, 4, 3), nn.PixelUnshuffle(2), nn.BatchNorm2d(16))


@trap(_2=FOLDED)
def pixel_shuffle_up() -> nn.Module:
    return chain(nn.Conv2d(4, 8, 3), nn.PixelShuffle(2), nn.BatchNorm2d(2))


@trap(_0=Reason.SIGN)
def norm_pool_conv() -> nn.Module:
    """A negative gain would turn the max-pool into a min-pool."""
    return chain(nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2))


@trap(positive=True, _0=FOLDED)
def norm_pool_conv_positive() -> nn.Module:
    return chain(nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2))


def best(x: Tensor) -> Tensor:
    return x.max(dim=2)[0]


def best_with_indices(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, return_indices=True)[0]


def mean_of_two(x: Tensor) -> Tensor:
    return torch.var_mean(x, dim=2)[1]


@trap(_2=Reason.SIGN)
def maximum_of_several_outputs() -> nn.Module:
    """The values of a maximum beside its indices: a gain that is negative does not pass it."""
    return chain(nn.Conv2d(4, 4, 3), Then(best), nn.BatchNorm1d(4))


@trap(_2=Reason.OPAQUE_OPERATION)
def max_pool_with_indices() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), Then(best_with_indices), nn.BatchNorm2d(4))


@trap(_2=Reason.OPAQUE_OPERATION)
def variance_and_mean() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), Then(mean_of_two), nn.BatchNorm1d(4))


def pad_channels(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 1, 2))


@trap(_2=Reason.AXIS)
def padded_channels() -> nn.Module:
    """ResNet's option A: zeros become new channels, and a norm shifts those as well."""
    return chain(nn.Conv2d(4, 4, 3), Then(pad_channels), nn.BatchNorm2d(7))


@trap(_2=Reason.OPAQUE_OPERATION)
def norm_after_activation() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), nn.GELU(), nn.BatchNorm2d(4))


# layers of other kinds


@trap(_1=FOLDED)
def sync_batch_norm() -> nn.Module:
    """On a CPU: folding needs no GPU."""
    return chain(nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4))


@trap(_1=FOLDED)
def frozen_batch_norm() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4))


@trap(_1=FOLDED)
def instance_norm_with_statistics() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True))


@trap(_1=Reason.BATCH_STATISTICS)
def without_running_statistics() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))


@trap(_1=Status.UNMATCHED)
def group_norm() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))


@trap(_1=Status.UNMATCHED, _2=FOLDED)
def norm_after_group_norm() -> nn.Module:
    """The gain and shift of the group norm take the map."""
    return chain(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))


@trap(_1=FOLDED)
def norm_with_activation() -> nn.Module:
    """timm's BatchNormAct2d is a BatchNorm2d: its activation must stay."""
    from timm.layers.norm_act import BatchNormAct2d

    return chain(nn.Conv2d(4, 4, 3), BatchNormAct2d(4))


@trap(_1=Reason.PARAMETRIZED)
def parametrized_weight() -> nn.Module:
    return chain(parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))


@trap(_1=Reason.PARAMETRIZED)
def old_weight_norm() -> nn.Module:
    """Its weight is computed by a hook, and ``copy.deepcopy`` refuses it after a call."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return chain(nn.utils.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))


# forward passes that are overridden or written as functions


@trap(**{":batch_norm": FOLDED})
class FunctionalLayers(nn.Module):
    """``F.conv2d`` and ``F.batch_norm`` on parameters of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.randn(4))
        self.register_buffer("running_mean", torch.randn(4))
        self.register_buffer("running_var", torch.rand(4) + 0.5)
        self.gain, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, padding=1, groups=2)
        return F.batch_norm(y, self.running_mean, self.running_var, self.gain, self.shift).sigmoid()


class SamePad(nn.Conv2d):
    """As timm's Conv2dSame: pads by itself, then convolves with its own parameters."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Doubling(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class IgnoresBias(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight)


class OwnBatchNorm(nn.BatchNorm2d):
    """A BatchNorm written out by hand."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = (t.view(1, -1, 1, 1) for t in (self.running_mean, self.running_var))  # type: ignore[union-attr]
        return (input - mean) / (var + self.eps).sqrt() * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


@trap(_1=FOLDED)
def conv_same() -> nn.Module:
    return chain(SamePad(4, 4, 2, bias=False), nn.BatchNorm2d(4))


@trap(_1=FOLDED)
def conv_that_doubles() -> nn.Module:
    return chain(Doubling(4, 4, 3), nn.BatchNorm2d(4))


@trap(_1=Reason.NO_BIAS)
def conv_that_ignores_bias() -> nn.Module:
    return chain(IgnoresBias(4, 4, 3, bias=False), nn.BatchNorm2d(4))


@trap(_1=FOLDED)
def norm_with_own_forward() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), OwnBatchNorm(4))


class BoundedBatchNorm(OwnBatchNorm):
    """A BatchNorm written out by hand that does something else as well."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1, 1)


@trap(_1=Reason.FORWARD_OVERRIDDEN)
def norm_with_more_than_its_own_forward() -> nn.Module:
    return chain(nn.Conv2d(4, 4, 3), BoundedBatchNorm(4))


@trap(bn=Reason.BATCH_STATISTICS)
class FunctionalTraining(ConvBN):
    """``F.batch_norm(training=True)`` whatever the mode of the model."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.batch_norm(y, None, None, self.bn.weight, self.bn.bias, training=True).sigmoid()
