from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.base import Reason
from normfuse.passes.recalibrate import Recalibrate
from normfuse.report import Status
from normfuse.statistics import adabn, reestimate
from tests.parity import EXACT, error
from tests.statistics.networks import images, network, norms_of

X = images(12)
PARTS = X.split(5)


def run(model: nn.Module, one: Recalibrate, **options):
    return normfuse.apply(model, [one], example_inputs=X, **options)


def assert_same_statistics(expected: nn.Module, found: nn.Module) -> None:
    for one, other in zip(norms_of(expected), norms_of(found), strict=True):
        assert error(one.running_mean, other.running_mean) <= EXACT
        assert error(one.running_var, other.running_var) <= EXACT


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda m: reestimate(m, PARTS)),
        ({"method": "alpha"}, lambda m: reestimate(m, PARTS, weight=0.1)),
        ({"method": "alpha", "weight": 0.6, "order": "sequential"},
         lambda m: reestimate(m, PARTS, weight=0.6, order="sequential")),
        ({"method": "adabn"}, lambda m: adabn(m, PARTS)),
    ],
)  # fmt: skip
def test_is_what_the_function_does(options, expected):
    source = network()
    result = run(source, Recalibrate(PARTS, **options))
    assert_same_statistics(expected(network()), result.model)
    assert_same_statistics(network(), source)
    assert result.report.summary().startswith("recalibrate: 3 of 3 norms recalibrated")
    assert {o.line()[2] for o in result.report.applied} == {"recalibrated"}


def test_only_chosen_norms():
    result = run(network(), Recalibrate(PARTS), exclude=["4"])
    expected = reestimate(network(), PARTS, exclude=["4"])
    assert_same_statistics(expected, result.model)
    assert [o.refusal.reason for o in result.report.outcomes if o.refusal] == [Reason.EXCLUDED]


class Mixed(nn.Module):
    """Norms of every kind that stays as it is, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stored = nn.BatchNorm2d(3)
        self.batch = nn.BatchNorm2d(3, track_running_stats=False)
        self.layer = nn.GroupNorm(1, 3)
        self.nan = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.batch(self.layer(self.stored(x)))
        return y + nn.functional.batch_norm(y, torch.zeros(3), torch.ones(3)) + self.nan(x / 0 - x / 0)


def test_every_other_norm_is_refused_with_its_reason():
    one = Recalibrate([X.float()])
    report = normfuse.apply(Mixed().eval(), [one], example_inputs=X.float()).report
    found = {o.subject: o.refusal.reason if o.refusal else o.status for o in report.norms}
    assert found == {
        "stored": Status.APPLIED,
        "batch": Reason.BATCH_STATISTICS,
        "layer": Reason.UNSUPPORTED_LAYER,
        ":batch_norm": Reason.UNSUPPORTED_LAYER,
        "nan": Reason.NONFINITE,
    }
    assert set(one.moved) == {"stored"}


def test_how_far_the_norms_were_from_the_data():
    one = Recalibrate(PARTS)
    model = network()
    run(model, one)
    norm = model[1]
    mean = model[0](X).detach().mean((0, 2, 3))
    expected = ((mean - norm.running_mean).abs() / norm.running_var.sqrt()).mean()
    assert one.moved["1"] == pytest.approx(float(expected))


def test_saved_and_loaded_again(tmp_path):
    model = run(network(), Recalibrate(PARTS)).model
    normfuse.save(model, tmp_path / "model.pt")
    loaded = normfuse.load(tmp_path / "model.pt")
    assert_same_statistics(model, loaded)
    assert not norms_of(normfuse.fold(loaded, example_inputs=X))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "needs calibration data"),
        ({"calibration": PARTS, "method": "sar"}, "method is one of"),
        ({"calibration": PARTS, "order": "random"}, "order one of"),
        ({"calibration": PARTS, "weight": -1}, "from 0 to 1"),
    ],
)
def test_wrong_arguments(arguments, text: str):
    with pytest.raises(ValueError, match=text):
        Recalibrate(**arguments)
    if not arguments:
        with pytest.raises(ValueError, match=text):
            normfuse.apply(network(), ["recalibrate"], example_inputs=X)
