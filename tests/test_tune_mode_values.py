"""The value between a product and its norm in Tune mode: who may read it, and that nothing can mislead the two."""

from __future__ import annotations

import functools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import normfuse
from normfuse.layers.normalized_value import NormalizedValue
from tests.gradients import assert_same, gradients, hard_norms, set_mode
from tests.parity import EXACT, error
from tests.zoo import ZOO
from tests.zoo.trap import image


class Net(nn.Module):
    """A pair, whose calls are up to a function."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.way, self.usual = way, True

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def straight(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)).relu_()


def network(way: Callable[[Any, Tensor], Tensor] = straight) -> Net:
    torch.manual_seed(0)
    return hard_norms(Net(way).double())  # type: ignore[return-value]


def tuned(way: Callable[[Any, Tensor], Tensor] = straight) -> Net:
    return normfuse.tune_mode(network(way)).train()


def assert_is_eval_mode(way: Callable[[Any, Tensor], Tensor]) -> None:
    assert_same(gradients(set_mode(network(way), True), image()), gradients(tuned(way), image()))


def assert_still_right(model: Net) -> None:
    """Assert that a model is right after whatever was done to it."""
    assert_same(gradients(set_mode(network(), True), image()), gradients(model, image()))


# who may read it

READERS: dict[str, Callable[[Tensor], Any]] = {
    "an operation": lambda y: y + 1,
    "a method": lambda y: y.mean(),
    "in place": lambda y: y.relu_(),
    "among others": lambda y: torch.cat([torch.zeros(1), y.flatten()]),
    "a layer": nn.ReLU(),
    "another norm": nn.BatchNorm2d(4).double(),
    "another pair": lambda y: tuned()(y),
    "NumPy": lambda y: y.detach().numpy(),
    "a loss": lambda y: y.sum().backward(),
    "an index": lambda y: y[0],
    "a condition": lambda y: bool((y > 0).all()),
    "a hook of a tensor": lambda y: y.register_hook(lambda grad: None),
    "a checkpoint": lambda y: checkpoint(torch.sin, y, use_reentrant=False),
    "a function of autograd": lambda y: torch.utils.checkpoint.checkpoint(torch.sin, y, use_reentrant=True),
}


@pytest.mark.parametrize("reader", READERS)
def test_nobody_else_reads_the_value(reader: str):
    model = tuned()
    value = model.conv(image())
    with pytest.raises(normfuse.TuneModeError, match=r"the value of conv has bn applied already in Tune mode, and .*"):
        READERS[reader](value)
    assert_still_right(model)


def test_questions_about_it_are_answered():
    value, expected = tuned().conv(image()), network().conv(image())
    assert value.shape == expected.shape
    assert value.size(1) == 4
    assert (value.dtype, value.device, value.requires_grad) == (expected.dtype, expected.device, True)
    assert "NormalizedValue" in repr(value)
    assert isinstance(value, Tensor)


def test_after_its_norm_it_is_a_plain_tensor():
    model = tuned()
    value = model.conv(image())
    assert type(value) is NormalizedValue
    assert type(model.bn(value)) is Tensor
    assert not vars(value)


@pytest.mark.parametrize("value", [image(), nn.Parameter(image()), None], ids=["tensor", "parameter", "another pair's"])
def test_a_norm_takes_no_other_value(value: Tensor | None):
    model = tuned()
    with pytest.raises(
        normfuse.TuneModeError, match=r"bn is applied by conv in Tune mode and was given a value of som"
    ):
        model.bn(tuned().conv(image()) if value is None else value)
    assert_still_right(model)


def another_way(net: Net, x: Tensor) -> Tensor:
    """Leaves the norm out where its attribute says so, which no reading of the model shows."""
    y = net.conv(x)
    return (net.bn(y) if net.usual else y).relu()


def another_weight(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x) if net.usual else F.conv2d(x, net.conv.weight * 2, net.conv.bias, padding=1)
    return net.bn(y).relu()


@pytest.mark.parametrize("way", [another_way, another_weight])
def test_a_way_that_no_reading_took(way: Callable[[Any, Tensor], Tensor]):
    """It raises; the advice works as it is given."""
    model, expected = tuned(way), set_mode(network(way), True)
    model.usual = expected.usual = False  # type: ignore[assignment]
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with (
            context(),
            pytest.raises(normfuse.TuneModeError, match="call tune_mode again, with example_inputs that go"),
        ):
            model(image())
    normfuse.tune_mode(model, example_inputs=image())
    assert_same(gradients(expected, image()), gradients(model, image()))


# what does not mislead it


def both_then_both(net: Net, x: Tensor) -> Tensor:
    y, z = net.conv(x), net.conv(x.flip(0))
    return net.bn(y) + net.bn(z) * 2


def other_order(net: Net, x: Tensor) -> Tensor:
    y, z = net.conv(x), net.conv(x.flip(0))
    z = net.bn(z) * 2
    return net.bn(y) + z


def own_output(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(net.bn(net.conv(x)).tanh()))


def twice_read(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.bn(y) + net.bn(y).tanh()


@pytest.mark.parametrize("way", [straight, both_then_both, other_order, own_output, twice_read])
def test_calls_in_any_order(way: Callable[[Any, Tensor], Tensor]):
    assert_is_eval_mode(way)


@pytest.mark.parametrize("name", ["SharedNorm", "ConcatOfConvs", "SharedBlock", "ConvIntoShapeOnly"])
def test_other_pairs(name: str):
    """Several products of one norm, operations between them, a value that is asked for its shape."""
    trap = ZOO[name]
    model = normfuse.tune_mode(trap.build()).train()
    assert_same(gradients(set_mode(trap.build(), True), trap.inputs()), gradients(model, trap.inputs()))


def test_an_exception_between_the_two():
    def way(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        if not net.usual:
            raise KeyError
        return net.bn(y).relu_()

    model = tuned(way)
    for _ in range(2):
        model.usual = False
        with pytest.raises(KeyError):
            model(image())
        model.usual = True
        assert_still_right(model)


def test_threads():
    """Several run one model at once."""
    model, barrier, results = tuned(), threading.Barrier(3), []

    def run() -> None:
        barrier.wait()
        for _ in range(20):
            results.append(gradients(model, image()))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = gradients(set_mode(network(), True), image())
    assert len(results) == 60
    for found in results:
        assert_same(expected, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_inference(dtype: torch.dtype):
    model, expected = tuned().float().eval(), network().float().eval()
    x = image(dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        y, z = model(x), expected(x)
    assert y.dtype is z.dtype
    assert error(z, y) <= (1e-5 if dtype is torch.float32 else 0.1)


# checkpoints


def backward(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    return {"x": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}  # type: ignore[dict-item]


def conv_checkpointed(net: Net, x: Tensor, reentrant: bool) -> Tensor:
    return net.bn(checkpoint(net.conv, x, use_reentrant=reentrant)).relu_()


def norm_checkpointed(net: Net, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(lambda y: net.bn(y).sin(), net.conv(x), use_reentrant=reentrant)  # type: ignore[return-value]


def both_checkpointed(net: Net, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(lambda y: straight(net, y), x, use_reentrant=reentrant)  # type: ignore[return-value]


def each_checkpointed(net: Net, x: Tensor, reentrant: bool) -> Tensor:
    y = checkpoint(net.conv, x, use_reentrant=reentrant)
    return checkpoint(lambda y: net.bn(y).sin(), y, use_reentrant=reentrant)  # type: ignore[return-value]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", [conv_checkpointed, norm_checkpointed, both_checkpointed, each_checkpointed])
def test_checkpoints_around_either(way: Callable[..., Tensor], reentrant: bool):
    """One of the two may be computed again without the other; that leaves nothing behind."""
    models = [set_mode(network(), True), tuned()]
    for model in models:
        model.way = functools.partial(way, reentrant=reentrant)  # type: ignore[assignment]
    for _ in range(2):
        assert_same(*(backward(model, image()) for model in models))
    models[1].way = straight  # type: ignore[assignment]
    assert_still_right(models[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("saved", [torch.ops.aten.convolution.default, torch.ops.aten.mul.Tensor])
def test_selective_checkpoints(saved: Any):
    """Before an activation in place, where what an operation returned is kept."""
    contexts = functools.partial(create_selective_checkpoint_contexts, [saved])

    def way(net: Net, x: Tensor) -> Tensor:
        return checkpoint(lambda y: straight(net, y), x, use_reentrant=False, context_fn=contexts)  # type: ignore[return-value]

    models = [set_mode(network(), True), tuned()]
    for model in models:
        model.way = way  # type: ignore[assignment]
    assert_same(*(backward(model, image()) for model in models))


def test_operations_are_counted_as_in_eval_mode():
    counts = []
    for model in (set_mode(network(), True), tuned()):
        with FlopCounterMode(display=False) as counter:
            model(image()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# transforms and compilers that take one of the two


def test_transforms_of_one_of_the_two():
    plain, model = set_mode(network(), True), tuned()
    samples = image()[:, None]
    assert error(vmap(plain.conv)(samples).detach(), vmap(model.conv)(samples).detach()) <= EXACT
    expected = plain.bn(plain.conv(image())).detach()
    assert error(expected, vmap(model.bn)(vmap(model.conv)(samples))[:, 0].detach()) <= EXACT
    assert_still_right(model)


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def with_compiled_layer(model: Net) -> None:
    model.conv.compile(backend="eager")


def with_compiled_norm(model: Net) -> None:
    model.bn.compile(backend="eager")


def with_compiled_call_of_layer(model: Net) -> None:
    compiled = torch.compile(lambda x: model.conv(x), backend="eager")
    model.way = lambda net, x: net.bn(compiled(x)).relu_()


def with_compiled_call_of_norm(model: Net) -> None:
    compiled = torch.compile(lambda x: model.bn(x).relu(), backend="eager")
    model.way = lambda net, x: compiled(net.conv(x))


def with_a_break_between(model: Net) -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        torch._dynamo.graph_break()
        return net.bn(y).relu_()

    model.way = torch.compile(way, backend="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "compile_part",
    [
        with_compiled_layer,
        with_compiled_norm,
        with_compiled_call_of_layer,
        with_compiled_call_of_norm,
        with_a_break_between,
    ],
)
def test_one_of_the_two_is_compiled(compile_part: Callable[[Net], None], fresh: None):
    models = [set_mode(network(), True), tuned()]
    for model in models:
        compile_part(model)  # type: ignore[arg-type]
    for _ in range(2):
        assert_same(*(gradients(model, image()) for model in models))


@pytest.mark.filterwarnings("ignore")
def test_no_call_compiles_anew(fresh: None):
    model = tuned()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(image())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(image())


# files


def test_a_pair_that_was_pickled():
    model = pickle.loads(pickle.dumps(tuned()))
    assert isinstance(model.conv(image()), NormalizedValue)
    assert_still_right(model)
    model.bn = nn.Identity()
    expected = set_mode(network(), True)
    expected.bn = nn.Identity()
    assert_same(gradients(expected, image()), gradients(model, image()))


def test_a_layer_wrapped_after_pickling_raises():
    """What is loaded does not know where its layers are."""

    class Doubled(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * 2

    model = pickle.loads(pickle.dumps(tuned()))
    model.conv = Doubled(model.conv)
    with pytest.raises(normfuse.TuneModeError, match="call tune_mode again"):
        model(image())
    normfuse.tune_mode(model)
    expected = set_mode(network(), True)
    expected.conv = Doubled(expected.conv)
    assert_same(gradients(expected, image()), gradients(model, image()))
