"""swap-l1: every BatchNorm stays the same function in eval mode, every norm of a token comes close, and reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import CalibrationError, Reason
from normfuse.layers import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d, L1LayerNorm, L1RMSNorm
from normfuse.layers.mean_deviation import ChannelDeviation, channel_deviation, deviation_ratio
from normfuse.passes.swap_l1 import STARTS, SwapL1
from normfuse.report import Outcome, Status
from tests.parity import EXACT, assert_parity, error, randomize_norms
from tests.transformers_small import Decoder, ViT, built, images, words

DOUBLE = {"dtype": torch.float64}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def swap(model: nn.Module, *data: Any, **options: Any) -> normfuse.Result:
    return normfuse.apply(model, [SwapL1(list(data), **options)], example_inputs=data[0])


def outcome(model: nn.Module, *data: Any, **options: Any) -> Outcome:
    (found,) = swap(model, *data, **options).report.norms
    return found


def reason(model: nn.Module, *data: Any, **options: Any) -> Reason | None:
    found = outcome(model, *data, **options)
    assert found.status is not Status.APPLIED
    return found.refusal.reason if found.refusal else None


# BatchNorm


class Calls(nn.Module):
    """A model whose ``forward`` is a function of its children, which are the keyword arguments."""

    def __init__(self, function: Any, **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class NormAct(nn.BatchNorm2d):
    """A norm with what follows it in one layer, as timm writes it."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(size, **options)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(self.drop(x))


KINDS: list[tuple[nn.Module, Any, tuple[int, ...]]] = [
    (nn.BatchNorm1d(4, momentum=0.3), L1BatchNorm1d, (6, 4)),
    (nn.BatchNorm1d(4, momentum=None), L1BatchNorm1d, (6, 4, 5)),
    (nn.BatchNorm2d(4, affine=False), L1BatchNorm2d, (3, 4, 5, 2)),
    (nn.BatchNorm2d(4, eps=0.1), L1BatchNorm2d, (3, 4, 5, 2)),
    (nn.BatchNorm3d(4), L1BatchNorm3d, (2, 4, 3, 2, 2)),
]


@pytest.mark.parametrize(("norm", "cls", "shape"), KINDS)
@pytest.mark.parametrize("options", [{}, {"gaussian": False, "eps": 0.02}])
def test_batch_norm_is_the_same_function(norm: Any, cls: Any, shape: tuple[int, ...], options: dict[str, Any]):
    model = randomize_norms(nn.Sequential(norm).double().eval())
    data = [randn(*shape, seed=t) * 3 + t for t in range(3)]
    result = swap(model, *data, options=options)
    new: Any = result.model[0]
    assert [o.status for o in result.report.norms] == [Status.APPLIED]
    assert type(new) is cls
    assert (new.momentum, new.gaussian) == (norm.momentum, options.get("gaussian", True))
    d = [x - x.mean([i for i in range(x.dim()) if i != 1], keepdim=True) for x in data]
    sigma = torch.cat([t.movedim(1, 0).flatten(1) for t in d], 1).square().mean(1).sqrt()
    std = (norm.running_var.double() + norm.eps).sqrt()
    divisor = new.running_deviation * (1.0 if options else (torch.pi / 2) ** 0.5) + new.eps
    assert error(channel_deviation(data) / sigma * std * (1.0 if options else (torch.pi / 2) ** 0.5), divisor) <= EXACT
    assert_parity(model, result.model, randn(*shape, seed=9))


def test_batch_norm_trains_on():
    """In training mode too the new norm is near the old one, also where its running statistics lag behind."""
    model = nn.Sequential(nn.BatchNorm1d(6)).double()
    scale = torch.tensor([0.1, 1, 2, 5, 9, 20], **DOUBLE)
    data = [randn(500, 6, seed=t).pow(1 + 2 * (t % 2)) * scale + 3 for t in (1, 3, 5, 7)]
    for x in data:
        model(x)
    swapped = normfuse.swap_norms(model, "l1", data, progress=False).train()
    assert swapped[0].num_batches_tracked == 4  # type: ignore[index]
    assert error(model(data[0]), swapped(data[0])) < 0.06
    assert error(model(data[0]), L1BatchNorm1d.from_batch_norm(model[0], gaussian=True)(data[0])) > 0.3
    swapped(data[1]).sum().backward()


def test_activation_of_a_norm_class_stays():
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4)).double().eval())
    x = randn(2, 3, 6, 6)
    swapped = normfuse.swap_norms(model, "l1", [x], progress=False)
    assert [type(m) for m in swapped[1]] == [L1BatchNorm2d, nn.Dropout, nn.ReLU]  # type: ignore[index, union-attr]
    assert_parity(model, swapped, x)


def test_batch_norm_behind_swapped_norms_is_measured_there():
    """Sequential: the deviations are of what the BatchNorm will read."""
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4), nn.BatchNorm1d(4)).double().eval()
    randomize_norms(model)
    data = [randn(20, 5, seed=t).pow(3) for t in range(2)]
    found = {order: swap(model, *data, order=order).model for order in ("sequential", "parallel")}
    for order, before in (("sequential", found["sequential"][:2]), ("parallel", model[:2])):  # type: ignore[index]
        deviation = ChannelDeviation()
        for x in data:
            deviation.add(before(x))
        ratio = found[order][2].running_deviation / (model[2].running_var + 1e-5).sqrt()
        assert error(deviation.ratio(), ratio) <= 1e-4  # of eps
    assert not torch.allclose(
        found["sequential"][2].running_deviation, found["parallel"][2].running_deviation, rtol=1e-3
    )


# norms of tokens


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_every_norm_is_swapped_and_trains(start: str, order: str):
    for kind, inputs in ((ViT, images(dtype=torch.float64)), (Decoder, words())):
        model = randomize_norms(built(kind).double(), positive=True)
        result = swap(model, inputs, start=start, order=order)
        new = [m for m in result.model.modules() if isinstance(m, L1LayerNorm)]
        assert len(new) == len(result.report.applied) == len(result.report.norms) == 5
        assert not [m for m in result.model.modules() if isinstance(m, nn.LayerNorm)]
        result.model.train()(inputs).sum().backward()


def read_and_written(norm: nn.Module, x: Tensor, **options: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Swap a norm alone; return the new one, what it makes of x before gain and shift, and what both write."""
    new: Any = swap(nn.Sequential(norm).eval(), x, **options).model[0]
    plain = type(new)(new.normalized_shape, new.eps, False, gaussian=new.gaussian)
    return new, plain(x), norm(x).detach(), new(x).detach()


def scaled(norm: Any) -> Any:
    with torch.no_grad():
        for i, p in enumerate(norm.parameters()):
            p.copy_(randn(*p.shape, seed=i + 5))
        norm.weight[0] = 0
    return norm


@pytest.mark.parametrize("gaussian", [True, False])
def test_starts_of_layer_norm(gaussian: bool):
    x = randn(60, 7).pow(3) * randn(60, 1, seed=1).exp()
    norm, options = scaled(nn.LayerNorm(7, **DOUBLE)), {"gaussian": gaussian}
    errors = {}
    for start in STARTS:
        new, z, wanted, found = read_and_written(norm, x, start=start, options=options)
        errors[start] = float((found - wanted).square().mean())
        residual = found - wanted
        if start == "least-squares":  # the normal equations
            assert residual.mean(0).abs().max() < 1e-12
            assert (residual * z).mean(0).abs().max() < 1e-12
        if start == "ratio":
            assert abs(float((residual * (found - new.bias.detach())).sum())) < 1e-9
            assert error(norm.bias.detach(), new.bias.detach()) <= EXACT
        if start == "copy":
            assert (
                error(norm.weight.detach() * (1 if gaussian else (2 / torch.pi) ** 0.5), new.weight.detach()) <= EXACT
            )
    assert errors["least-squares"] < errors["ratio"] < errors["copy"]


def test_ratio_is_near_the_mean_of_s_over_sigma():
    x = randn(400, 64).pow(3)
    norm = scaled(nn.LayerNorm(64, **DOUBLE))
    new, *_ = read_and_written(norm, x, start="ratio", options={"gaussian": False})
    assert float((new.weight / norm.weight).detach()[1]) == pytest.approx(deviation_ratio(x), rel=0.05)


@pytest.mark.parametrize("start", STARTS)
def test_rms_norm_has_no_shift(start: str):
    x = randn(60, 7).pow(3) + 1
    norm = scaled(nn.RMSNorm(7, **DOUBLE))
    new, z, wanted, found = read_and_written(norm, x, start=start)
    assert type(new) is L1RMSNorm
    assert new.bias is None
    if start == "least-squares":
        assert ((found - wanted) * z).mean(0).abs().max() < 1e-12


def test_rms_norm_with_a_shift_keeps_it():
    from normfuse.layers.rms_norm import RMSNorm

    norm = RMSNorm([6], 1e-6, True, bias=True, axis=-1).double()
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(randn(6))
    new, *_ = read_and_written(norm, randn(30, 6))
    assert type(new) is L1RMSNorm
    assert new.bias is not None


def test_gaussian_tokens_stay_close():
    x = randn(50, 2000)
    for norm in (nn.LayerNorm(2000, **DOUBLE), nn.RMSNorm(2000, **DOUBLE)):
        for start in STARTS:
            _, _, wanted, found = read_and_written(scaled(norm), x, start=start)
            assert float((found - wanted).square().mean() / wanted.square().mean()) < 0.03**2


# what comes back


def test_globs_report_and_manifest(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        NormAct(4),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 6),
        nn.RMSNorm(6),
        nn.GroupNorm(2, 6),
    )
    model = randomize_norms(model.double().eval())
    x = randn(5, 3, 6, 6)
    report = swap(model, x).report
    assert [o.subject for o in report.norms] == ["1", "3", "5", "6"]
    assert [o.status.name for o in report.norms] == ["APPLIED"] * 3 + ["UNMATCHED"]
    swapped = normfuse.swap_norms(model, "l1", [x], exclude=["3"], progress=False)
    assert type(swapped[3]) is nn.LayerNorm  # type: ignore[index]
    for path in (tmp_path / "swapped.pt", tmp_path / "swapped.safetensors"):
        normfuse.save(swapped, path)
        loaded = normfuse.load(path, model=randomize_norms(model, seed=1))
        assert_parity(swapped, loaded, x, tolerance=1e-15)
        loaded.train()


def test_half_precision_and_frozen_norms():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4)).eval().bfloat16()
    model[1].requires_grad_(False)
    swapped: Any = normfuse.swap_norms(model, "l1", [randn(9, 4).float()], progress=False)
    assert (swapped[0].weight.dtype, swapped[0].running_deviation.dtype) == (torch.bfloat16, torch.float32)
    assert swapped[0].weight.requires_grad
    assert not swapped[1].weight.requires_grad


def test_reconstruction_brings_it_nearer():
    model, inputs = randomize_norms(built(ViT), positive=True), images(24)
    start = normfuse.swap_norms(model, "l1", list(inputs.split(8)), progress=False)
    fitted = normfuse.swap_norms(model, "l1", list(inputs.split(8)), reconstruct=20, progress=False)
    with torch.no_grad():
        far, near = (float((one(inputs) - model(inputs)).square().mean()) for one in (start, fitted))
    assert near < 0.7 * far


# reasons


def test_without_data_and_wrong_arguments():
    with pytest.raises(ValueError, match="swap-l1 needs calibration data"):
        normfuse.swap_norms(built(ViT), "l1")
    with pytest.raises(ValueError, match="start is one of"):
        SwapL1([images()], start="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="options of L1 norms"):
        SwapL1([images()], options={"warmup_steps": 3})


def frozen() -> nn.Module:
    from torchvision.ops.misc import FrozenBatchNorm2d

    return FrozenBatchNorm2d(4)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), Reason.BATCH_STATISTICS),
        (nn.SyncBatchNorm(4), Reason.UNSUPPORTED_LAYER),
        (frozen(), Reason.UNSUPPORTED_LAYER),
        (nn.GroupNorm(2, 4), Reason.UNSUPPORTED_LAYER),
        (nn.LayerNorm([5, 5]), Reason.AXIS),
    ],
)
def test_norms_that_stay(norm: nn.Module, expected: Reason):
    assert reason(nn.Sequential(norm).eval(), randn(2, 4, 5, 5).float()) is expected


def test_norm_in_training_mode():
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    model[0].train()
    assert reason(model, randn(3, 4).float()) is Reason.BATCH_STATISTICS


def test_norm_with_a_forward_of_its_own():
    class Doubled(NormAct):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    assert reason(nn.Sequential(Doubled(4)).eval(), randn(2, 4, 3, 3).float()) is Reason.FORWARD_OVERRIDDEN


def test_functions_are_no_layers():
    norm = nn.BatchNorm2d(4)
    model = Calls(lambda m, x: F.batch_norm(x, torch.zeros(4), torch.ones(4)), other=norm).eval()
    report = swap(model, randn(2, 4, 3, 3).float()).report
    assert {(o.layer, o.status) for o in report.norms} == {
        ("batch_norm", Status.REFUSED),
        ("BatchNorm2d", Status.NOT_REACHED),
    }


def test_channels_first():
    class ChannelNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    assert reason(nn.Sequential(ChannelNorm(6)), randn(2, 6, 5, 3).float()) is Reason.AXIS


def test_partial_statistics():
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.eps = 0.5, 1e-8
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x / (x[..., :3].square().mean(-1, keepdim=True).sqrt() + self.eps)

    Partial.__name__ = "PartialRMSNorm"
    assert reason(nn.Sequential(Partial()), randn(9, 6).float()) is Reason.UNSUPPORTED_LAYER


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.BatchNorm1d(4)])
def test_hooks_and_wrong_numbers(norm: nn.Module):
    with pytest.raises(CalibrationError, match="12 of 12 values"):
        reason(nn.Sequential(norm).eval(), randn(3, 4).float(), torch.full((3, 4), float("inf")))
    norm.register_forward_hook(lambda *_: None)
    assert reason(nn.Sequential(norm).eval(), randn(3, 4).float()) is Reason.HAS_HOOKS


def test_batch_norm_called_by_keyword():
    model = Calls(lambda m, x: m.norm(input=x), norm=nn.BatchNorm1d(4)).eval()
    assert reason(model, randn(3, 4).float()) is Reason.UNSUPPORTED_LAYER


def test_rank_is_not_known_without_inputs():
    data = [randn(3, 4).float()]
    model = nn.Sequential(nn.Identity(), nn.BatchNorm1d(4)).eval()
    (found,) = normfuse.apply(model, [SwapL1(data)]).report.norms
    assert found.refusal
    assert found.refusal.reason is Reason.RANK_UNKNOWN


def test_swapped_again_changes_nothing():
    model = nn.Sequential(nn.LayerNorm(4)).eval()
    once = normfuse.swap_norms(model, "l1", [randn(9, 4).float()], progress=False)
    found = outcome(once, randn(9, 4).float())
    assert found.refusal
    assert found.refusal.reason is Reason.UNSUPPORTED_LAYER
