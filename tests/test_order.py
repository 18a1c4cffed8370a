"""Materialise, recalibrate or adapt, tune, fold, quantize, export: another order is an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse import order, statistics
from normfuse.errors import OrderError
from normfuse.order import Step
from normfuse.passes.recalibrate import Recalibrate
from tests.statistics.networks import images, network, norms_of

X = images(6)

ADAPTATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "reestimate": lambda m: statistics.reestimate(m, [X]),
    "adabn": lambda m: statistics.adabn(m, [X]),
    "alpha_bn": statistics.alpha_bn,
    "unmix_tns": statistics.unmix_tns,
    "AdaB2N": lambda m: statistics.AdaB2N(m, 2),
    "SAR": statistics.SAR,
    "SourceFree": statistics.SourceFree,
    "adaptive_batch_norm": lambda m: statistics.adaptive_batch_norm(m, [X]),
    "pass": lambda m: normfuse.apply(m, [Recalibrate([X])], example_inputs=X),
}


def folded() -> nn.Module:
    return normfuse.fold(network(), example_inputs=X, exclude=["9"])


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_a_folded_model_is_not_recalibrated(name: str):
    model = folded()
    assert norms_of(model)  # one is left, and still the others are gone
    with pytest.raises(OrderError, match="recalibrate before you fold: this model is folded already"):
        ADAPTATIONS[name](model)


def test_a_model_that_holds_a_folded_part_is_not_recalibrated():
    with pytest.raises(OrderError, match="folded already"):
        statistics.reestimate(nn.Sequential(folded(), nn.BatchNorm1d(6).double()), [X])


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_computed_weights_come_first(name: str):
    model = network()
    nn.utils.parametrizations.weight_norm(model[3])
    with pytest.raises(OrderError, match=r"materialize before you recalibrate: 3\.weight"):
        ADAPTATIONS[name](model)
    plain = normfuse.apply(model, ["materialize"], example_inputs=X).model
    ADAPTATIONS[name](plain)


def test_a_model_that_adapts_is_neither_folded_nor_exported(tmp_path: Path):
    model = statistics.alpha_bn(network())
    model(X)
    for step in (
        lambda: normfuse.fold(model, example_inputs=X),
        lambda: normfuse.inspect(model, example_inputs=X),
        lambda: normfuse.export(model, tmp_path / "model.onnx", example_inputs=X, fold_bn=False),
    ):
        with pytest.raises(OrderError, match=r"recalibrate before you \w+: the statistics of 1 still follow the data"):
            step()
    assert not list(tmp_path.iterdir())
    assert not norms_of(normfuse.fold(statistics.freeze(model), example_inputs=X))


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["fold-bn", "recalibrate"], "recalibrate must come before fold-bn"),
        (["recalibrate", "materialize"], "materialize must come before recalibrate"),
        (["materialize", "recalibrate", "fold-affine", "fold-bn"], ""),
        (["materialize", "fold-bn", "merge-branches", "fold-bn", "fold-affine"], ""),
        (["center-norm", "tune-mode"], ""),
    ],
)
def test_the_sequence_of_passes(names: list[str], text: str):
    if text:
        with pytest.raises(OrderError, match=text):
            order.require_sequence(names)
    else:
        order.require_sequence(names)


def test_passes_in_the_wrong_order_change_nothing():
    model = network()
    with pytest.raises(OrderError, match="recalibrate must come before fold-bn"):
        normfuse.apply(model, ["fold-bn", Recalibrate([X])], example_inputs=X, inplace=True)
    assert len(norms_of(model)) == 3


def test_the_whole_order_in_one_run():
    model = network()
    nn.utils.parametrizations.weight_norm(model[3])
    result = normfuse.apply(model, ["materialize", Recalibrate([X]), "fold-bn"], example_inputs=X)
    assert not norms_of(result.model)
    assert order.is_folded(result.model)


def test_a_recalibrated_model_trains_and_folds_and_can_be_recalibrated_again():
    first = normfuse.apply(network(), [Recalibrate([X])], example_inputs=X).model
    assert first.train().training
    assert not order.is_folded(first)
    second = statistics.reestimate(first, [X])
    assert not norms_of(normfuse.fold(second, example_inputs=X))


def test_integers_come_after_folding():
    quantized = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(2, 2))
    quantized[1] = torch.ao.nn.quantized.FloatFunctional()
    assert order.is_quantized(quantized)
    for step, text in ((Step.RECALIBRATE, "recalibrate before you quantize"), (Step.FOLD, "fold before you quantize")):
        with pytest.raises(OrderError, match=text):
            order.require(quantized, step)
    order.require(quantized, Step.EXPORT)
    order.require(nn.Sequential(quantized[1]), Step.FOLD)  # nothing is left to fold


def test_a_recalibrated_model_is_folded_before_it_is_quantized():
    recalibrated = normfuse.apply(network().float(), [Recalibrate([X.float()])], example_inputs=X.float()).model
    quantized = normfuse.quantize(recalibrated, "per-channel", [X.float()], progress=False)
    assert not norms_of(quantized)
    assert order.is_folded(quantized)
    assert order.is_quantized(quantized)
    with pytest.raises(OrderError, match="recalibrate before you fold"):
        statistics.reestimate(quantized, [X.float()])
    adapting = statistics.alpha_bn(network().float())
    with pytest.raises(OrderError, match=r"recalibrate before you quantize: the statistics of 1"):
        normfuse.quantize(adapting, "per-channel", [X.float()], fold=False, progress=False)


def test_the_error_is_a_normfuse_error():
    assert issubclass(OrderError, normfuse.NormfuseError)
    assert normfuse.OrderError is OrderError


@pytest.mark.parametrize("tune", [normfuse.tune_mode, lambda m: normfuse.apply(m, ["tune-mode"]), normfuse.tuned])
@pytest.mark.parametrize("adapt", [statistics.alpha_bn, statistics.unmix_tns])
def test_a_model_that_adapts_is_not_tuned(adapt: Callable[[Any], Any], tune: Callable[[Any], Any]):
    model = adapt(network())
    classes = [type(module) for module in model.modules()]
    text = r"recalibrate before you tune: .* normfuse\.statistics\.freeze\(model\)"
    with pytest.raises(OrderError, match=text), tune(model):
        pass
    assert [type(module) for module in model.modules()] == classes
    tune(statistics.leave(model))
