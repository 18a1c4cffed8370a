"""The passes ``quantize`` and ``shiftquant``: which layers, why not, and what the data decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normfuse
from normfuse import Reason, Report
from normfuse.errors import CalibrationError
from normfuse.layers import L1LayerNorm
from normfuse.passes.quantize import Quantize
from normfuse.passes.shiftquant import ShiftQuantTraining
from normfuse.quantization.calibrated import CalibratedLayer
from tests.cli.conftest import small_model
from tests.parity import error, outputs
from tests.quantization.operands import image
from tests.transformers_small import Decoder, ViT, built, images, words

DATA = image(12, 3, 8, 8, dtype=torch.float32)


def reports(model: nn.Module, inputs: Tensor, **options: Any) -> list[Report]:
    """Return what both passes say of a model."""
    passes = [Quantize([inputs], **options), ShiftQuantTraining(**options)]
    return [normfuse.apply(model, [one], example_inputs=inputs).report for one in passes]


def reasons(report: Report) -> dict[str, Reason]:
    return {o.subject: o.refusal.reason for o in report.outcomes if not o.norm and o.refusal}


# what is quantized


@pytest.mark.parametrize(("kind", "inputs"), [(ViT, images()), (Decoder, words())])
def test_every_layer_is_in_the_report_once(kind: type[nn.Module], inputs: Tensor):
    model = built(kind)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for report in reports(model, inputs):
        assert sorted(o.subject for o in report.applied) == sorted(layers)
        assert f"{len(layers)} of {len(layers)} layers quantized" in report.summary()
    for swapped in (normfuse.quantize(model, calibration=[inputs]), normfuse.quantize(model, example_inputs=inputs)):
        assert type(swapped) is kind
        assert error(outputs(model, inputs)[0], outputs(swapped, inputs)[0]) < 0.05
    assert not [m for m in model.modules() if isinstance(m, CalibratedLayer)]


def test_first_and_last_are_those_that_run_first_and_last():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.middle(F.relu(self.first(x)))))

    for report in reports(Backwards(), torch.randn(5, 4), keep_first=True, keep_last=True):
        assert [o.subject for o in report.applied] == ["middle"]
        assert reasons(report) == {"first": Reason.EXCLUDED, "last": Reason.EXCLUDED}
        assert [o.subject for o in report.outcomes] == ["first", "middle", "last"]


def test_globs():
    model = small_model()
    quantized = normfuse.quantize(model, calibration=[DATA], include=["0", "3"], exclude=["3"])
    assert [n for n, m in quantized.named_modules() if isinstance(m, CalibratedLayer)] == ["0"]
    assert not [m for m in quantized.modules() if isinstance(m, nn.BatchNorm2d)]  # the globs are about layers


# what is refused


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Reads(nn.Module):
    """A layer, and code that reads its weight beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(x, self.layer.weight)


class Uncalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return nn.Sequential(layer)


def broken() -> nn.Module:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Sequential(Doubled(4, 4)), (2, 4), Reason.FORWARD_OVERRIDDEN),
        (hooked(), (2, 4), Reason.HAS_HOOKS),
        (nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), (2, 4), Reason.PARAMETRIZED),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), (2, 4, 5, 5), Reason.UNSUPPORTED_LAYER),
        (nn.Sequential(nn.Conv3d(4, 4, 1)), (2, 4, 5, 5, 5), Reason.UNSUPPORTED_LAYER),
        (Uncalled(), (2, 4), Reason.UNSUPPORTED_LAYER),
        (Reads(), (2, 4), Reason.SHARED_PARAMETER),
        (broken(), (2, 4), Reason.NONFINITE),
        (nn.Sequential(nn.Conv1d(4, 4, 1, dtype=torch.complex64)), (2, 4, 5), Reason.DTYPE),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else "",
)
def test_what_is_refused(model: nn.Module, shape: tuple[int, ...], reason: Reason):
    dtype = torch.complex64 if reason is Reason.DTYPE else torch.float32
    for report in reports(model, torch.randn(shape, dtype=dtype)):
        assert list(reasons(report).values()) == [reason]
        assert not report.applied


def test_data_that_is_no_number_and_a_part_that_cannot_be_traced():
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    model = nn.Sequential(nn.Linear(4, 4), Logarithm(), nn.Linear(4, 2))
    data = [torch.randn(3, 4)]
    report = normfuse.apply(model, [Quantize(data)], example_inputs=data[0]).report
    assert reasons(report) == {"2": Reason.NONFINITE}
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        normfuse.apply(model, [Quantize([torch.full((3, 4), torch.nan)])], example_inputs=data[0])

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.own = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) if float(x.sum()) > 0 else self.own(x)

    untraced = normfuse.apply(Odd(), [ShiftQuantTraining()]).report
    assert [o.subject for o in untraced.applied] == ["part.0"]
    assert reasons(untraced) == {"own": Reason.PARTIAL_CAPTURE}


def test_a_lazy_layer_and_a_layer_as_model():
    lazy = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    lazy.never = nn.LazyLinear(3)  # type: ignore[assignment]
    report = normfuse.apply(lazy, [ShiftQuantTraining()]).report
    assert Reason.UNINITIALIZED in reasons(report).values()
    with_root = normfuse.apply(nn.Linear(4, 4), [ShiftQuantTraining()], example_inputs=torch.randn(2, 4)).report
    assert not with_root.applied


def test_attention_reads_the_weight_of_its_output_layer():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    inputs = torch.randn(3, 5, 8)
    for report in reports(model, inputs):
        assert sorted(o.subject for o in report.applied) == ["linear1", "linear2"]
        assert list(reasons(report)) == ["self_attn.out_proj"]


@pytest.mark.parametrize("calibrated", [True, False])
def test_torch_encoder_calls_its_quantized_layers(calibrated: bool):
    """Its fused inference path would read their weights without calling them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    inputs = torch.randn(3, 5, 8)
    options: dict[str, Any] = {"calibration": [inputs]} if calibrated else {"example_inputs": inputs}
    quantized = normfuse.quantize(model, bits=4, **options)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        (expected,) = outputs(quantized, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    (found,) = outputs(quantized, inputs)
    assert error(expected, found) < 1e-5
    assert error(outputs(model, inputs)[0], found) > 1e-3  # four bits show


# what the data decides


def test_more_methods_come_nearer_on_inputs_of_unequal_range():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = image(20, 8, 9, 9, dtype=torch.float32)
    errors = {m: Quantize([x], method=m, groups=6) for m in ("per-tensor", "per-channel", "shiftquant")}
    for one in errors.values():
        normfuse.apply(model, [one], example_inputs=x)
    first = [one.layers["0"].error for one in errors.values()]
    assert first == sorted(first, reverse=True)
    assert [one.layers["0"].groups for one in errors.values()][:2] == [1, 1]
    assert errors["shiftquant"].layers["0"].groups > 2
    ranges = x.abs().amax((0, 2, 3))
    assert errors["shiftquant"].layers["0"].range_ratio == pytest.approx(float(ranges.max() / ranges.min()))
    assert all(0 < layer.error < 0.1 for one in errors.values() for layer in one.layers.values())


def test_groups_are_used_only_where_they_help():
    """Weights that undo the ranges lose by a shift what inputs gain, one that does not see them gains."""
    model, x = nn.Sequential(nn.Linear(16, 8, bias=False)), image(50, 16, dtype=torch.float32)
    chosen = []
    for weight in (torch.ones(8, 16), 1 / x.abs().amax(0)):
        with torch.no_grad():
            model[0].weight.copy_(weight)
        one = Quantize([x], groups=6)
        normfuse.apply(model, [one], example_inputs=x)
        tries = [Quantize([x], groups=groups) for groups in range(1, 7)]
        for each in tries:
            normfuse.apply(model, [each], example_inputs=x)
        assert one.layers["0"].error <= min(each.layers["0"].error for each in tries) + 1e-9
        chosen.append(one.layers["0"].groups)
    assert chosen[1] > 1


def test_error_is_that_of_the_layer_on_all_the_data():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(30, 6)
    one = Quantize(list(x.split(7)))
    quantized = normfuse.apply(model, [one], example_inputs=x[:7]).model
    y, found = model(x).detach(), quantized(x)
    assert one.layers["0"].error == pytest.approx(float((found - y).norm() / y.norm()), rel=1e-5)
    assert float(quantized[0].input_scale) == pytest.approx(float(x.abs().max()) / 127)


def test_the_bias_takes_up_the_mean_error():
    """Inputs of large mean and small spread, whose products cancel: rounding errors are all but constant."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False)), torch.randn(10, 6, 5, 5) * 0.1 + 3
    errors = []
    for correct in (True, False):
        one = Quantize(list(x.split(4)), bits=5, correct_bias=correct)
        quantized = normfuse.apply(model, [one], example_inputs=x[:4]).model
        difference = (model(x) - quantized(x)).detach()
        mean = difference.mean((0, 2, 3)).abs().max()
        assert float(mean) < 1e-5 if correct else float(mean) > 1e-2
        errors.append(one.layers["0"].error)
        assert errors[-1] == pytest.approx(float(difference.norm() / model(x).detach().norm()), rel=1e-3)
    assert errors[0] < errors[1] / 1.5


def test_percentile_clips_an_outlier():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2000, 4).clamp(-3, 3)
    x[7] = 500
    plain = normfuse.quantize(model, "per-channel", [x])
    clipped = normfuse.quantize(model, "per-channel", [x], range=99.9)
    assert float(clipped[0].input_scale) < float(plain[0].input_scale) / 100
    keep = torch.arange(len(x)) != 7
    assert error(model(x[keep]), clipped(x[keep])) < error(model(x[keep]), plain(x[keep])) / 5


def test_padding_widens_no_range():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x) * attention_mask[..., None]

    x, mask = torch.randn(2, 3, 6), torch.tensor([[1, 1, 0], [1, 0, 0]])
    x[mask == 0] = 1e6
    layer: Any = normfuse.quantize(Masked(), calibration=[{"x": x, "attention_mask": mask}]).layer
    assert float(layer.input_scale) == pytest.approx(float(x[mask == 1].abs().max()) / 127)


def test_norms_are_folded_first_unless_told_otherwise():
    model = small_model()
    folded = normfuse.quantize(model, calibration=[DATA])
    kept = normfuse.quantize(model, calibration=[DATA], fold=False)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len([m for m in kept.modules() if isinstance(m, nn.BatchNorm2d)]) == 2
    twice = normfuse.quantize(normfuse.fold(model, example_inputs=DATA), calibration=[DATA])
    assert torch.equal(folded(DATA), twice(DATA))


def test_l1_norms_stay():
    model = nn.Sequential(nn.Linear(6, 8), L1LayerNorm(8), nn.Linear(8, 2)).eval()
    quantized = normfuse.quantize(model, calibration=[torch.randn(20, 6)])
    assert [type(m).__name__ for m in quantized] == ["CalibratedLinear", "L1LayerNorm", "CalibratedLinear"]
