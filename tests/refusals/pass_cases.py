"""Refusals of the passes that merge branches and move gains, and of the report where a pass cannot look."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

import normfuse
from tests.refusals.cases import Alone, Case, Net, sequence
from tests.refusals.route_cases import bn, conv
from tests.zoo.trap import image

MERGE, AFFINE, SHARED = ("merge-branches",), ("fold-affine",), ("duplicate-shared",)


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def branches(**parts: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.one(x) + m.two(x), **parts)


def tokens() -> nn.Module:
    return sequence(nn.LayerNorm(6), nn.Linear(6, 2))


def tie(model: Any) -> None:
    model[0].weight = model[2].weight


PASSES = [
    Case("part is called 2 times", lambda: Net(
        lambda m, x: m.part(m.part(x)), part=branches(one=conv(), two=conv())), passes=MERGE),
    Case("block.one is called more than once", lambda: Net(
        lambda m, x: m.block(x), block=Net(lambda m, x: m.one(x) + m.one(x) * 2, one=conv())), passes=MERGE),
    Case("only parts of the model could be traced | pass example_inputs", lambda: Alone(
        lambda m, x: m.part(x) if x.sum() > 0 else x,
        part=sequence(conv(), Alone(lambda m, x: m.one(x) + m.two(x), one=conv(), two=conv()))),
        None, passes=MERGE, advice=lambda m: {"example_inputs": image(2, 4, 6, 6).abs()}),
    Case("one convolution for the branches of block would do more work than they do", lambda: Net(
        lambda m, x: m.block(x), block=branches(one=nn.Conv2d(4, 4, 3, padding=1, groups=4), two=conv())),
        passes=MERGE),
    Case("0.weight is also 2.weight",
         lambda: sequence(nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
         ((2, 6),), passes=AFFINE, prepare=tie),
    Case("norm.weight is also read by add in the model", lambda: Net(
        lambda m, x: m.linear(m.norm(x)) + m.norm.weight.sum(), norm=nn.LayerNorm(6), linear=nn.Linear(6, 2)),
        ((2, 6),), passes=AFFINE),
    Case("0.weight is computed from other tensors | materialize it first", tokens, ((2, 6),), passes=AFFINE,
         prepare=lambda m: parametrize.register_parametrization(m[0], "weight", Twice()),
         advice=lambda m: parametrize.remove_parametrizations(m[0], "weight")),
    Case("what calls it could not be traced | pass example_inputs", lambda: Alone(
        lambda m, x: m.bns[int(x.sum() > 0)](m.part(x)), part=sequence(conv(), bn(), nn.Sigmoid()),
        bns=nn.ModuleList([bn(), bn()])), None),
    Case("bns.1 may be given values that the fold changed, and raises DeployedModelError if it runs"
         " | pass an example that runs it as well", lambda: Net(
        lambda m, x: m.bns[int(x.shape[0] > 4)](m.conv(x)).sigmoid(), conv=conv(), bns=nn.ModuleList([bn(), bn()]))),
    # gains
    Case("the rank of the input of 0 is not known | pass example_inputs", tokens, None, passes=AFFINE,
         advice=lambda m: {"example_inputs": image(2, 6)}),
    Case("the gain or shift of :layer_norm is computed at every call", lambda: Net(
        lambda m, x: m.linear(nn.functional.layer_norm(x, (6,), m.gain.exp())), linear=nn.Linear(6, 2),
        gain=nn.Parameter(torch.randn(6))), ((2, 6),), passes=AFFINE),
    Case("a gain or shift of the model has more axes than what it acts on", lambda: Alone(
        lambda m, x: m.linear(m.flat(x) * m.gain), flat=nn.Flatten(), linear=nn.Linear(6, 2),
        gain=nn.Parameter(torch.randn(1, 1, 6))), None, passes=AFFINE),
    # layers that several calls share
    Case("conv is shared by code that calls its function directly", lambda: Net(
        lambda m, x: m.bn(m.conv(x)).sigmoid() + nn.functional.conv2d(x, m.conv.weight, m.conv.bias), conv=conv(),
        bn=bn()), passes=SHARED),
    Case("conv is not called equally often in every example", lambda: Net(
        lambda m, x: m.bn(m.conv(x)).sigmoid() + (m.conv(x) + m.conv(x) if x.shape[0] > 1 else m.conv(x)), conv=conv(),
        bn=bn()), None, passes=SHARED,
        options={"example_inputs": normfuse.Examples(image(2, 4, 6, 6), image(1, 4, 6, 6))}),
    Case("conv is used in another way by another example", lambda: Net(
        lambda m, x: m.bn(m.conv(x)).sigmoid() if x.shape[0] > 1 else m.conv(x), conv=conv(), bn=bn()), None,
        passes=SHARED, options={"example_inputs": normfuse.Examples(image(2, 4, 6, 6), image(1, 4, 6, 6))}),
]  # fmt: skip
