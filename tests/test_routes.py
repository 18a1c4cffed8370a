"""Routes step by step: the tables of rules where the property tests are too coarse, and what the refusal says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse import api
from normfuse.affine import AffineMap, compress, identity
from normfuse.base import Reason, Refused
from tests.parity import assert_parity, randomize_norms
from tests.zoo import layers
from tests.zoo.trap import image


def between(
    function: Callable[[Tensor], Tensor] | nn.Module, channels: int = 4, *, positive: bool = False
) -> nn.Module:
    """Return conv, function, norm."""
    torch.manual_seed(0)
    step = function if isinstance(function, nn.Module) else layers.Then(function)
    model = layers.chain(nn.Conv2d(4, 4, 3, padding=1), step, nn.BatchNorm2d(channels)).double().eval()
    return randomize_norms(model, positive=positive)


def verdict(model: nn.Module, inputs: Tensor) -> Reason | None:
    """Fold, compare, and return the reason of the refusal; None where the norm was folded."""
    result = api.apply(model, ["fold-bn"], example_inputs=inputs)
    assert_parity(model, result.model, inputs)
    refusal = result.report.norms[-1].refusal
    return refusal.reason if refusal else None


# in-place, out-of-place, method and function of one operation are one operation


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x: x * 2,
        lambda x: 2 * x,
        lambda x: torch.mul(x, 2),
        lambda x: x.mul_(2),
        lambda x: torch.multiply(x, 2),
        lambda x: x / 0.5,
        lambda x: torch.true_divide(x, 0.5),
        lambda x: x.div_(0.5),
        lambda x: -x,
        lambda x: x.neg_(),
        lambda x: x + 3,
        lambda x: 3 + x,
        lambda x: x.add_(3),
        lambda x: x - 3,
        lambda x: x.sub(3),
        lambda x: x.double().type_as(x),
        lambda x: x.clone().detach().contiguous(),
        lambda x: F.dropout(x, training=False),
        lambda x: torch.ops.aten.clone(x),
        lambda x: x.to(torch.zeros(1).double()),
    ],
)
def test_spellings_of_what_passes(spelling: Callable[[Tensor], Tensor]):
    result = normfuse.inspect(between(spelling), example_inputs=image())
    assert result.applied, str(result)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: 3 - x,
        lambda x: 3 / (x + 9),
        lambda x: torch.div(x, 2, rounding_mode="floor"),
        lambda x: torch.add(x, x.detach() * 0, alpha=2),
        lambda x: x // 2,
        lambda x: x % 2,
        lambda x: x.clamp(min=0.0),
        lambda x: x.cumsum(1),
        lambda x: x.sort(dim=2)[0],
        lambda x: F.pad(x, (1, 1), value=2.0)[..., 1:-1] * x.mean(),
    ],
)
def test_operations_that_only_look_like_what_passes(operation: Callable[[Tensor], Tensor]):
    assert verdict(between(operation), image()) is not None


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (nn.ReLU(), Reason.OPAQUE_OPERATION),
        (nn.MaxPool2d(3, 1, 1), Reason.SIGN),
        (nn.AvgPool2d(3, 1, 1), Reason.NONZERO_PADDING),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), None),
        (nn.AvgPool2d(2, divisor_override=3), Reason.OPAQUE_OPERATION),
        (nn.ZeroPad2d(1), None),
        (nn.ReplicationPad2d(1), None),
        (nn.CircularPad2d(1), None),
        (nn.ReflectionPad2d(1), None),
        (layers.Then(lambda x: F.pad(x, (1, 1))), Reason.NONZERO_PADDING),
        (layers.Then(lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")), None),
        (nn.Upsample(scale_factor=2, mode="bicubic"), None),
        (layers.Then(lambda x: x[:, :, :-2, 1:]), None),
        (layers.Then(lambda x: x.narrow(3, 1, 3).flip(2)), None),
        (nn.Softmax(1), Reason.OPAQUE_OPERATION),
        (nn.LocalResponseNorm(2), Reason.OPAQUE_OPERATION),
    ],
)
def test_rules(operation: nn.Module, reason: Reason | None):
    assert verdict(between(operation), image()) is reason


def test_refusal_names_the_operation_that_stopped_the_route():
    found = normfuse.inspect(between(nn.Sequential(nn.Identity(), nn.Hardswish())), example_inputs=image())
    refusal = found.norms[0].refusal
    assert refusal is not None
    assert "1.1 (Hardswish)" in refusal.detail


def test_second_way_is_taken_where_the_first_ends_at_a_layer_that_cannot():
    """A product: the linear layer works along another axis than the norm, the convolution along the same."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv, self.bn = nn.Linear(5, 5), nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.linear(x) * self.conv(x)).sigmoid()

    model = Product().double().eval()
    torch.nn.init.uniform_(model.bn.weight)
    assert verdict(model, image(2, 5, 5)) is None


@pytest.mark.parametrize("pad", [nn.ZeroPad2d(1), nn.ConstantPad2d((1, 0, 2, 0), 1.5)])
def test_shift_becomes_the_value_of_a_pad(pad: nn.Module):
    """A norm in front of an explicit pad: exact at the border, by one pad value per channel."""
    torch.manual_seed(0)
    model = layers.chain(nn.BatchNorm2d(4), pad, nn.Conv2d(4, 4, 3)).double().eval()
    randomize_norms(model, positive=True)
    assert verdict(model, image()) is None


# maps


def test_composition():
    outer = AffineMap.along(1, 3, torch.tensor([2.0, -3.0]), torch.tensor([1.0, 0.0]))
    inner = AffineMap.along(1, 3, torch.tensor([0.5, 4.0]), torch.tensor([3.0, 1.0]))
    x = torch.randn(2, 2, 5).double()

    def run(m: AffineMap) -> Tensor:
        return m.scale * x + m.shift

    torch.testing.assert_close(run(outer.after(inner)), outer.scale * run(inner) + outer.shift)
    assert not outer.keeps_order
    assert outer.has_shift
    assert not outer.only_scale().has_shift


def test_preimage_of_a_value():
    m = AffineMap.along(1, 2, torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0]))
    assert torch.equal(m.preimage(3.0), torch.tensor([[1.0, 0.0]]).double())  # type: ignore[arg-type]
    assert m.preimage(4.0) is None  # the second channel is 3, whatever goes in


def test_vectors_of_a_map_along_another_axis_are_refused():
    m = AffineMap.along(1, 3, torch.arange(4.0), torch.zeros(4))
    with pytest.raises(Refused) as caught:
        m.vectors(2, 4, "conv")
    assert caught.value.refusal.reason is Reason.AXIS
    assert torch.equal(m.vectors(1, 4, "conv")[0], torch.arange(4.0).double())


def test_vectors_of_another_length_are_refused():
    m = AffineMap.along(1, 3, torch.arange(4.0), torch.zeros(1))
    with pytest.raises(Refused) as caught:
        m.vectors(1, 1, "conv")
    assert "the map is one of 4 channels, conv has 1" in caught.value.refusal.detail


def test_compress_drops_the_axes_a_map_does_not_depend_on():
    m = AffineMap.along(1, 3, torch.arange(4.0), torch.zeros(4))
    full = AffineMap(m.scale.expand(2, 4, 3).clone(), m.shift.expand(2, 4, 3).clone())
    assert compress(full).equals(m)
    assert compress(identity((2, 3))).scale.shape == (1, 1)
