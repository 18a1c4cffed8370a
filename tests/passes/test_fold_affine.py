"""Gains and shifts leave norms and LayerScales, and the function stays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse import surgery
from normfuse.layers import L1LayerNorm, L1RMSNorm
from normfuse.report import Status
from tests.parity import assert_parity, randomize_norms
from tests.passes.affine_models import IMAGE, TOKENS, Calls, Scale, assert_same, check, folded, outcome, randomised

# norms, forwards


@pytest.mark.parametrize(
    ("norm", "consumer", "x"),
    [
        (nn.LayerNorm(4), nn.Linear(4, 3), TOKENS),
        (nn.LayerNorm(4, bias=False), nn.Linear(4, 3, bias=False), TOKENS),
        (nn.LayerNorm(4), nn.Linear(4, 3, bias=False), TOKENS),
        (nn.RMSNorm(4), nn.Linear(4, 3), TOKENS),
        (L1LayerNorm(4), nn.Linear(4, 3), TOKENS),
        (L1LayerNorm(4, bias=False, gaussian=True), nn.Linear(4, 3, bias=False), TOKENS),
        (L1RMSNorm(4), nn.Linear(4, 3), TOKENS),
        (L1RMSNorm(4, eps=0.3, bias=True), nn.Linear(4, 3, bias=False), TOKENS),
        (nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3, groups=2), IMAGE),
        (nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 6, 3, stride=2), IMAGE),
        (nn.InstanceNorm1d(5, affine=True), nn.Conv1d(5, 3, 2), TOKENS),
    ],
)
def test_gain_and_shift_move_on(norm: nn.Module, consumer: nn.Module, x: Tensor):
    done = check(nn.Sequential(norm, consumer), x, "0")
    assert not list(done[0].parameters())  # type: ignore[index]


def test_several_axes_into_a_flattened_layer():
    check(nn.Sequential(nn.LayerNorm([4, 8, 8]), nn.Flatten(), nn.Linear(256, 3)), IMAGE, "0")
    check(nn.Sequential(nn.RMSNorm([8, 8]), nn.Flatten(2), nn.Linear(64, 3)), IMAGE, "0")
    check(nn.Sequential(L1LayerNorm([4, 8, 8]), nn.Flatten(), nn.Linear(256, 3)), IMAGE, "0")


def test_every_consumer_takes_it():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return m.q(y) @ m.k(y).transpose(1, 2) @ m.v(y)

    check(
        Calls(forward, norm=nn.LayerNorm(4), q=nn.Linear(4, 4), k=nn.Linear(4, 4, bias=False), v=nn.Linear(4, 4)),
        TOKENS,
        "norm",
    )


def test_gain_alone_enters_a_padded_convolution():
    norm = nn.GroupNorm(2, 4)
    norm.bias = None  # type: ignore[assignment]
    check(nn.Sequential(norm, nn.Conv2d(4, 3, 3, padding=1)), IMAGE, "0")


def test_norm_called_twice():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.norm(m.a(m.norm(x)).relu()))

    check(Calls(forward, norm=nn.LayerNorm(4), a=nn.Linear(4, 4), b=nn.Linear(4, 2)), TOKENS, "norm")


def test_attention_block():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm1(x)
        x = x + m.attention(y, y, y, need_weights=False)[0]
        return x + m.second(F.gelu(m.first(m.norm2(x))))

    model = Calls(
        forward,
        norm1=nn.LayerNorm(4),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        norm2=nn.LayerNorm(4),
        first=nn.Linear(4, 8),
        second=nn.Linear(8, 4),
    )
    check(model, TOKENS, "norm1", "norm2")


def test_torch_encoder_layer_keeps_what_its_fused_kernel_reads():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True)
    done = check(nn.Sequential(layer), TOKENS, "0.norm1", "0.norm2")
    assert torch.equal(done.get_parameter("0.norm1.weight"), torch.ones(4, dtype=torch.float64))


def test_windows_that_are_shifted():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.roll(m.norm(x.permute(0, 2, 3, 1)), (-2, -2), (1, 2))
        windows = y.reshape(2, 2, 4, 2, 4, 4).permute(0, 1, 3, 2, 4, 5).reshape(8, 16, 4)
        q, k, v = m.qkv(windows).chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v)
        return m.proj(out)

    check(Calls(forward, norm=nn.LayerNorm(4), qkv=nn.Linear(4, 12), proj=nn.Linear(4, 4)), IMAGE, "norm")


class ByHand(nn.Module):
    def __init__(self, size: int, shift: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return y if self.bias is None else y + self.bias


class RMSNormByHand(ByHand):
    """Named like a norm, and calls no torch norm."""


@pytest.mark.parametrize("shift", [False, True])
def test_norm_by_hand(shift: bool):
    model = nn.Sequential(RMSNormByHand(4, shift), nn.Linear(4, 3))
    done = check(model, TOKENS, "0")
    assert torch.equal(done.get_parameter("0.weight"), torch.ones(4, dtype=torch.float64))
    assert outcome(folded(randomised(model), TOKENS), "0").norm


def test_function_on_parameters_of_a_block():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.linear(F.layer_norm(x, (4,), m.gain, m.shift))

    gain, shift = nn.Parameter(torch.empty(4)), nn.Parameter(torch.empty(4))
    done = check(Calls(forward, linear=nn.Linear(4, 3), gain=gain, shift=shift), TOKENS, ":layer_norm")
    assert torch.equal(done.get_parameter("gain"), torch.ones(4, dtype=torch.float64))


def test_stays_a_parameter_where_others_ask_for_its_dtype():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.linear(m.norm(x.to(m.norm.weight.dtype)))

    done = check(Calls(forward, norm=nn.LayerNorm(4), linear=nn.Linear(4, 3)), TOKENS, "norm")
    assert torch.equal(done.get_parameter("norm.weight"), torch.ones(4, dtype=torch.float64))


def test_nothing_to_move():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.LayerNorm(3, elementwise_affine=False)).double()
    result = folded(model, TOKENS)
    assert not result.report
    assert [o.status for o in result.report.norms] == [Status.UNMATCHED] * 2


def test_structure_replays_on_a_fresh_model():
    def make() -> nn.Module:
        return randomised(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), Scale(4), nn.GELU()))

    done, fresh = folded(make(), TOKENS).model, make()
    surgery.replay(fresh, done.normfuse_manifest["edits"])  # type: ignore[arg-type]
    fresh.load_state_dict(done.state_dict(), strict=True)
    assert_same(done, fresh, TOKENS)


# LayerScale, backwards


@pytest.mark.parametrize("inplace", [False, True])
def test_layer_scale_disappears(inplace: bool):
    done = check(nn.Sequential(nn.Linear(4, 3), nn.Dropout(), Scale(3, inplace), nn.GELU()), TOKENS, "2")
    assert type(done[2]) is nn.Identity  # type: ignore[index]


def test_layer_scale_of_images():
    done = check(nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), Scale(3, shape=(1, -1, 1, 1)), nn.GELU()), IMAGE, "1")
    assert type(done[1]) is nn.Identity  # type: ignore[index]


def test_operands_the_other_way_round():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.scale(m.linear(x)))

    class Flipped(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return self.gamma * x

    model = randomised(Calls(forward, linear=nn.Linear(4, 3), scale=Flipped(3), norm=nn.BatchNorm1d(5)))
    result = normfuse.apply(model, ["fold-affine", "fold-bn"], example_inputs=TOKENS)
    assert_same(model, result.model, TOKENS)
    assert outcome(result, "scale").status is Status.APPLIED


def test_layer_scale_called_twice():
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.gelu(m.scale(m.a(x))) + F.gelu(m.scale(m.b(x)))

    check(Calls(forward, a=nn.Linear(4, 3), b=nn.Linear(4, 3), scale=Scale(3)), TOKENS, "scale")


def test_scale_inside_a_residual_block_becomes_one():
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.layer_scale * m.block(x)

    block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    done = check(Calls(forward, block=block, layer_scale=nn.Parameter(torch.empty(4))), TOKENS, "layer_scale")
    assert torch.equal(done.get_parameter("layer_scale"), torch.ones(4, dtype=torch.float64))


def test_scale_that_only_the_next_layer_can_take():
    check(nn.Sequential(nn.GELU(), Scale(4), nn.Linear(4, 3)), TOKENS, "1")


def test_scale_with_a_shift():
    check(nn.Sequential(nn.Linear(4, 4), Affine(4), nn.GELU()), TOKENS, "1")


class Affine(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


# real blocks


def test_vision_transformer():
    timm = pytest.importorskip("timm")
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.VisionTransformer(**options, init_values=1.0, qk_norm=True)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    result = folded(randomised(model), x)
    assert_same(model, result.model, x)
    names = {o.subject for o in result.report.applied}
    blocks = {f"blocks.{i}.{part}" for i in (0, 1) for part in ("norm1", "norm2", "ls1", "ls2")}
    assert names == blocks | {"norm"}
    assert result.model.blocks[0].norm1.weight is None
    assert {o.subject for o in result.report.refused} == {f"blocks.{i}.attn.{n}_norm" for i in (0, 1) for n in "qk"}


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_convnext_of_timm(conv_mlp: bool):
    timm = pytest.importorskip("timm")
    options = {"depths": (1,) * 4, "dims": (2, 4, 6, 8), "num_classes": 3, "ls_init_value": 1.0}
    model = timm.models.ConvNeXt(**options, conv_mlp=conv_mlp)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    result = folded(randomised(model), x)
    assert_same(model, result.model, x)
    names = {o.subject for o in result.report.applied}
    assert {f"stages.{i}.blocks.0.{part}" for i in range(4) for part in ("norm", "gamma")} <= names
    assert {"head.norm", "stages.1.downsample.0"} <= names
    assert [o.subject for o in result.report.refused] == ["stem.1"]


def test_convnext_of_torchvision():
    convnext = pytest.importorskip("torchvision.models.convnext")
    settings = [convnext.CNBlockConfig(4, 8, 1), convnext.CNBlockConfig(8, None, 1)]
    model = convnext.ConvNeXt(settings, num_classes=3)
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    result = folded(randomised(model), x)
    assert_same(model, result.model, x)
    names = {o.subject for o in result.report.applied}
    assert {"features.1.0.block.2", "features.1.0.layer_scale", "features.2.0", "classifier.0"} <= names


@pytest.mark.parametrize("name", ["RmsNorm", "RmsNorm2d", "LayerNorm", "LayerNorm2d", "GroupNorm"])
def test_norms_of_timm(name: str):
    layers = pytest.importorskip("timm.layers")
    norm = getattr(layers, name)(4, 2) if name == "GroupNorm" else getattr(layers, name)(4)
    if name in ("RmsNorm", "LayerNorm"):
        check(nn.Sequential(norm, nn.Linear(4, 3)), TOKENS, "0")
    else:
        check(nn.Sequential(norm, nn.Conv2d(4, 3, 1)), IMAGE, "0")


class HeldAnywhere(nn.Module):
    """A norm whose gain may move, held where no other could be put."""

    def __init__(self, hold: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 3)
        self.held = hold(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.held(x))


@pytest.mark.parametrize("hold", [functools.partial, lambda norm: norm.forward])
def test_a_norm_that_keeps_its_place_may_be_held_anywhere(hold: Callable[[nn.Module], Any]):
    model = randomize_norms(HeldAnywhere(hold).double().eval())
    x = torch.randn(2, 4, dtype=torch.float64)
    result = normfuse.apply(model, ["fold-affine"], example_inputs=x)
    assert result.report.norms[0].status is normfuse.Status.APPLIED
    assert_parity(model, result.model, x)
