"""The recorded reader: every read of a value is seen, the model runs once, and nothing of it is changed."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import normfuse
from normfuse.capture import capture, eval_mode, unwrap
from normfuse.capture.leaves import base_layer, is_leaf
from normfuse.errors import CaptureError
from normfuse.graph import ModelGraph, function_name
from tests.fingerprint import fingerprint
from tests.zoo import ZOO, Trap, layers, readers, sharing
from tests.zoo.trap import image


def graph_of(name: str) -> ModelGraph:
    return capture(ZOO[name].build(), ZOO[name].inputs())


def call_of(graph: ModelGraph, name: str) -> fx.Node:
    return graph.call_sites(name)[0]


def reads(graph: ModelGraph, name: str) -> list[str]:
    """Return what reads the output of a layer: names of layers and of functions."""
    nodes = graph.consumers(call_of(graph, name))
    return [str(n.target) if n.op == "call_module" else function_name(n) or n.op for n in nodes]


def test_shapes_and_types_are_recorded():
    graph = graph_of("ConcatOfConvs")
    assert graph.shape(call_of(graph, "conv2")) == (2, 3, 6, 6)
    assert graph.shape(call_of(graph, "bn")) == (2, 7, 6, 6)
    assert call_of(graph, "bn").meta["dtype"] == torch.float64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SkipAroundNorm", ["bn", "add"]),
        ("ConvIntoTwoNorms", ["bn", "bn2"]),
        ("ConvIsAlsoOutput", ["bn", "output"]),
        ("ConvIntoShapeOnly", ["bn"]),
        ("OutputInDictionary", ["bn", "output"]),
        ("OutputInDataclass", ["bn", "output"]),
        ("OutputInSlots", ["bn", "output"]),
        ("ItemOfConv", ["bn", "getitem"]),
        ("NumpyOfConv", ["bn", "numpy"]),
        ("BranchOnConv", ["sum", "bn"]),
        ("CustomFunctionReads", ["bn", "mul"]),
        ("KeepsItsConv", ["bn", "output"]),
    ],
)
def test_every_reader_of_a_value_is_seen(name: str, expected: list[str]):
    assert sorted(reads(graph_of(name), "conv")) == sorted(expected)


def test_function_that_returns_its_input_is_a_reader():
    assert len(reads(graph_of("CustomFunctionReturnsItsInput"), "conv")) == 2


def test_in_place_operation_gives_the_tensor_a_new_node():
    graph = graph_of("InPlaceReluBeforeNorm")
    assert reads(graph, "conv") == ["leaky_relu"]
    (source,) = call_of(graph, "bn").all_input_nodes
    assert function_name(source) == "leaky_relu"


@pytest.mark.parametrize("name", ["WriteThroughView", "WriteIntoBase"])
def test_alias_that_was_written_to_is_opaque(name: str):
    (source,) = call_of(graph_of(name), "bn").all_input_nodes
    assert function_name(source) == "opaque"


def test_parameters_are_named_by_where_they_stand():
    graph = graph_of("FunctionalLayers")
    assert {str(n.target) for n in graph.nodes if n.op == "get_attr"} >= {"weight", "bias", "running_mean", "gain"}


def test_subclass_with_its_own_forward_is_read_through():
    graph = graph_of("conv_that_doubles")
    assert graph.call_sites("0") == []
    assert [call.name for call in graph.calls] == ["", "0"]
    names = [function_name(node) for node in graph.body(graph.calls[1])]
    assert names == ["conv2d", "mul"]


@pytest.mark.parametrize(
    ("module", "base"),
    [
        (nn.Conv2d(1, 1, 1), nn.Conv2d),
        (type("Renamed", (nn.Conv2d,), {})(1, 1, 1), nn.Conv2d),
        (layers.Doubling(1, 1, 1), None),
        (nn.utils.parametrizations.weight_norm(nn.Linear(1, 1)), nn.Linear),
        (nn.SyncBatchNorm(1), nn.SyncBatchNorm),
        (nn.Sequential(), None),
        (nn.MultiheadAttention(2, 1), None),
        (readers.Nested(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_base_layer(module: nn.Module, base: type | None):
    assert base_layer(module) is base
    assert is_leaf(module) is (base is not None)


def test_forward_replaced_on_the_instance_is_no_leaf():
    conv = nn.Conv2d(1, 1, 1)
    conv.forward = layers.swap
    assert base_layer(conv) is None


class CountsCalls(sharing.ConvBN):
    calls = 0  # of the class: what a run counts on the model itself is put back

    def forward(self, x: Tensor) -> Tensor:
        CountsCalls.calls += 1
        assert not self.training
        assert not torch.is_grad_enabled()
        return super().forward(x)


def test_model_runs_once_in_eval_mode_without_gradients():
    model = CountsCalls().double().train()
    calls = CountsCalls.calls
    graph = capture(model, image())
    assert CountsCalls.calls == calls + 1
    assert model.training
    assert graph.training == frozenset()


def test_module_call_is_put_back():
    original = nn.Module.__call__
    capture(ZOO["SharedConv"].build(), image())
    assert nn.Module.__call__ is original
    with pytest.raises(CaptureError):
        capture(nn.Linear(3, 3), image())
    assert nn.Module.__call__ is original


def test_model_that_does_not_run_is_a_capture_error():
    with pytest.raises(CaptureError, match="does not run on the example inputs: RuntimeError"):
        capture(nn.Linear(3, 3), image(2, 5, dtype=torch.float32))


@pytest.mark.parametrize("trap", [ZOO["KeywordInputs"], ZOO["ListInput"]], ids=lambda t: t.name)
def test_inputs_of_every_form(trap: Trap):
    graph = capture(trap.build(), trap.inputs())
    assert sum(node.op == "placeholder" for node in graph.nodes) == 2


def test_names_of_training_parts_are_kept_for_a_model_in_eval_mode():
    model = ZOO["ChainedNorms"].build()
    model.bn2.train()
    assert capture(model, image()).training == {"bn2"}
    assert model.bn2.training


def test_eval_mode_restores_after_an_error():
    model = ZOO["ChainedNorms"].build()
    model.bn.train()
    with contextlib.suppress(KeyError), eval_mode(model):
        assert not model.bn.training
        raise KeyError
    assert (model.bn.training, model.conv.training) == (True, False)


def test_wrappers_are_looked_through():
    model = nn.Linear(1, 1)
    wrapped: Any = torch.compile(nn.DataParallel(nn.DataParallel(model)))
    assert unwrap(wrapped) is model
    assert unwrap(model) is model


def test_conv_is_called_once_per_reading_of_the_graph():
    """Recording the same model again gives the same graph."""
    model = ZOO["SharedBlock"].build()
    first, second = capture(model, image()), capture(model, image())
    assert [str(n.target) for n in first.nodes] == [str(n.target) for n in second.nodes]
    assert len(first.call_sites("conv")) == 3


def test_recording_does_not_import_the_compiler():
    """A dispatch mode is wrapped by torch in what imports torch._dynamo, which takes seconds, unless told otherwise."""
    code = (
        "import sys, torch; from torch import nn; from normfuse.capture import capture; before = set(sys.modules); "
        "capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(1, 3, 8, 8)); "
        "print(sum(name.startswith('torch._dynamo') for name in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "0"


class _NormWithActivation(nn.BatchNorm2d):
    """A norm with a forward of its own, which the readers read through."""

    def forward(self, input: Tensor) -> Tensor:
        y = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return y.relu()


class _Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), _NormWithActivation(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() > 0 else x


def test_parameters_of_a_part_have_their_names_in_the_whole_model():
    graph = capture(_Untraceable().eval())
    assert graph.partial == ("block",)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    assert read == {f"block.1.{name}" for name in ("running_mean", "running_var", "weight", "bias")}
    assert normfuse.inspect(_Untraceable().eval()).norms[0].refusal is not None


class Remembers(nn.Module):
    """Counts its calls, keeps a cache and a history, writes into its input and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls, self.seen = nn.Conv2d(3, 4, 1), 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.cache = x.add_(1)
        self.register_buffer("made", x.mean())
        return self.conv(x) + torch.randn(1) + random.random() + np.random.rand()


def test_a_run_leaves_no_trace_on_the_model_its_input_and_the_generators():
    model, x = Remembers(), torch.zeros(1, 3, 2, 2)
    draws = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]]
    before = fingerprint(model)
    (first,), (second,) = (capture(model, x).returned for _ in range(2))
    assert fingerprint(model) == before
    assert not x.any()
    assert torch.equal(first["output"], second["output"])  # each from the same random state
    for old, new in zip(draws, [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]], strict=True):
        assert old == new if isinstance(old, tuple) else (old == new).all()


def test_one_tensor_at_two_places_is_one_in_a_run():
    class Attends(nn.Module):
        def forward(self, q: Tensor, pair: dict[str, Tensor]) -> Tensor:
            return q + (1.0 if q is pair["k"] else 0.0)

    x = torch.zeros(2)
    (returned,) = capture(Attends(), (x, {"k": x})).returned
    assert returned["output"].tolist() == [1, 1]
