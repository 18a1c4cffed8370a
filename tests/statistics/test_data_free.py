"""Simulated integers, and BatchNorms and shifts that follow them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normfuse
from normfuse.calibration import Batches
from normfuse.statistics import (
    adaptive_batch_norm,
    correct_bias,
    matched_inputs,
    peak_activations,
    peak_inputs,
    simulated_integers,
)
from normfuse.statistics.simulated import written
from tests.parity import EXACT, error
from tests.statistics.networks import images, network, norms_of

X = images(24)
BITS = {"weight_bits": 4}


def rounded(weight: torch.Tensor, bits: int, *, per_channel: bool) -> torch.Tensor:
    """Return the integers times their scale, row by row."""
    largest = 2 ** (bits - 1) - 1
    rows = [row / row.abs().max() for row in weight] if per_channel else [row / weight.abs().max() for row in weight]
    scales = [row.abs().max() if per_channel else weight.abs().max() for row in weight]
    return torch.stack([torch.round(row * largest) / largest * s for row, s in zip(rows, scales, strict=True)])


@pytest.mark.parametrize("per_channel", [True, False])
def test_rounded_weights_and_activations(per_channel: bool):
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = [rounded(m.weight.detach(), 4, per_channel=per_channel) for m in model if isinstance(m, nn.Conv2d)]
    seen = []
    handle = model[2].register_forward_hook(lambda *call: None)
    with simulated_integers(model, weight_bits=4, activation_bits=3, per_channel=per_channel, peaks={"5": 1.5}):
        for layer, weight in zip((model[0], model[3]), weights, strict=True):
            assert error(weight, layer.weight) <= EXACT
        model[6].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(X)
    steps = seen[0] * 7 / 1.5
    assert error(steps.round(), steps) <= EXACT
    assert 3 < len(steps.round().unique()) <= 8
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert handle.id in model[2]._forward_hooks
    assert not model[5]._forward_hooks


def test_all_is_as_it_was_after_an_error():
    model = network()
    with pytest.raises(ZeroDivisionError), simulated_integers(model, peaks={"2": 1.0}):
        raise ZeroDivisionError
    assert not model[2]._forward_hooks
    assert all(torch.equal(value, network().state_dict()[key]) for key, value in model.state_dict().items())


def literal_abn(model: nn.Sequential, x: torch.Tensor, weight: float, *, relative: bool) -> None:
    """Carry out the update norm by norm, layer by layer, on the sequence itself; the weights are rounded already."""
    plain, twin = x, network()
    for layer, source in zip(model, twin, strict=True):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            axes = [0, *range(2, x.dim())]
            old = plain.mean(axes), plain.var(axes, correction=0)
            new = x.mean(axes), x.var(axes, correction=0)
            change = layer.running_mean + new[0] - old[0], layer.running_var * new[1] / old[1]
            moved = change if relative else new
            layer.running_mean = ((1 - weight) * layer.running_mean + weight * moved[0]).detach()
            layer.running_var = ((1 - weight) * layer.running_var + weight * moved[1]).detach()
        x, plain = layer(x), source(plain)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_adaptive_batch_norm_is_the_update_layer_by_layer(relative: bool, weight: float):
    model = adaptive_batch_norm(network(), X.split(7), weight=weight, relative=relative, **BITS)
    expected = network()
    with torch.no_grad():
        for layer in expected:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.copy_(rounded(layer.weight, 4, per_channel=True))
    literal_abn(expected, X, weight, relative=relative)
    for norm, other in zip(norms_of(model), norms_of(expected), strict=True):
        assert error(other.running_mean, norm.running_mean) <= EXACT
        assert error(other.running_var, norm.running_var) <= EXACT
    assert torch.equal(model[0].weight, network()[0].weight)


def test_rounding_per_channel_commutes_with_the_fold():
    model = adaptive_batch_norm(network(), [X], **BITS)
    folded = normfuse.fold(model, example_inputs=X)
    with simulated_integers(model, **BITS), simulated_integers(folded, **BITS):
        assert error(model(X), folded(X)) <= EXACT


def test_corrected_shifts_give_the_means_of_the_float_network():
    folded = normfuse.fold(network(), example_inputs=X)
    layers = {name: m for name, m in folded.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    wanted, _ = written(folded, layers, Batches([X], folded), None)
    weights = [layer.weight.detach().clone() for layer in layers.values()]
    plain_error = error(folded(X), rounded_output(folded))
    correct_bias(folded, X.split(5), **BITS)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(layers.values(), weights, strict=True))
    with simulated_integers(folded, **BITS):
        found, order = written(folded, layers, Batches([X], folded), None)
    assert order == list(layers)
    for name in layers:
        assert error(wanted[name].mean, found[name].mean) <= EXACT
    original = normfuse.fold(network(), example_inputs=X)
    assert error(original(X), rounded_output(folded)) < plain_error


def rounded_output(model: nn.Module) -> torch.Tensor:
    with simulated_integers(model, **BITS), torch.no_grad():
        return model(X)


def test_peak_inputs_respond_more_than_noise_and_set_the_peaks():
    model = network()
    made = peak_inputs(model, (3, 7, 7), steps=60, bounds=(-2, 2), seed=1)
    assert made.shape == (6, 3, 7, 7)
    assert float(made.abs().max()) <= 2
    logits, noise = model(made), model(torch.randn(6, 3, 7, 7).double().clamp(-2, 2))
    assert bool((logits.diag() > noise.diag()).all())
    two = peak_inputs(model, (3, 7, 7), classes=[4, 0], steps=5)
    assert two.shape[0] == 2
    peaks = peak_activations(model, made)
    assert list(peaks) == ["2", "5", "10"]
    assert peaks["2"] == float(model[:3](made).detach().max())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_matched_inputs_have_the_stored_statistics():
    """The statistics are those of real pictures, so inputs that have them exist."""
    model = normfuse.statistics.adabn(network(), [images(64, 3)])

    def distance(x: torch.Tensor) -> float:
        """Return the sum of squared differences of means and deviations, from their definition."""
        total = 0.0
        for layer in model:
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                axes = [0, *range(2, x.dim())]
                total += float((x.mean(axes) - layer.running_mean).square().mean().detach())
                total += float((x.std(axes, correction=0) - layer.running_var.sqrt()).square().mean().detach())
            x = layer(x)
        return total

    start = matched_inputs(model, (3, 7, 7), 16, steps=0)
    made = matched_inputs(model, (3, 7, 7), 16, steps=60, bounds=(-9, 9))
    assert distance(made) < 0.2 * distance(start)
    assert not model[1]._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "text"),
    [({"weight_bits": 1}, "2 to 16"), ({"activation_bits": 99}, "2 to 16"), ({"peaks": {"2": 0.0}}, "positive")],
)
def test_wrong_settings(options: dict, text: str):
    with pytest.raises(ValueError, match=text), simulated_integers(network(), **options):
        pass


def test_nothing_to_match_or_correct():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    with pytest.raises(ValueError, match="stores statistics"):
        matched_inputs(plain, (3, 7, 7))
    with pytest.raises(ValueError, match="has a bias"):
        correct_bias(plain, [X])
