"""Which code may run one of two layers without the other, as its source says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.branching import may_part
from normfuse.capture import capture
from tests.parity import randomize_norms
from tests.zoo.trap import image


class ConvBN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.skip: nn.Module | None = None
        self.layers = [self.conv, self.bn]

    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        return self.bn(self.conv(x))


class Skips(ConvBN):
    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        x = self.conv(x)
        if use_bn:
            x = self.bn(x)
        return x


class Leaves(ConvBN):
    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        x = self.conv(x)
        if not use_bn:
            return x
        return self.bn(x)


class ByShape(ConvBN):
    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        y = self.conv(x)
        many = y.shape[0] > 1
        return self.bn(y) if many else y


class InHelper(ConvBN):
    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        return self.normalized(self.conv(x), use_bn)

    def normalized(self, x: Tensor, use_bn: bool) -> Tensor:
        return self.bn(x) if use_bn else x


class InLoop(ConvBN):
    """The layers have other names than their own."""

    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index == 0 or use_bn:
                x = layer(x)
        return x


class OfOneList(ConvBN):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([self.conv, self.bn])

    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        x = self.parts[0](x)
        return self.parts[1](x) if use_bn else x


class Tries(ConvBN):
    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        x = self.conv(x)
        try:
            return self.bn(x)
        except RuntimeError:
            return x


class Matches(ConvBN):
    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        x = self.conv(x)
        match use_bn:
            case True:
                return self.bn(x)
            case _:
                return x


class Settings(ConvBN):
    """Branches on the model alone."""

    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        x = self.conv(x)
        if self.skip is not None:
            return self.skip(x)
        return self.bn(x) if isinstance(self.bn, nn.Module) and not torch.jit.is_scripting() else x  # type: ignore[reportPrivateImportUsage]


class Elsewhere(ConvBN):
    """Branches on the input before the two, after them and around both."""

    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        features = [x] if isinstance(x, Tensor) else x
        if use_bn is None:
            return x
        y = self.bn(self.conv(features[0])) if x.dim() == 4 else x
        if y.shape[0] > 5:
            y = y * 2
        return y


def two_calls(kind: Callable[[], nn.Module]) -> bool:
    graph = capture(kind().eval(), image(dtype=torch.float32))
    calls = {str(node.target).rpartition(".")[2]: node for node in graph.nodes if node.op == "call_module"}
    first, second = calls.values()
    return may_part(first, second, graph) and may_part(second, first, graph)


@pytest.mark.parametrize("kind", [Skips, Leaves, ByShape, InHelper, InLoop, OfOneList, Tries, Matches])
def test_a_branch_on_the_input_may_part_two_layers(kind: type[nn.Module]):
    assert two_calls(kind)


@pytest.mark.parametrize("kind", [ConvBN, Settings, Elsewhere, lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())])
def test_other_code_runs_them_together(kind: Callable[[], nn.Module]):
    assert not two_calls(kind)


def test_code_without_source_may_do_anything():
    names: dict[str, object] = {"ConvBN": ConvBN}
    exec("class Made(ConvBN):\n    def forward(self, x):\n        return self.bn(self.conv(x))\n", names)
    made = names["Made"]
    assert isinstance(made, type)
    assert two_calls(made)


@pytest.mark.parametrize("kind", [ConvBN, Settings, Elsewhere])
def test_code_that_runs_them_together_gets_no_hooks(kind: type[nn.Module]):
    model = randomize_norms(kind().double().eval())
    folded = normfuse.fold(model, example_inputs=image())
    assert isinstance(folded.bn, nn.Identity)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())
