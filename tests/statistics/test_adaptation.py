"""Each method does, step by step, what a literal transcription of its equations does; in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from normfuse.statistics import SAR, AdaB2N, SourceFree, alpha_bn, batch_statistics, entropy, leave, unmix_tns
from normfuse.statistics.unmix import start
from tests.parity import EXACT, error
from tests.statistics import literal_adaptation as literal
from tests.statistics.networks import images, network, norms_of

BATCHES = [images(6, 1), images(1, 2) + 2, images(9, 3) * 0.2]


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_alpha_bn(weight: float):
    batches = BATCHES if weight < 1 else [BATCHES[0], BATCHES[2]]
    model = alpha_bn(network(), weight)
    expected, _ = literal.run(network(), lambda layer: literal.Alpha(layer, weight))
    for x in batches:
        assert error(expected(x), model(x)) <= EXACT


def test_alpha_bn_at_both_ends_is_eval_mode_and_training_mode():
    x = images(9)
    assert error(network()(x), alpha_bn(network(), 0.0)(x)) <= EXACT
    assert error(network().train()(x), batch_statistics(network())(x)) <= EXACT


def test_gradients_go_through_the_statistics_of_the_batch():
    x = images(9)
    trained, adapted = network().train(), batch_statistics(network())
    for model in (trained, adapted):
        model(x).square().sum().backward()
    for one, other in zip(trained.parameters(), adapted.parameters(), strict=True):
        assert error(one.grad, other.grad) <= 1e-8 or float(one.grad.abs().max()) < 1e-10


@pytest.mark.parametrize("components", [1, 2, 16])
def test_unmix_tns(components: int):
    generator = torch.Generator().manual_seed(7)
    noise = [
        torch.randn(components, len(n.weight), generator=generator, dtype=torch.float64) for n in norms_of(network())
    ]
    expected, layers = literal.run(network(), lambda layer: literal.UnMix(layer, noise.pop(0), 8))
    model = unmix_tns(network(), components=components, batch_max=8, seed=7)
    for x in BATCHES:
        with torch.no_grad():
            assert error(expected(x), model(x)) <= EXACT
    for norm, layer in list(zip(norms_of(model), layers, strict=True))[:2]:
        assert error(torch.stack(layer.means), norm.adaptation.mean) <= EXACT
        assert error(torch.stack(layer.vars), norm.adaptation.variance) <= EXACT


def test_components_start_with_the_stored_statistics_in_expectation():
    norm = norms_of(network())[0]
    found = [start(norm, 16, 64, torch.Generator().manual_seed(seed)) for seed in range(4000)]
    mean = torch.stack([f.mean.mean(0) for f in found]).mean(0)
    mixture = torch.stack([f.variance.mean(0) + f.mean.var(0, correction=0) for f in found]).mean(0)
    deviation = norm.running_var.sqrt()
    assert float(((mean - norm.running_mean) / deviation).abs().max()) < 0.02
    assert float((mixture / norm.running_var - 1).abs().max()) < 0.02


@pytest.mark.parametrize("kappa", [0.0, 0.4, 1.0])
def test_ada_b2n(kappa: float):
    model = network().train()
    balance = AdaB2N(model, 3, kappa=kappa)
    logits = []
    for norm in norms_of(model):
        nn.init.normal_(norm.task_logits)
        logits.append(norm.task_logits.detach().clone().requires_grad_())
    kept = list(logits)
    expected, layers = literal.run(network(), lambda layer: literal.Balanced(layer, kept.pop(0), kappa))
    tasks = [
        None,
        torch.tensor([0, 1, 1, 0, 0, 1]),
        torch.tensor([2, 2, 0, 1, 2, 0, 0, 0, 2]),
        torch.tensor([1, 0, 0, 0]),
    ]
    for step, x in enumerate([images(5, 1), images(6, 2), images(9, 3), images(4, 4)]):
        balance.set_tasks(tasks[step])
        seen = min(step + 1, 3)
        found, wanted = model(x), expected(x, tasks[step], seen)
        assert error(wanted, found) <= EXACT
        penalty = sum(layer.penalty for layer in layers)
        assert float(penalty.detach()) == pytest.approx(float(balance.penalty().detach()), rel=1e-10, abs=1e-25)
        grads = torch.autograd.grad(wanted.square().sum() + penalty, logits, allow_unused=True)
        model.zero_grad()
        (found.square().sum() + balance.penalty()).backward()
        for norm, grad in zip(norms_of(model), grads, strict=True):
            assert (grad is None) == (norm.task_logits.grad is None)
            assert grad is None or error(grad, norm.task_logits.grad) <= 1e-8
        for norm, layer in zip(norms_of(model), layers, strict=True):
            assert error(layer.mean, norm.running_mean) <= EXACT
            assert error(layer.var, norm.running_var) <= EXACT
        balance.end_task()
    plain = balance.finish()
    assert list(plain.state_dict()) == list(network().state_dict())
    assert all(type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d) for norm in norms_of(plain))
    assert norms_of(plain)[0].num_batches_tracked == 4


def test_the_schedule_of_ada_b2n_has_the_published_ends():
    rates = {}
    for kappa in (0.0, 0.5, 1.0):
        norm = norms_of(AdaB2N(network(), 2, kappa=kappa).model)[0]
        rates[kappa] = [norm.adaptation.advance() for _ in range(400)]
    assert rates[0.0][:3] == pytest.approx([1, 1 / 2, 1 / 3])
    assert rates[1.0][:3] == pytest.approx([0.1] * 3)
    assert rates[0.5][-1] == pytest.approx(1 - math.sqrt(0.9), rel=1e-6)


def test_source_free():
    model = network()
    moving = SourceFree(model, initial=0.8, decay=0.3)
    twins = copy.deepcopy(network())
    expected, layers = literal.run(twins, lambda layer: literal.Decaying(layer, 0.8, 0.3))
    with torch.no_grad():
        for x in (BATCHES[0], BATCHES[2], BATCHES[0] + 1):
            assert error(expected(x), model(x)) <= EXACT
            for norm, layer in zip(norms_of(model), layers, strict=True):
                assert error(layer.mean, norm.running_mean) <= EXACT
                assert error(layer.var, norm.running_var) <= EXACT
                norm.weight.add_(0.1)
                layer.layer.weight.add_(0.1)
        x = BATCHES[0]
        assert error(expected(x), model(x)) <= EXACT
        assert error(sum(layer.penalty for layer in layers), moving.penalty()) <= EXACT
    assert float(moving.penalty().detach()) > 0
    frozen = moving.finish()
    assert error(layers[0].var, norms_of(frozen)[0].running_var) <= EXACT


STREAM = [images(12, seed) * (1 + seed) for seed in range(8)]


@pytest.mark.parametrize(("margin", "reset_below"), [(1.75, 0.0), (1.6, 1.48), (0.01, 0.2)])
def test_sar(margin: float, reset_below: float):
    """Every branch: all samples reliable, some with resets, none."""
    options = {"margin": margin, "radius": 0.3, "reset_below": reset_below}
    sgd = {"lr": 0.3, "momentum": 0.9}
    adapted = SAR(network(), lambda parameters: torch.optim.SGD(parameters, **sgd), **options)
    forward, layers = literal.run(network(), lambda layer: literal.Alpha(layer, 1.0))
    parameters = [p for layer in layers for p in (layer.layer.weight, layer.layer.bias)]
    logits, averages, resets = literal.sar_steps(forward, parameters, STREAM, **options, **sgd)
    found = []
    for x, expected in zip(STREAM, logits, strict=True):
        assert error(expected, adapted(x)) <= 1e-8
        found.append(adapted.average)
    assert adapted.resets == resets
    kept = [(a, b) for a, b in zip(averages, found, strict=True) if b is not None]
    assert [a for a, _ in kept] == pytest.approx([b for _, b in kept], rel=1e-8)
    assert (resets > 0) == (reset_below == 1.48)
    assert (not kept) == (margin == 0.01)
    for one, other in zip(parameters, adapted.parameters, strict=True):
        assert error(one, other) <= 1e-8


def test_entropy_is_that_of_the_softmax():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]]).double()
    assert entropy(logits).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-12)


def test_leaving_gives_the_source_back():
    x = images(4)
    for adapt in (alpha_bn, unmix_tns, batch_statistics):
        model = adapt(network())
        assert error(network()(x), model(x)) > 1e-3
        assert torch.equal(network()(x), leave(model)(x))
