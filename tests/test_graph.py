"""The questions a pass asks of a captured model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normfuse.capture import capture
from normfuse.graph import ModelGraph, function_name, has_hooks, occurrences
from normfuse.named_tensors import named_tensors
from tests.zoo import ZOO, layers, sharing
from tests.zoo.trap import image


def graph_of(name: str) -> ModelGraph:
    return capture(ZOO[name].build(), ZOO[name].inputs())


def test_call_sites():
    assert [len(graph_of(name).call_sites("conv")) for name in ("ChainedNorms", "SharedConv", "SharedBlock")] == [
        1,
        2,
        3,
    ]
    assert graph_of("SharedConv").call_sites("nothing") == []


def test_uses_of_a_weight_count_calls_and_direct_reads():
    assert len(graph_of("ChainedNorms").uses("conv.weight")) == 1
    assert len(graph_of("WeightReadDirectly").uses("conv.weight")) == 2
    assert len(graph_of("TiedParameters").uses("other.weight")) == 2


def test_owners_of_a_tied_parameter():
    graph = graph_of("TiedParameters")
    assert set(graph.owners("conv.weight")) == {"conv.weight", "other.weight"}
    assert graph.owners("conv.bias") == ("conv.bias",)


def test_module_under_two_names_is_not_a_tie():
    assert graph_of("NormUnderTwoNames").owners("bn.weight") == ("bn.weight",)


class Doubled(sharing.ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y + y) + torch.zeros_like(y)


def test_consumers_count_occurrences_and_leave_out_readers_of_the_shape():
    graph = capture(Doubled().double().eval(), image())
    (conv,) = graph.call_sites("conv")
    add, again = graph.consumers(conv)
    assert add is again
    assert occurrences(add, conv) == 2
    assert len(conv.users) == 2


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.exp().view(1, 2, 1)


def test_constants_are_what_depends_on_parameters_alone():
    graph = capture(Constants(), torch.zeros(1, 2, 3))
    constant = {function_name(n) or n.op: graph.is_constant(n) for n in graph.nodes if n.op != "output"}
    assert constant == {"placeholder": False, "get_attr": True, "exp": True, "view": True, "mul": False}
    view = next(n for n in graph.nodes if function_name(n) == "view")
    torch.testing.assert_close(graph.value(view), torch.tensor([1.0, 2.0]).exp().view(1, 2, 1))
    assert not graph.value(view).requires_grad


def test_value_follows_an_edit():
    graph = capture(Constants(), torch.zeros(1, 2, 3))
    graph.assign({"scale": torch.zeros(2)})
    view = next(n for n in graph.nodes if function_name(n) == "view")
    assert torch.equal(graph.value(view), torch.ones(1, 2, 1))


def test_module_is_looked_up_afresh_after_an_edit():
    graph = graph_of("ChainedNorms")
    graph.perform(
        {"op": "replace", "path": "bn", "module": {"class": "torch.nn.modules.linear.Identity", "kwargs": {}}}
    )
    assert isinstance(graph.module("bn"), nn.Identity)
    assert isinstance(graph.module_of(graph.call_sites("bn")[0]), nn.Identity)
    assert len(graph.edits) == 1
    with pytest.raises(AttributeError):
        graph.module("nothing")


def test_body_of_a_call():
    graph = graph_of("conv_same")
    (call,) = graph.calls_of("0")
    assert [function_name(node) for node in graph.body(call)] == ["pad", "conv2d"]


def test_hooked_calls():
    assert [call.name for call in graph_of("WatcherOnBlock").hooked_calls] == ["stem"]
    assert graph_of("ChainedNorms").hooked_calls == []
    norm = nn.BatchNorm2d(1)
    assert not has_hooks(norm)
    norm.register_forward_pre_hook(print)
    assert has_hooks(norm)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x.relu_(), "relu"),
        (lambda x: torch.nn.functional.relu(x), "relu"),
        (lambda x: x + 1, "add"),
        (lambda x: x.T, "T"),
        (lambda x: torch.ops.aten.relu(x), "relu"),
        (lambda x: x[0], "getitem"),
    ],
)
def test_function_names(function, name: str):
    graph = capture(layers.Then(function), torch.ones(2, 2))
    assert [function_name(n) for n in graph.nodes if n.op == "call_function"] == [name]


def test_named_tensors_repeat_ties_and_include_plain_attributes():
    model = ZOO["TiedParameters"].build()
    model.table = torch.zeros(3)
    names = [name for name, _ in named_tensors(model)]
    assert {"conv.weight", "other.weight", "table", "bn.running_var"} <= set(names)
