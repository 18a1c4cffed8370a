"""Computed weights are their equations, and become plain ones of the same value, into which norms then fold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import normfuse
from normfuse.layers import (
    ConstantScale,
    FixNorm,
    RowEquilibration,
    ScaledWeightStandardization,
    WeightCompander,
    WeightStandardization,
    activation_gain,
    residual_betas,
)
from tests.layers import literal_families as literal
from tests.parity import EXACT, assert_parity, error, randomize_norms

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def parametrized(layer: nn.Module, by: nn.Module) -> Any:
    return register_parametrization(layer.double(), "weight", by.double())


def assert_rows(found: Tensor, expected: list[list[float]]) -> None:
    assert error(torch.tensor(expected, dtype=torch.float64), found.detach().flatten(1)) <= EXACT


@pytest.mark.parametrize("variant", ["reference", "bcn", "timm"])
def test_weight_standardization(variant: Any) -> None:
    conv = nn.Conv2d(3, 4, 3)
    original = conv.weight.detach().double().flatten(1).tolist()
    weight = parametrized(conv, WeightStandardization(variant)).weight
    assert_rows(weight, [literal.weight_standardization(row, variant) for row in original])


@pytest.mark.parametrize("variant", ["deepmind", "timm"])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_scaled_weight_standardization(variant: Any, size: float) -> None:
    conv, by = nn.Conv2d(3, 4, 3), ScaledWeightStandardization(4, activation_gain("relu"), variant)
    with torch.no_grad():
        conv.weight.mul_(size)
        by.gain.normal_()
    original = conv.weight.detach().double().flatten(1).tolist()
    weight = parametrized(conv, by).weight
    gains = by.gain.tolist()
    expected = [
        literal.scaled_weight_standardization(row, g, by.gamma, variant) for row, g in zip(original, gains, strict=True)
    ]
    assert_rows(weight, expected)


def test_weight_standardization_is_that_of_timm() -> None:
    from timm.layers.std_conv import ScaledStdConv2d, StdConv2d

    x = torch.randn(2, 4, 7, 7, **DOUBLE)
    theirs: Any = StdConv2d(4, 6, 3, bias=True).double()
    ours = parametrized(copy_of(theirs), WeightStandardization("timm", eps=theirs.eps))
    assert error(theirs(x).detach(), ours(x).detach()) <= EXACT
    scaled: Any = ScaledStdConv2d(4, 6, 3, gamma=activation_gain("silu"), eps=1e-6).double()
    nn.init.normal_(scaled.gain)
    by = ScaledWeightStandardization(6, activation_gain("silu"), "timm", **DOUBLE)
    with torch.no_grad():
        by.gain.copy_(scaled.gain.flatten())
    assert error(scaled(x).detach(), parametrized(copy_of(scaled), by)(x).detach()) <= EXACT


def copy_of(conv: nn.Conv2d) -> nn.Conv2d:
    new = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=conv.padding, **DOUBLE)
    with torch.no_grad():
        new.weight.copy_(conv.weight)
        new.bias.copy_(conv.bias)  # type: ignore[union-attr,arg-type]
    return new


def test_row_equilibration_and_compander() -> None:
    layer = nn.Linear(5, 3)
    original = layer.weight.detach().double().tolist()
    equal = parametrized(layer, RowEquilibration()).weight
    assert_rows(equal, [[w / math.sqrt(sum(v * v for v in row)) for w in row] for row in original])
    other = nn.Linear(5, 3)
    original = other.weight.detach().double().tolist()
    companded = parametrized(other, WeightCompander(2.0, 0.1).double()).weight
    a, b = (math.exp(float(torch.tensor(v).log())) for v in (2.0, 0.1))
    assert_rows(companded, [[a * math.atan(w / b) for w in row] for row in original])


@pytest.mark.parametrize("name", ["identity", "relu", "silu", "gelu", "tanh"])
def test_activation_gain_makes_variance_one(name: str) -> None:
    z = torch.linspace(-12, 12, 400_001, **DOUBLE)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    y = activation_gain(name) * {"identity": lambda t: t, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}.get(
        name, torch.tanh
    )(z)
    mean = torch.trapezoid(y * density, z)
    assert float(torch.trapezoid((y - mean) ** 2 * density, z)) == pytest.approx(1, abs=2e-3)  # they were sampled


def test_residual_betas() -> None:
    found = residual_betas([True, False, False, True, False], alpha=0.2)
    expected = [1, 1.04, 1.08, 1.12, 1.04]
    assert [b * b for b in found] == pytest.approx(expected)


PARAMETRIZATIONS = [
    *(lambda v=v: WeightStandardization(v) for v in ("reference", "bcn", "timm")),
    *(lambda v=v: ScaledWeightStandardization(6, 1.3, v) for v in ("deepmind", "timm")),
    RowEquilibration,
    WeightCompander,
]


@pytest.mark.parametrize("make", PARAMETRIZATIONS)
def test_materialized_and_then_a_norm_folds(make: Any) -> None:
    conv = parametrized(nn.Conv2d(3, 6, 3), make())
    model = randomize_norms(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU()).double().eval())
    x = torch.randn(2, 3, 8, 8, **DOUBLE)
    refused = normfuse.apply(model, ["fold-bn"], example_inputs=x).report.refused
    assert [o.refusal.reason for o in refused if o.refusal] == [normfuse.Reason.PARAMETRIZED]
    folded = normfuse.fold(model, example_inputs=x)
    assert type(folded[0]) is nn.Conv2d
    assert isinstance(folded[1], nn.Identity)
    assert_parity(model, folded, x)


class Tied(nn.Module):
    """Embeddings of one length, and the same table as the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.table = register_parametrization(nn.Embedding(11, 6), "weight", FixNorm())
        self.body = nn.Linear(6, 6)

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.body(6**0.5 * self.table(words)), self.table.weight)


def test_fix_norm_is_computed_once_for_both_uses() -> None:
    model, words = Tied().double().eval(), torch.arange(11)[None]
    original: Any = model.table.parametrizations
    rows = original.weight.original.tolist()
    assert_rows(model.table.weight, [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows])
    result = normfuse.apply(model, ["materialize"], example_inputs=words)
    assert type(result.model.table) is nn.Embedding
    assert [o.subject for o in result.report.applied] == ["table.weight"]
    assert set(dict(result.model.named_parameters())) == {"table.weight", "body.weight", "body.bias"}
    assert_parity(model, result.model, words)


def test_spectral_norm_uses_its_stored_vectors() -> None:
    """Vectors that do not belong to the largest singular value: an SVD would give another weight."""
    layer: Any = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)).double().eval()
    state = layer.parametrizations.weight[0]
    with torch.no_grad():
        for vector in (state._u, state._v):
            vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
    original = layer.parametrizations.weight.original.detach()
    sigma = state._u @ original @ state._v
    plain = normfuse.apply(nn.Sequential(layer), ["materialize"]).model[0]
    assert error(original / sigma, plain.weight.detach()) <= EXACT
    assert abs(float(sigma) - float(torch.linalg.svdvals(original)[0])) > 0.01


class NormalizerFree(nn.Module):
    """x + alpha f(x / beta), with the gain of the activation as a constant."""

    def __init__(self) -> None:
        super().__init__()
        standard = [ScaledWeightStandardization(4) for _ in range(2)]
        convs = [parametrized(nn.Conv2d(4, 4, 3, padding=1), one) for one in standard]
        self.act, self.gain, self.beta = nn.ReLU(), ConstantScale(activation_gain("relu")), ConstantScale(1 / 1.04)
        self.first, self.last, self.alpha = *convs, ConstantScale(0.2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.beta(self.gain(self.act(x))))
        return x + self.alpha(self.last(torch.relu(h)))


def test_constants_of_a_normalizer_free_block_go_into_its_weights() -> None:
    model, x = NormalizerFree().double().eval(), torch.randn(2, 4, 6, 6, **DOUBLE)
    folded = normfuse.fold(model, example_inputs=x)
    assert not [m for m in folded.modules() if isinstance(m, ConstantScale)]
    assert type(folded.first) is type(folded.last) is nn.Conv2d
    assert_parity(model, folded, x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightStandardization("theirs"),  # type: ignore[arg-type]
        lambda: ScaledWeightStandardization(4, variant="bcn"),  # type: ignore[arg-type]
        lambda: FixNorm(0.0),
        lambda: WeightCompander(-1.0),
        lambda: activation_gain("elu"),
    ],
)
def test_bad_arguments(make: Any) -> None:
    with pytest.raises(ValueError, match=r"not|no gain"):
        make()


class TiedModules(nn.Module):
    """An embedding and a projection, each with a parametrization of the one parameter they share."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.table: Any = register_parametrization(nn.Embedding(11, 6), "weight", FixNorm(scale))
        self.head: Any = register_parametrization(nn.Linear(6, 11, bias=False), "weight", FixNorm())
        self.head.parametrizations.weight.original = self.table.parametrizations.weight.original

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.table(words))


def test_one_table_stays_one(tmp_path: Path) -> None:
    model, words = TiedModules().double().eval(), torch.arange(11)
    result = normfuse.apply(model, ["materialize"], example_inputs=words)
    assert result.model.table.weight is result.model.head.weight
    assert [o.subject for o in result.report.applied] == ["table.weight", "head.weight"]
    assert result.report.norms == ()
    assert_parity(model, result.model, words)
    normfuse.save(result.model, tmp_path / "plain.safetensors")
    loaded: Any = normfuse.load(tmp_path / "plain.safetensors", model=TiedModules())
    assert loaded.table.weight is loaded.head.weight
    assert_parity(model, loaded, words)


def test_tables_of_other_values_become_two() -> None:
    model, words = TiedModules(scale=2.0).double().eval(), torch.arange(11)
    result = normfuse.apply(model, ["materialize"], example_inputs=words)
    assert result.model.table.weight is not result.model.head.weight
    assert_parity(model, result.model, words)
