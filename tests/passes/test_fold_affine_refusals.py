"""``fold-affine``: every reason it refuses for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from normfuse.base import Reason
from tests.passes.affine_models import IMAGE, TOKENS, Calls, Scale, folded, outcome, randomised, refusal

# refusals


def test_refuses_zero_padding():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 3, padding=1))
    assert refusal(model, IMAGE).reason is Reason.NONZERO_PADDING


def test_refuses_a_residual_reader():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return y + m.linear(y)

    model = Calls(forward, norm=nn.LayerNorm(4), linear=nn.Linear(4, 4))
    found = refusal(model, TOKENS, "norm")
    assert found.reason is Reason.OPAQUE_OPERATION
    assert "add" in found.detail


def test_refuses_an_output_of_the_model():
    assert refusal(nn.Sequential(nn.LayerNorm(4)), TOKENS).reason is Reason.EXTRA_CONSUMER


def test_refuses_a_nonlinearity_on_both_sides():
    found = refusal(nn.Sequential(nn.GELU(), Scale(4), nn.GELU()), TOKENS, "1")
    assert found.reason is Reason.OPAQUE_OPERATION
    assert "backwards" in found.detail
    assert "forwards" in found.detail


def test_refuses_a_tied_gain():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert refusal(model, TOKENS).reason is Reason.SHARED_PARAMETER


def test_refuses_a_gain_that_others_read():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.linear(m.norm(x)) + m.norm.weight

    model = Calls(forward, norm=nn.LayerNorm(4), linear=nn.Linear(4, 4))
    found = refusal(model, TOKENS, "norm")
    assert found.reason is Reason.SHARED_PARAMETER
    assert "add" in found.detail


class Shifted(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 1


def test_refuses_a_computed_gain():
    norm = parametrize.register_parametrization(nn.LayerNorm(4), "weight", Shifted())
    assert refusal(nn.Sequential(norm, nn.Linear(4, 4)), TOKENS).reason is Reason.PARAMETRIZED


class OnePlusLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, 1 + self.weight, self.bias)


def test_refuses_a_gain_that_its_norm_computes():
    model = nn.Sequential(OnePlusLayerNorm(4), nn.Linear(4, 4))
    assert refusal(model, TOKENS).reason is Reason.PARAMETRIZED


def test_refuses_a_shift_where_there_is_no_bias():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return m.attention(y, y, y, need_weights=False)[0]

    model = Calls(forward, norm=nn.LayerNorm(4), attention=nn.MultiheadAttention(4, 2, bias=False, batch_first=True))
    assert refusal(model, TOKENS, "norm").reason is Reason.NO_BIAS


def test_refuses_a_hook():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: None)
    assert refusal(model, TOKENS).reason is Reason.HAS_HOOKS


def test_refuses_a_shared_consumer():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.linear(m.norm(x)) + m.linear(x)

    model = Calls(forward, norm=nn.LayerNorm(4), linear=nn.Linear(4, 4))
    assert refusal(model, TOKENS, "norm").reason is Reason.SHARED_MODULE


class TwoGains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = SwitchingLayerNorm(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layer_norm(self.layer_norm(x, 0), 1))


class SwitchingLayerNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return F.layer_norm(x, (4,), (self.first, self.second)[which])


def test_a_gain_per_call_is_a_norm_per_gain():
    """The first is read by the second, which no gain passes; the second by the layer."""
    found = refusal(TwoGains(), TOKENS, "layer_norm")
    assert found.reason is Reason.OPAQUE_OPERATION
    assert "layer_norm in layer_norm" in found.detail
    assert outcome(folded(randomised(TwoGains()), TOKENS), "layer_norm:layer_norm").partners == ("linear",)


def test_refuses_when_the_rank_is_unknown():
    assert refusal(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), None).reason is Reason.RANK_UNKNOWN


def test_refuses_a_partial_capture():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.part(x) if x.sum() > 0 else x

    part = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1))
    assert refusal(Calls(forward, part=part), None, "part.1").reason is Reason.PARTIAL_CAPTURE


def test_refuses_a_map_along_another_axis():
    model = nn.Sequential(nn.GroupNorm(1, 5), nn.Linear(4, 3))
    assert refusal(model, TOKENS).reason is Reason.AXIS


def test_refuses_values_out_of_range():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)).half().eval()
    for name in ("0.weight", "1.weight"):
        nn.init.constant_(model.get_parameter(name), 300)
    found = outcome(folded(model, TOKENS.half()), "0").refusal
    assert found is not None
    assert found.reason is Reason.RANGE
