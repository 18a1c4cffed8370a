"""Re-estimation is that of all data at once, for any split into batches and processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import normfuse
from normfuse import CalibrationError
from normfuse.layers import L1BatchNorm2d, UnifiedNorm
from normfuse.layers.ghost_batch_norm import GhostBatchNorm2d
from normfuse.statistics import adabn, correct_bias, reestimate, restore, snapshot
from normfuse.statistics.moments import ChannelMoments
from tests.parity import EXACT, error, outputs, randomize_norms
from tests.processes import run_two
from tests.statistics import reestimation_worker
from tests.statistics.networks import images, network, norms_of

COUNT = 17


def one_pass(model: nn.Sequential, x: Tensor, *, sequential: bool) -> list[tuple[Tensor, Tensor]]:
    """Return mean and biased variance of what each norm of a sequence reads on all data, by their definition."""
    model, found = copy.deepcopy(model).eval(), []
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            axes = [0, *range(2, x.dim())]
            mean = x.mean(axes)
            var = x.square().mean(axes) - mean.square()
            found.append((mean, var))
            if sequential:
                module.running_mean, module.running_var = mean.detach(), var.detach()
        x = module(x).detach()
    return found


def assert_statistics(model: nn.Module, expected: list[tuple[Tensor, Tensor]]) -> None:
    for norm, (mean, var) in zip(norms_of(model), expected, strict=True):
        assert error(mean, norm.running_mean) <= EXACT
        assert error(var, norm.running_var) <= EXACT


@pytest.mark.parametrize("order", ["parallel", "sequential"])
@given(cuts=st.lists(st.integers(1, COUNT - 1), unique=True, max_size=6))
def test_any_split_is_one_pass_over_all_data(order: str, cuts: list[int]):
    x = images(COUNT)
    data = list(torch.tensor_split(x, sorted(cuts)))
    model = reestimate(network(), data, order=order)
    assert_statistics(model, one_pass(network(), x, sequential=order == "sequential"))


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=5),
    offset=st.sampled_from([0.0, 1e8]),
)
def test_moments_of_parts_are_those_of_the_whole(values: list[float], cuts: list[int], offset: float):
    tokens = torch.tensor(values).double()[:, None] + offset
    moments = ChannelMoments(1)
    for part in torch.tensor_split(tokens, sorted(min(cut, len(values)) for cut in cuts)):
        moments.add(part)
    assert moments.count == len(values)
    assert float(moments.mean) == pytest.approx(float(tokens.mean()), rel=1e-12, abs=1e-9)
    assert float(moments.variance) == pytest.approx(float(tokens.var(correction=0)), rel=1e-6, abs=1e-9)


def test_the_mean_of_the_batches_variances_is_something_else():
    x = images(COUNT)
    apart = torch.stack([one_pass(network(), part, sequential=False)[0][1] for part in x.split(6)]).mean(0)
    assert error(one_pass(network(), x, sequential=False)[0][1], apart) > 0.01


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_two("tests.statistics.reestimation_worker", tmp_path_factory.mktemp("two_processes"))


@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_two_processes_are_one(order: str, two_processes: list[dict[str, Any]]):
    expected = one_pass(network(), images(COUNT), sequential=order == "sequential")
    first, second = (found[order] for found in two_processes)
    assert all(torch.equal(first[key], second[key]) for key in first)
    model = network()
    model.load_state_dict(first)
    assert_statistics(model, expected)
    alone = reestimate(network(), [images(COUNT)[:6]], order=order)
    assert error(expected[0][0], norms_of(alone)[0].running_mean) > 1e-3


def test_shifts_corrected_in_two_processes_are_those_of_one(two_processes: list[dict[str, Any]]):
    whole = correct_bias(network(), [images(COUNT)], weight_bits=4).state_dict()
    for found in two_processes:
        assert all(error(value, found["bias"][key]) <= EXACT for key, value in whole.items())
    assert len(reestimation_worker.SHARES) == 2


def test_adabn_makes_eval_mode_training_mode_on_the_domain():
    x = images(COUNT)
    model = adabn(network(), x.split(4))
    trained = network().train()(x)  # one batch of all data
    assert error(trained, model(x)) <= EXACT


def test_a_weight_mixes():
    x = images(COUNT)
    old, new = network(), one_pass(network(), x, sequential=False)
    expected = [
        (0.7 * n.running_mean + 0.3 * mean, 0.7 * n.running_var + 0.3 * var)
        for n, (mean, var) in zip(norms_of(old), new, strict=True)
    ]
    assert_statistics(reestimate(network(), [x], weight=0.3), expected)


def test_only_statistics_change_and_only_of_those_chosen():
    model, before = network(), network().state_dict()
    reestimate(model, [images(5)], exclude=["4"], include=["1", "4"])
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"1.running_mean", "1.running_var"}


def test_modes_stay_and_the_mode_does_not_matter():
    model = network().train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    reestimate(model, [images(COUNT)])
    assert [module.training for module in model.modules()] == modes
    assert_statistics(model, one_pass(network(), images(COUNT), sequential=False))


def test_labels_of_a_loader_are_left_out():
    pictures = torch.utils.data.TensorDataset(images(COUNT), torch.zeros(COUNT))
    model = reestimate(network(), torch.utils.data.DataLoader(pictures, batch_size=5))
    assert_statistics(model, one_pass(network(), images(COUNT), sequential=False))


def test_a_model_in_tune_mode_is_read_as_outside_of_it():
    model = normfuse.tune_mode(network())
    reestimate(model, [images(COUNT)])
    assert type(model[1]).__name__ == "TunedBatchNorm2d"
    normfuse.tune_mode(model, False)
    assert_statistics(model, one_pass(network(), images(COUNT), sequential=False))


def test_unified_norm_without_padding():
    model = nn.Sequential(UnifiedNorm(3)).double().eval()
    x = torch.randn(4, 5, 3).double()
    lengths = torch.tensor([5, 2, 1, 4])
    mask = torch.arange(5) >= lengths[:, None]
    reestimate(model, [x[:3], x[3:]], padding_mask=lambda item: mask[:3] if len(item) == 3 else mask[3:])
    assert error(x[~mask].square().mean(0), model[0].running_second_moment) <= EXACT


class Twice(nn.Module):
    """Calls one norm at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.norm(x)))


@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_a_norm_that_is_called_twice_has_the_statistics_of_both_calls(order: str):
    model = randomize_norms(Twice().double().eval())
    x = torch.randn(9, 3).double()
    both = torch.cat([x, model.linear(model.norm(x))]).detach()
    reestimate(model, x.split(2), order=order)
    assert error(both.mean(0), model.norm.running_mean) <= EXACT
    assert error(both.var(0, correction=0), model.norm.running_var) <= EXACT


def test_other_batch_norms():
    frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(3)
    act = pytest.importorskip("timm").layers.BatchNormAct2d(3)
    x = images(COUNT)
    for norm in (frozen, act, nn.SyncBatchNorm(3), GhostBatchNorm2d(3, ghost_size=4)):
        model = reestimate(nn.Sequential(norm).double(), [x[:3], x[3:]])
        assert error(x.mean((0, 2, 3)), model[0].running_mean) <= EXACT, type(norm)
        assert error(x.var((0, 2, 3), correction=0), model[0].running_var) <= EXACT


def test_missing_statistics_are_added_and_fold():
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        *(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, track_running_stats=False, affine=False)),
    )
    model.double().eval()
    x = images(COUNT)
    expected = model(x)
    with pytest.raises(ValueError, match="order='sequential'"):
        reestimate(model, [x], add_missing=True)
    with pytest.raises(ValueError, match="stores statistics"):
        reestimate(model, [x])
    reestimate(model, x.split(5), order="sequential", add_missing=True)
    assert error(expected, model(x)) <= EXACT
    folded = normfuse.fold(model, example_inputs=x)
    assert not norms_of(folded)
    assert error(expected, outputs(folded, x)[0]) <= EXACT


def test_statistics_of_several_domains():
    day, night = images(COUNT, 1), 3 * images(COUNT, 2) - 1
    model = network()
    source = snapshot(model)
    kept = {name: snapshot(adabn(model, [x])) for name, x in (("day", day), ("night", night))}
    expected = adabn(network(), [day])(day)
    assert error(expected, model(day)) > 0.01
    assert error(expected, restore(model, kept["day"])(day)) <= EXACT
    assert error(network()(day), restore(model, source)(day)) <= EXACT
    with pytest.raises(ValueError, match="another model"):
        restore(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)), source)


def test_half_precision_statistics_are_cast_once():
    x = images(COUNT).half()
    model = reestimate(nn.Sequential(nn.BatchNorm2d(3)).half(), x.split(5))
    assert model[0].running_var.dtype == torch.float16
    assert torch.equal(model[0].running_var, x.double().var((0, 2, 3), correction=0).half())


@pytest.mark.parametrize(
    ("data", "options", "text"),
    [
        ([], {}, "empty"),
        ([torch.full((2, 3, 7, 7), float("nan")).double()], {}, "294 of 294 values"),
        ([images(2)], {"weight": 1.5}, "from 0 to 1"),
        ([images(2)], {"order": "random"}, "order is one of"),
        ([images(2)], {"include": ["nothing"]}, "stores statistics"),
        (iter([images(2)]), {}, "more than once"),
    ],
)
def test_wrong_calls_change_nothing(data: Any, options: dict[str, Any], text: str):
    model = network()
    with pytest.raises((ValueError, CalibrationError), match=text):
        reestimate(model, data, **options)
    assert all(torch.equal(value, network().state_dict()[key]) for key, value in model.state_dict().items())


def test_norms_that_store_something_else_are_not_touched():
    model = nn.Sequential(nn.BatchNorm2d(3), L1BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reestimate(model, [images(4)])
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == {
        "0.running_mean",
        "0.running_var",
    }
