"""Refusals for what else holds, watches or changes a layer, and for what its weights are stored as."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from normfuse.layers import ActNorm, PowerNorm
from tests.refusals.cases import Alone, Case, Net, sequence
from tests.refusals.norm_cases import functional
from tests.refusals.route_cases import bn, conv
from tests.zoo.trap import image


class Codes(torch.Tensor):
    """Eight bits that stand for a sixty-fourth each."""

    codes: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Codes:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float64)
        made.codes = codes
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        plain = [a.codes.double() / 64 if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        return nn.Parameter(Codes(self.codes.clone()), requires_grad=False)


def quantize(model: Any) -> None:
    model[0].weight = nn.Parameter(Codes(torch.randint(-99, 99, (4, 4), dtype=torch.int8)), requires_grad=False)


def chain() -> nn.Module:
    return sequence(conv(), bn(), nn.Sigmoid())


def patch(model: Any) -> None:
    forward = model[1].forward
    model[1].forward = lambda x: forward(x)


def unpatch(model: Any) -> None:
    del model[1].forward


HOLDING = [
    Case("a hook on the state dict of 1 would be lost with it | remove it first", chain,
         prepare=lambda m: m[1]._register_state_dict_hook(lambda *a: None),
         advice=lambda m: m[1]._state_dict_hooks.clear()),
    Case("1.forward was replaced on the instance, which would be lost with the layer"
         " | del 1.forward, or what its library undoes it with", chain, prepare=patch, advice=unpatch),
    Case("0.weight is stored as Codes, not as plain numbers | fold before quantizing",
         lambda: sequence(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sigmoid()), ((3, 4),), prepare=quantize),
    Case("norm is asked for more than its map, which a fold would lose", lambda: Net(
        lambda m, x: m.norm(m.conv(x), return_log_det=True)[0].sigmoid(), conv=conv(), norm=ActNorm(4)), norms=False,
        prepare=lambda m: (m.train(), m(image(2, 4, 6, 6)), m.eval())),
    Case("conv is used in another way by another example", lambda: Net(
        lambda m, x: m.bn(m.conv(x)).sigmoid() if x.shape[0] > 1 else m.conv(x), conv=conv(), bn=bn()), None,
        options={"example_inputs": [image(2, 4, 6, 6), image(1, 4, 6, 6)]}),
    Case("1.group_scaling divides each token by its own root mean square, and stays",
         lambda: sequence(nn.Linear(4, 4), PowerNorm(4, group_scaling=2), nn.Linear(4, 2)), ((2, 5, 4),)),
    Case(":batch_norm changes nothing already, only its call is left", functional(),
         prepare=lambda m: (m.mean.zero_(), m.var.fill_(1 - 1e-5))),
    Case("mean is also read by add in the model", lambda: Net(
        lambda m, x: F.batch_norm(m.conv(x), m.mean, m.var).sigmoid() + m.mean.sum(), conv=conv(),
        mean=nn.Buffer(torch.randn(4)), var=nn.Buffer(torch.rand(4) + 0.5))),
    Case("bn.weight is also read by add in the model", lambda: Net(
        lambda m, x: m.bn(m.conv(x)).sigmoid() + m.bn.weight.sum(), conv=conv(), bn=bn())),
    Case(":batch_norm has no running statistics | recalibrate it, or leave it", lambda: Alone(
        lambda m, x: F.batch_norm(m.conv(x), None, None, training=False).sigmoid(), conv=conv()), None),
]  # fmt: skip
