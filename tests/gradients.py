"""Outputs and gradients of a model in Tune mode, compared with those of eval mode.

The reference is the model as it was, its norms in eval mode and all else in the mode that is compared, so that dropout
draws the same numbers on both sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import normfuse
from normfuse.layers.change_of_class import enter
from normfuse.layers.handshake import Pair, Seat
from normfuse.layers.normalized_layer import Pairing
from normfuse.layers.tuned import TunedProduct
from tests.parity import EXACT, cloned, error, randomize_norms, tensors

FLOOR = 1e-6
"""Gradients this small, relative to the largest one of the model, are compared with that instead of with themselves."""


def hard_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms random values, with gains that are negative, zero and tiny; return the model."""
    randomize_norms(model, seed)
    for module in model.modules():
        gain = getattr(module, "weight", None)
        if hasattr(module, "running_var") and isinstance(gain, Tensor) and gain.numel() > 3:
            with torch.no_grad():
                gain[2] = 1e-9
    return model


def paired(model: nn.Module, inputs: Any = None, **options: Any) -> dict[str, tuple[str, ...]]:
    """Return for every norm that Tune mode gives to the layers before it the names of those."""
    report = normfuse.inspect(model, ["tune-mode"], example_inputs=inputs, **options)
    return {outcome.subject: outcome.partners for outcome in report.norms if outcome.partners}


def apply_norm(layer: nn.Module, norm: nn.Module) -> None:
    """Let a layer apply a norm, by itself: what it returns is not marked for the norm."""
    pair = Pair(Seat("norm", None), [Seat("layer", None)], direct=False)
    pair.norm.take(norm, type(norm))
    enter(layer, TunedProduct, Pairing(pair, pair.seats[1]))


def set_mode(model: nn.Module, training: bool) -> nn.Module:
    """Put a model in a mode, and its norms in eval mode."""
    for module in model.modules():
        module.training = training and not isinstance(module, _NormBase)
    return model


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor | None]:
    """Return the outputs, and the gradients of a random sum of them for every input and parameter that has one."""
    given = cloned(inputs)
    leaves = [t.requires_grad_() for t in tensors(given) if t.is_floating_point()]
    named = {f"input {index}": leaf for index, leaf in enumerate(leaves)}
    named |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = run(model, lambda: {f"output {i}": t for i, t in enumerate(_call(model, given))})
    generator = torch.Generator().manual_seed(2)
    trained = [t for t in found.values() if t.requires_grad]
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in trained]
    grads = torch.autograd.grad(trained, list(named.values()), weights, allow_unused=True)
    return {**{name: t.detach() for name, t in found.items()}, **dict(zip(named, grads, strict=True))}


def run(model: nn.Module, call: Callable[[], Any]) -> Any:
    """Call a model from a fixed random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return call()


def _call(model: nn.Module, given: Any) -> list[Tensor]:
    """Call a model on copies: it may write into its input, which a leaf does not allow."""
    given = cloned(given)
    if isinstance(given, Mapping):
        return list(tensors(model(**given)))
    return list(tensors(model(*given) if type(given) is tuple else model(given)))


def assert_same(
    expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None], tolerance: float = EXACT
) -> None:
    """Assert that two sets of named tensors are equal: names, shapes, dtypes and values."""
    assert expected.keys() == found.keys()
    largest = max((float(t.abs().max()) for n, t in expected.items() if t is not None and t.numel()), default=0.0)
    for name, one in expected.items():
        two = found[name]
        assert (one is None) == (two is None), f"{name}: only one of them has a gradient"
        if one is None or two is None:
            continue
        assert (one.shape, one.dtype) == (two.shape, two.dtype), name
        small = one.numel() > 0 and float(one.abs().max()) < FLOOR * largest
        apart = float((one - two).abs().max()) / (FLOOR * largest) if small else error(one, two)
        assert apart <= tolerance, f"{name} differs by {apart:.3g}"


def assert_tunes(
    model: nn.Module,
    inputs: Any,
    *,
    traced: bool = True,
    recorded: bool = True,
    training: bool = True,
    tolerance: float = EXACT,
) -> None:
    """Assert that Tune mode gives eval mode's outputs and gradients, read both ways, in either mode of the model."""
    modes = (False, True) if training else (False,)
    expected = {mode: gradients(set_mode(copy.deepcopy(model), mode), inputs) for mode in modes}
    for example in [None] * traced + [inputs] * recorded:
        tuned = normfuse.tune_mode(copy.deepcopy(model), example_inputs=example)
        for mode in modes:
            assert_same(expected[mode], gradients(tuned.train(mode), inputs), tolerance)
