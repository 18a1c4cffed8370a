"""Tune mode under what torch does to a model: compilation, export, checkpointing, function transforms, tracing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import normfuse
from tests.gradients import assert_same, gradients, hard_norms
from tests.parity import EXACT, error
from tests.zoo.trap import image

pytestmark = pytest.mark.usefixtures("form")


class Shared(nn.Module):
    """A pair that is called on its own output, and a norm that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = nn.BatchNorm2d(4)
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(self.alone(x))).tanh()
        return self.bn(self.conv(y))


def network(seed: int = 0) -> nn.Sequential:
    """Return a small smooth network with every kind of layer in Tune mode; the clamp is not near its bounds."""
    torch.manual_seed(seed)
    up = (nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), nn.BatchNorm2d(4), nn.Hardtanh(-99, 99))
    model = nn.Sequential(Shared(), *up, nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, 5))
    return hard_norms(model.double().eval())  # type: ignore[return-value]


SHAPE = (2, 4, 3, 3)


def tuned() -> nn.Sequential:
    return normfuse.tune_mode(network()).train()


def test_every_kind_is_in_the_network():
    kinds = {type(module).__name__ for module in tuned().modules()}
    assert {"TunedConv2d", "TunedConvTranspose2d", "TunedBatchNorm2d", "FixedBatchNorm2d", "TunedHardtanh"} <= kinds


# compilation and export


@pytest.fixture
def fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str, fresh: None):
    """In one graph, forward and backward; a step of training does not make it stale."""
    expected, model = network(), tuned()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        assert_same(gradients(expected, image(*SHAPE)), without_prefix(gradients(compiled, image(*SHAPE))))
        with torch.no_grad():
            for m in (expected, model):
                for tensor in [*m.parameters(), m[0].bn.running_mean]:
                    tensor.mul_(1.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compile_with_inductor(fresh: None):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 1), nn.Sigmoid())
    reference = hard_norms(model.double().eval())
    compiled = torch.compile(normfuse.tune_mode(copy.deepcopy(reference)).train(), fullgraph=True)
    assert_same(gradients(reference, image()), without_prefix(gradients(compiled, image())))


def without_prefix(values: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name.removeprefix("_orig_mod."): value for name, value in values.items()}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_export(strict: bool, fresh: None):
    """The pairs export without a norm; what stays of one is in its inference form."""
    for mode in (False, True):
        program = torch.export.export(tuned().train(mode), (image(*SHAPE),), strict=strict)
        norms = [node for node in program.graph.nodes if "norm" in str(node.target) and node.op == "call_function"]
        assert len(norms) == 1, "the one that stands alone"
        assert not program.graph_signature.buffers_to_mutate
        with torch.no_grad():
            assert error(network()(image(*SHAPE)), program.module()(image(*SHAPE))) <= EXACT
        assert set(program.state_dict) == set(network().state_dict())


@pytest.mark.filterwarnings("ignore")
def test_jit_trace():
    model = tuned().eval()
    traced = torch.jit.trace(model, image(*SHAPE))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(1.1)
        assert error(model(image(*SHAPE)), traced(image(*SHAPE))) <= EXACT


def test_symbolic_trace():
    """As fx-based tools read it; nothing computed is baked in."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model = tuned().eval()
    with torch.no_grad():
        state = dict(model.state_dict())
        program = make_fx(lambda x, p: functional_call(model, p, (x,)), tracing_mode="fake")(image(*SHAPE), state)
        other = {name: value * 1.1 if value.is_floating_point() else value for name, value in state.items()}
        assert error(functional_call(network(), other, (image(*SHAPE),)), program(image(*SHAPE), other)) <= EXACT


# checkpointing


class Checkpointed(nn.Module):
    """Runs its blocks again in backward."""

    def __init__(self, model: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.model[0], self.model[1:4], self.model[4:]):
            x = checkpoint(block, x, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return x


def backward(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that ``backward`` leaves, which is all that reentrant checkpointing knows."""
    model.zero_grad()
    x = image(*SHAPE).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool, frozen: bool):
    models = [Checkpointed(network(), reentrant), Checkpointed(tuned(), reentrant)]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen or "bn" in name)
    assert_same(backward(models[0]), backward(models[1]))


# function transforms


def loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, parameters, (x,)).square().sum()


def test_functional_call_with_other_tensors():
    """Gain and shift come from the call as well, not from the norm as it was."""
    other = {name: (value * 0.5 + 0.1).detach().requires_grad_() for name, value in network().named_parameters()}
    other |= {name: value * 0.5 + 0.1 for name, value in network().named_buffers() if value.is_floating_point()}
    trained = [t for t in other.values() if t.requires_grad]
    results = [torch.autograd.grad(loss(m, other, image(*SHAPE)), trained) for m in (network(), tuned())]
    for one, two in zip(*results, strict=True):
        assert error(one, two) <= EXACT


def test_grad():
    parameters = {name: p.detach() for name, p in network().named_parameters()}
    expected, found = (grad(loss, argnums=1)(m, parameters, image(*SHAPE)) for m in (network(), tuned()))
    assert_same(expected, found)


def test_gradients_per_sample():
    parameters = {name: p.detach() for name, p in network().named_parameters()}

    def one(model: nn.Module) -> Any:
        return vmap(lambda x: grad(loss, argnums=1)(model, parameters, x[None]))(image(*SHAPE))

    expected = one(network())
    assert_same(expected, one(tuned()))
    assert expected["0.conv.weight"].shape == (2, 4, 2, 3, 3)


def test_ensemble():
    """Parameters and statistics are batched."""
    models = [normfuse.tune_mode(network(seed)) for seed in (0, 1)]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    inputs = image(*SHAPE)
    found = vmap(lambda p, b: functional_call(models[0], (p, b), (inputs,)))(parameters, buffers)
    with torch.no_grad():
        for model, y in zip(models, found.detach(), strict=True):
            assert error(model(image(*SHAPE)), y) <= EXACT


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
def test_forward_mode():
    parameters = {name: p.detach() for name, p in network().named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    results = [jvp(lambda p, m=m: loss(m, p, image(*SHAPE)), (parameters,), (tangents,)) for m in (network(), tuned())]
    for one, two in zip(*results, strict=True):
        assert error(one, two) <= EXACT


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
def test_dual_numbers():
    import torch.autograd.forward_ad as forward_ad

    tangents = []
    for model in (network(), tuned()):
        with forward_ad.dual_level():
            y = model(forward_ad.make_dual(image(*SHAPE), image(*SHAPE).flip(0)))
            tangents.append(forward_ad.unpack_dual(y).tangent.detach())
    assert error(*tangents) <= EXACT


@pytest.mark.parametrize("frozen", [False, True])
def test_second_gradients(frozen: bool):
    """A penalty on gradients, through a pair that is called on its own output."""
    results = []
    for model in (network(), tuned()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen or "bn" in name)
        x = image(*SHAPE).requires_grad_()
        trained = [x, *(p for p in model.parameters() if p.requires_grad)]
        first = torch.autograd.grad(model(x).square().sum(), trained, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), trained)
        results.append(dict(enumerate([*(t.detach() for t in first), *second])))
    assert_same(results[0], results[1])


def test_gradgradcheck():
    model = normfuse.tune_mode(network()[0].train())
    assert torch.autograd.gradgradcheck(model, image(1, 4, 2, 2).requires_grad_())
