"""Several calls of one model, read together: a fold is right in all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import CaptureError, Examples, Reason, Status
from normfuse.capture import capture
from normfuse.examples import calls_of
from tests.parity import assert_parity, randomize_norms
from tests.test_reach import Domains, built
from tests.zoo.trap import image

X = image()


@pytest.mark.parametrize(
    ("inputs", "calls"),
    [
        (X, 1),
        ((X, 1), 1),
        ({"x": X}, 1),
        ([X, X], 1),  # one argument, as detectors take it
        ([{"x": X}], 1),
        ([(X,), (X, 1)], 2),
        ([X, (X, 1), {"x": X}], 3),
        (([(X,), (X, 1)],), 1),  # a list with tuples as one argument
        (Examples(X, {"x": X}), 2),
        (Examples([X, X]), 1),
    ],
)
def test_what_stands_for_several_calls(inputs: Any, calls: int):
    assert len(calls_of(inputs)) == calls


def test_examples_are_at_least_one():
    with pytest.raises(ValueError, match="at least one"):
        Examples()


class Steps(nn.Module):
    """One block on every path; a second one behind an argument, and a layer in front of it only there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.position = nn.Parameter(torch.randn(1, 4, 6, 6))

    def forward(self, x: Tensor, deep: bool = False) -> Tensor:
        y = self.stem(x + self.position)
        return self.bn(self.conv(y)) if deep else y


EXAMPLES = [(X,), (X, True), (X[:1], True)]


def test_norms_fold_in_all_examples():
    model = built(Steps)
    result = normfuse.apply(model, ["fold-bn"], example_inputs=EXAMPLES)
    assert [(o.subject, o.status) for o in result.report.outcomes] == [
        ("stem.1", Status.APPLIED),
        ("bn", Status.APPLIED),
    ]
    for inputs in EXAMPLES:
        assert_parity(model, result.model, inputs)


class WithoutNorm(nn.Module):
    """The norm itself is behind the argument: without it, the same convolution has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, use_bn: bool = True) -> Tensor:
        return self.bn(self.conv(x)) if use_bn else self.conv(x)


@pytest.mark.parametrize("options", [{}, {"duplicate_shared": True}])
@pytest.mark.parametrize("kind", [Domains, WithoutNorm])
def test_a_layer_that_examples_use_differently_stays(kind: type[nn.Module], options: dict[str, bool]):
    model = built(kind)
    examples = Examples((X, True), (X, False))
    result = normfuse.apply(model, ["fold-bn"], example_inputs=examples)
    assert {o.status for o in result.report.norms} == {Status.REFUSED}
    refusal = result.report.norms[0].refusal
    assert refusal is not None
    assert refusal.reason is Reason.SHARED_MODULE
    assert "conv is used in another way by another example" in refusal.detail
    assert not refusal.hint
    folded = normfuse.fold(model, example_inputs=examples, **options)
    for inputs in examples.calls:
        assert_parity(model, folded, inputs)


class CallsTwice(nn.Module):
    """A layer called twice, or in one example once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(4, 4, 1), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        for norm in list(self.norms)[:times]:
            x = norm(self.conv(x)).relu()
        return x


def test_copies_for_each_call_are_those_of_one_run():
    model = built(CallsTwice)
    examples = [(X,), (X[:1], 2)]
    folded = normfuse.fold(model, example_inputs=examples, duplicate_shared=True)
    assert len(folded.conv.sites) == 2
    assert isinstance(folded.norms[1], nn.Identity)
    for inputs in examples:
        assert_parity(model, folded, inputs)


def test_calls_of_another_number_cannot_be_told_apart():
    model = built(CallsTwice)
    result = normfuse.apply(model, ["duplicate-shared", "fold-bn"], example_inputs=[(X, 2), (X, 3)])
    assert isinstance(result.model.conv, nn.Conv2d)
    refusals = [str(o.refusal) for o in result.report.refused if o.subject == "conv"]
    assert refusals == ["shared module: conv is not called equally often in every example"]


class Functional(nn.Module):
    """A norm called by its function, and one that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.gain = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        y = F.batch_norm(self.conv(x), self.mean, self.var)  # type: ignore[arg-type]
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + 1e-5).sqrt() * self.gain
        return y.relu() if more else y


def test_a_norm_without_a_module_is_one_in_all_runs():
    model = randomize_norms(Functional().double().eval())
    examples = Examples(X, (X, True))
    report = normfuse.inspect(model, example_inputs=examples)
    assert [o.subject for o in report.norms] == [":batch_norm", ":LayerNorm"]
    folded = normfuse.fold(model, example_inputs=examples)
    for inputs in examples.calls:
        assert_parity(model, folded, inputs)


def test_runs_do_not_see_each_other():
    graph = capture(built(Steps), EXAMPLES)
    assert len(graph.returned) == 3
    assert {node.meta["run"] for node in graph.call_sites("conv")} == {1, 2}
    assert graph.most_calls("stem.0") == 1
    for node in graph.nodes:
        assert {n.meta.get("run") for n in node.all_input_nodes} <= {node.meta.get("run")} or node.op == "output"


class TakesList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.body(torch.cat(images))


def test_a_list_is_one_argument_where_the_model_takes_it():
    model = randomize_norms(TakesList().double().eval())
    assert_parity(model, normfuse.fold(model, example_inputs=[X, X]), ([X, X],))


def test_a_list_is_several_calls_where_the_model_does_not_take_it():
    model = built(Steps)
    report = normfuse.inspect(model, example_inputs=[X, {"x": X, "deep": True}])
    assert {o.status for o in report.norms} == {Status.APPLIED}
    with pytest.raises(CaptureError, match=r"the list is one argument; several calls are normfuse\.Examples"):
        normfuse.fold(model, example_inputs=[X[:, :3]])


def test_every_entry_point_takes_several(tmp_path: Path):
    model = built(Steps)
    result = normfuse.apply(model, ["fold-bn"], example_inputs=EXAMPLES, tolerance=normfuse.Tolerance(0, 1e-9))
    assert isinstance(result.model.bn, nn.Identity)
    assert isinstance(normfuse.fold_bn(model, example_inputs=EXAMPLES).bn, nn.Identity)
    assert normfuse.verify(model, result.model, Examples(*EXAMPLES))
    compiled = normfuse.compile(model, EXAMPLES, backend="eager")
    assert torch.allclose(compiled(X, True), model(X, True), atol=1e-9, rtol=0)
    tuned = normfuse.tune_mode(copy.deepcopy(model), example_inputs=EXAMPLES)
    assert torch.allclose(tuned(X, True), model(X, True), atol=1e-9, rtol=0)
    pytest.importorskip("onnx")
    report = normfuse.export(model.float(), tmp_path / "first.onnx", example_inputs=[(X.float(),), (X.float(), True)])
    assert {o.status for o in report.norms} == {Status.APPLIED}
