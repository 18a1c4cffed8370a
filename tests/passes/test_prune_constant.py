from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.base import Reason
from normfuse.passes.prune_constant import PruneConstant
from tests.parity import EXACT, error, outputs, randomize_norms

X = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def with_dead(model: nn.Module, *dead: int, gain: float = 0.0) -> nn.Module:
    randomize_norms(model.double().eval())
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.weight.abs_().add_(0.1)
                module.weight[list(dead)] = gain
    return model


def sequence(*between: nn.Module, padding: int = 0, bias: bool = True) -> nn.Sequential:
    second = nn.Conv2d(6, 4, 3, padding=padding, bias=bias)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), *between, second)


def run(model: nn.Module, threshold: float = 0.0, x: Tensor = X):
    return normfuse.apply(model, [PruneConstant(threshold)], example_inputs=x)


ROUTES = {
    "directly": sequence,
    "relu and pool": lambda: sequence(nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    "silu, no bias": lambda: sequence(nn.SiLU(), nn.Dropout(0.2), bias=False),
    "reflected": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")
    ),
    "linear behind a flatten": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 49, 4)
    ),
    "linear behind a mean": lambda: nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    ),
    "linear layers": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(243, 6, bias=False), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 4))
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_is_exact_where_the_gain_is_zero(route: str):
    model = with_dead(ROUTES[route](), 1, 4)
    result = run(model)
    assert len(result.report.applied) == 1, str(result.report)
    assert error(model(X), outputs(result.model, X)[0]) <= EXACT
    norm = next(m for m in result.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    assert norm.num_features == len(norm.weight) == len(norm.running_mean) == 4
    first = next(m for m in result.model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert getattr(first, "out_channels", getattr(first, "out_features", None)) == len(first.weight) == 4
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.model))
    assert after < before


def test_zero_padding_keeps_what_is_not_zero_there():
    model = with_dead(sequence(nn.ReLU(), padding=1), 0, 2, 5)
    with torch.no_grad():
        model[1].bias[:] = torch.tensor([-1.0, 0.5, 0.7, 0.1, 0.2, -0.3])
    result = run(model)
    assert result.model[1].num_features == 4  # 0 and 5 are zero behind the ReLU, 2 is not
    assert error(model(X), outputs(result.model, X)[0]) <= EXACT
    with torch.no_grad():
        model[1].bias.abs_()
    assert [o.refusal.reason for o in run(model).report.outcomes] == [Reason.NONZERO_PADDING]


def test_a_threshold_takes_channels_of_little_gain_as_constant():
    model = with_dead(sequence(nn.ReLU()), 1, 3, gain=1e-4)
    assert not run(model).report.applied
    result = run(model, 1e-3)
    assert result.model[1].num_features == 4
    assert 0 < error(model(X), outputs(result.model, X)[0]) < 1e-3


def test_one_channel_is_kept_where_all_are_constant():
    model = with_dead(sequence(nn.ReLU()), *range(6))
    result = run(model)
    assert result.model[1].num_features == 1
    assert error(model(X), outputs(result.model, X)[0]) <= EXACT


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)) + x)


class Reread(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last(self.norm(y)).sum() + y.sum()


def depthwise() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Residual(), Reason.OPAQUE_OPERATION),
        (Reread(), Reason.EXTRA_CONSUMER),
        (depthwise(), Reason.UNSUPPORTED_LAYER),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), Reason.EXTRA_CONSUMER),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3)), Reason.UNSUPPORTED_LAYER),
    ],
)
def test_refusals_change_nothing(model: nn.Module, reason: Reason):
    model = with_dead(model, 1)
    result = run(model)
    assert [o.refusal.reason for o in result.report.outcomes if o.refusal] == [reason]
    assert error(model(X), outputs(result.model, X)[0]) == 0


def test_shared_and_hooked_layers_are_left():
    conv = nn.Conv2d(3, 3, 1)
    shared = with_dead(nn.Sequential(conv, nn.BatchNorm2d(3), conv), 1)
    assert [o.refusal.reason for o in run(shared).report.outcomes if o.refusal] == [Reason.SHARED_MODULE]
    hooked = with_dead(sequence(), 1)
    hooked[0].register_forward_hook(lambda *_: None)
    assert [o.refusal.reason for o in run(hooked).report.outcomes if o.refusal] == [Reason.HAS_HOOKS]


def test_a_pruned_model_trains_folds_and_loads_again(tmp_path):
    source = with_dead(sequence(nn.ReLU()), 1, 4)
    pruned = run(source).model
    assert pruned.train().training
    pruned(X).sum().backward()
    pruned.eval()
    normfuse.save(pruned, tmp_path / "whole.pt")
    assert error(pruned(X), normfuse.load(tmp_path / "whole.pt")(X)) <= EXACT
    normfuse.save(pruned, tmp_path / "tensors.safetensors")
    loaded = normfuse.load(tmp_path / "tensors.safetensors", model=sequence(nn.ReLU()).double())
    assert loaded[1].num_features == 4
    assert error(pruned(X), loaded(X)) <= EXACT
    folded = normfuse.fold(pruned, example_inputs=X)
    assert error(pruned(X), outputs(folded, X)[0]) <= EXACT
    with pytest.raises(normfuse.OrderError, match="before you fold"):
        run(folded)


def test_the_threshold_is_not_negative():
    with pytest.raises(ValueError, match="negative"):
        PruneConstant(-1.0)
