"""Verification: what passes, what fails, what is said about it, and that nothing is changed by it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from normfuse import api, deploy
from normfuse.comparison import Comparison, Tolerance
from normfuse.errors import CaptureError, LoadError, VerificationError
from normfuse.rerun import Samples, sample_inputs
from normfuse.verify import verify
from tests.parity import randomize_norms


class Net(nn.Module):
    """Two folded pairs, one in a container, and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, image: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        y = self.head(self.block(self.bn(self.conv(image)).relu()).mean((2, 3)))
        return {"out": y, "aux": [y * 2 if scale is None else y * scale]}


def net(dtype: torch.dtype = torch.float32) -> Net:
    model = Net()
    for norm in (model.bn, model.block[1]):
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)  # pyright: ignore[reportArgumentType]
        nn.init.uniform_(norm.running_var, 0.5, 2.0)  # pyright: ignore[reportArgumentType]
    return model.to(dtype)


def folded(model: Net, *, wrong: str = "", manifest: bool = True) -> Net:
    twin: Any = copy.deepcopy(model).eval()
    twin.conv, twin.bn = fuse_conv_bn_eval(twin.conv, twin.bn), nn.Identity()
    twin.block[0], twin.block[1] = fuse_conv_bn_eval(twin.block[0], twin.block[1]), nn.Identity()
    if wrong:
        twin.get_submodule(wrong).bias.data += 0.5
    if manifest:
        pairs = [("bn", "conv"), ("block.1", "block.0")]
        entries = [{"subject": norm, "producer": [conv], "action": "applied"} for norm, conv in pairs]
        deploy.guard(twin, {"pairs": entries})
    return twin


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=dtype)


class Map(nn.Module):
    """Any function as a model without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_fold_passes_in_its_own_precision(dtype: torch.dtype):
    model = net(dtype)
    found = verify(model, folded(model), sample_inputs(image(dtype), 4))
    assert found
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert (found.judge, found.inputs, found.outputs, found.failure) == ("float64", 4, 2, "")
    assert found.max_rel < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_defect_fails_although_it_is_far_below_common_tolerances(dtype: torch.dtype):
    model = net(dtype)
    twin = folded(model)
    twin.head.bias.data *= 1 + 200 * torch.finfo(dtype).eps
    twin.head.bias.data += 200 * torch.finfo(dtype).eps
    assert not verify(model, twin, image(dtype))


def test_a_narrower_candidate_is_held_to_its_own_rounding():
    model = net()
    half = copy.deepcopy(folded(model, manifest=False)).half()
    found = verify(model, half, image())
    assert found
    assert found.dtype == "float16"
    assert found.reference_error > 1e-5  # of the source in float16, not in float32


@pytest.mark.parametrize(("wrong", "norm"), [("conv", "bn"), ("block.0", "block.1"), ("head", "head")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_layer_that_diverges_is_named_where_its_folded_chain_ends(wrong: str, norm: str, dtype: torch.dtype):
    model = net(dtype)
    found = verify(model, folded(model, wrong=wrong), image(dtype))
    assert not found
    assert found.diverges_at == norm
    assert f"first diverges at {norm}" in str(found)


def test_without_a_manifest_layers_before_the_last_agreement_are_not_blamed():
    model = net()
    found = verify(model, folded(model, wrong="head", manifest=False), image())
    assert found.diverges_at == "head"


def test_an_overflow_is_found_in_the_candidates_own_precision():
    model = net()
    twin = copy.deepcopy(model).half()
    twin.head.weight.data.mul_(0).add_(6e4)
    source = copy.deepcopy(twin).float()
    found = verify(source, twin, image())
    assert not found
    assert math.isinf(found.max_abs)
    assert found.diverges_at == "head"


def test_figures():
    base = torch.tensor([[3.0, 4.0], [-1.0, 2.0]])
    found = verify(Map(lambda x: x), Map(lambda x: x + torch.tensor([[0.0, 0.5], [3.5, 0.0]])), base)
    assert not found
    assert (found.max_abs, found.max_rel) == (3.5, 3.5 / 4)
    assert found.top1 == (1, 2)
    new = base + torch.tensor([[0.0, 0.5], [3.5, 0.0]])
    assert found.cosine == pytest.approx(float((base * new).sum() / base.norm() / new.norm()))
    assert found.required == Tolerance(rtol=0.0, atol=3.5)


@pytest.mark.parametrize("rtol", [0.0, 1e-3, 0.1])
def test_the_required_tolerance_passes_and_nothing_below_does(rtol: float):
    x = torch.randn(3, 4, dtype=torch.float64)
    shift = torch.randn(3, 4, dtype=torch.float64)
    source, candidate = Map(lambda x: x), Map(lambda x: x + shift)
    required = verify(source, candidate, x, tolerance=Tolerance(rtol, 0.0)).required
    assert required.rtol == rtol
    assert verify(source, candidate, x, tolerance=required)
    less = dataclasses.replace(required, atol=math.nextafter(required.atol, 0.0))
    assert not verify(source, candidate, x, tolerance=less)


def test_a_tolerance_is_relative_to_the_element():
    x = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    source = Map(lambda x: x)
    assert verify(source, Map(lambda x: x * 1.01), x, tolerance=Tolerance(rtol=0.0101, atol=0.0))
    assert not verify(source, Map(lambda x: x + 1.0), x, tolerance=Tolerance(rtol=0.0101, atol=0.0))


def test_a_negative_tolerance_is_refused():
    with pytest.raises(ValueError, match="not negative"):
        Tolerance(rtol=-1.0, atol=0.0)


@pytest.mark.parametrize("tolerance", [None, Tolerance(rtol=0.0, atol=1e300)])
def test_nan_never_passes(tolerance: Tolerance | None):
    nan = Map(lambda x: x * float("nan"))
    found = verify(Map(lambda x: x), nan, torch.ones(2), tolerance=tolerance)
    assert not found
    assert "NaN" in found.failure
    assert not verify(nan, nan, torch.ones(2), tolerance=tolerance)


def test_equal_infinities_pass_and_others_do_not():
    mask = Map(lambda x: x.masked_fill(x > 0, float("-inf")))
    x = torch.tensor([-1.0, 2.0])
    assert verify(mask, mask, x)
    assert not verify(mask, Map(lambda x: x.masked_fill(x > 0, float("inf"))), x)


def test_a_mask_value_is_not_the_scale_of_an_output():
    def masked(shift: float) -> nn.Module:
        return Map(lambda x: torch.where(x > 0, torch.finfo(torch.float32).min, x + shift))

    assert not verify(masked(0.0), masked(1.0), torch.tensor([-1.0, 2.0]))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: (x, x), "2 outputs"),
        (lambda x: {"y": x}, "(y), expected 1 outputs (output)"),
        (lambda x: x[:1], "has shape (1, 3), expected (2, 3)"),
        (lambda x: x.long(), "is torch.int64"),
        (lambda x: x.reshape(7), "does not run: RuntimeError"),
    ],
)
def test_what_does_not_correspond_fails_with_the_reason(function: Callable[..., Any], text: str):
    found = verify(Map(lambda x: x), Map(function), torch.randn(2, 3))
    assert not found
    assert text in found.failure
    assert found.required.atol == math.inf


class Chaotic(nn.Linear):
    """Amplifies rounding beyond its output, as sorting by nearly equal scores does."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.sin(super().forward(input) * 1e8)


def test_a_source_that_is_all_rounding_cannot_be_judged():
    model = Chaotic(8, 8)
    twin = copy.deepcopy(model)
    same = verify(model, twin, torch.randn(2, 8))  # to the last bit
    assert same
    assert "repeats the source's own run" in same.notes[0]
    twin.bias.data += 1e-3
    found = verify(model, twin, torch.randn(2, 8))
    assert not found
    assert "as the source itself is in this precision" in found.failure
    assert verify(model.double(), copy.deepcopy(model).double(), torch.randn(2, 8, dtype=torch.float64))


def test_comparing_nothing_is_an_error():
    with pytest.raises(VerificationError, match="no inputs"):
        verify(net(), net(), Samples(()))
    for nothing in (lambda x: None, lambda x: x[:0], lambda x: "text"):
        with pytest.raises(VerificationError, match="no tensor"):
            verify(Map(nothing), Map(nothing), torch.ones(1))


def test_integer_outputs_must_be_equal():
    source = Map(lambda x: (x, (x > 0).sum(), x.argmax()))
    assert verify(source, source, torch.randn(5))
    found = verify(source, Map(lambda x: (x, (x > 0).sum() + 1, x.argmax())), torch.randn(5))
    assert "differs in 1 of 1 integers" in found.failure
    assert "[1]" in found.failure


@dataclasses.dataclass
class Boxes:
    boxes: Tensor
    label: str
    score: float = 0.5
    missing: Tensor | None = None


def test_dataclasses_numbers_and_other_leaves():
    source = Map(lambda x: [Boxes(x, "cat")])
    found = verify(source, source, torch.ones(2))
    assert found
    assert found.outputs == 2  # boxes and score
    assert found.notes[0] == "1 outputs that are no tensors not compared"
    assert not verify(source, Map(lambda x: [Boxes(x, "cat", score=0.6)]), torch.ones(2))


def test_samples_may_differ_in_structure():
    parts = Map(lambda x: [*list(x[x > 0]), x.sum()])
    samples = Samples((torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, 2.0, 3.0])))
    found = verify(parts, parts, samples)
    assert found
    assert found.outputs == 4
    wrong = Map(lambda x: [*list(x[x > 0]), x.sum() + (x.min() > 0)])
    assert "[3]" in verify(parts, wrong, samples).failure


def test_keyword_and_positional_inputs():
    model = net()
    twin = folded(model)
    assert verify(model, twin, {"image": image(), "scale": torch.tensor(3.0)})
    assert verify(model, twin, (image(), torch.tensor(3.0)))
    assert verify(Map(lambda images: images[0] + images[1]), Map(sum), ([torch.ones(2), torch.ones(2)],))


def test_nothing_is_changed():
    model = net().train()
    model.block.eval()
    twin = folded(model, manifest=False)
    twin.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = image()
    kept = x.clone()
    verify(model, twin, x)
    assert [m.training for m in model.modules()] == [True, True, True, False, False, False, False, True]
    assert all(m.training for m in twin.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(x, kept)
    assert torch.get_default_dtype() is torch.float32
    assert all(p.grad is None and p.dtype is torch.float32 for p in model.parameters())


def test_an_inplace_model_does_not_spoil_the_input_of_the_next_run():
    assert verify(Map(lambda x: x.add_(1)), Map(lambda x: x + 1), torch.zeros(3))


class HardCoded(nn.Module):
    """A forward that names float32, as attention code does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.softmax(self.a(x), -1, dtype=torch.float32) + torch.zeros(4) + x.float())


class Head(nn.Module):
    """Logits of a sign, where the last classes are masked; or scaled by row; or both."""

    def __init__(self, sign: float, mask: float | None = -1e9, rows: float = 1.0, value: float = 1.0) -> None:
        super().__init__()
        self.sign, self.mask, self.rows, self.value = nn.Parameter(torch.tensor(sign)), mask, rows, value

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.sign
        y = torch.cat([y[:-1], y[-1:] * self.rows]) * self.value
        return y if self.mask is None else y.masked_fill(torch.arange(x.shape[1]) > 7, self.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", [-1e9, -1e4 * 7, -torch.inf, torch.finfo(torch.float32).min, None])
@pytest.mark.parametrize("rows", [1.0, 1e6])
def test_a_mask_or_a_large_row_hides_no_flipped_sign(mask: float | None, rows: float, dtype: torch.dtype):
    x = torch.randn(4, 10, dtype=dtype)
    source = Head(1.0, mask, rows).to(dtype)
    assert verify(source, copy.deepcopy(source), x)
    found = verify(source, Head(-1.0, mask, rows).to(dtype), x)
    assert not found
    assert found.top1 is not None
    assert found.top1[0] < 4


def test_one_small_row_that_differs_is_seen():
    """A sample that is a millionth of another's size has no room of its neighbour's."""
    x = torch.randn(4, 10)
    other = x.clone()
    other[0] *= -1
    assert not verify(Fixed(torch.cat([x[:-1], x[-1:] * 1e6])), Fixed(torch.cat([other[:-1], x[-1:] * 1e6])), x)


class Fixed(nn.Module):
    """Returns one value, at float32 rounding."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value + 0 * x.sum()


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_pass_only_in_the_same_places(fill: float):
    x, value = torch.randn(4, 10), torch.randn(4, 10)
    value[1, 2] = fill
    moved = value.clone()
    moved[1, 2], moved[1, 3] = value[1, 3], fill
    assert verify(Fixed(value), Fixed(value.clone()), x)
    for wrong in (moved, value.nan_to_num(0.0, 0.0, 0.0), value + torch.eye(4, 10)):
        assert not verify(Fixed(value), Fixed(wrong), x)
        assert not verify(Fixed(value.nan_to_num(0.0, 0.0, 0.0)), Fixed(value), x)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_an_output_that_never_varies_is_noted(value: float):
    fixed = Fixed(torch.full((4, 10), value))
    found = verify(fixed, copy.deepcopy(fixed), torch.randn(4, 10))
    assert found
    assert any("which shows little" in note for note in found.notes)
    varied = Fixed(torch.randn(4, 10))
    assert not verify(varied, copy.deepcopy(varied), torch.randn(4, 10)).notes


@pytest.mark.parametrize(("rtol", "atol"), [(float("inf"), 0.0), (0.0, float("inf"))])
def test_a_tolerance_without_end_is_refused(rtol: float, atol: float):
    with pytest.raises(ValueError, match="without end"):
        verify(nn.ReLU(), nn.Tanh(), torch.randn(2, 3), tolerance=Tolerance(rtol=rtol, atol=atol))


def test_float32_in_the_forward_is_read_as_float64_by_the_judge():
    model = HardCoded()
    found = verify(model, copy.deepcopy(model), torch.randn(2, 4))
    assert found
    assert found.judge == "float64"
    assert 0 < found.max_rel < 1e-5  # the judge did not round to float32


def test_a_model_that_allows_no_float64_is_judged_in_its_own_precision():
    class Foreign(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(torch.from_numpy(input.numpy().astype(np.float32)))

    model = Foreign(3, 3)
    found = verify(model, model, torch.randn(2, 3))
    assert found
    assert found.judge == "float32"
    assert "does not run in float64" in found.notes[0]
    broken = copy.deepcopy(model)
    broken.bias.data += 0.01
    assert not verify(model, broken, torch.randn(2, 3))


class OfFloat64(nn.Module):
    """Runs in float64 only: a layer is held outside of the module tree, or the type is named."""

    def __init__(self, held: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.rest = [nn.Conv2d(4, 4, 1).double()] if held else []

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.instance_norm(self.bn(self.conv(x)) * self.scale)
        return self.rest[0](y) if self.rest else torch.einsum("nchw,c->nhw", y, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("held", [True, False])
def test_a_model_that_runs_in_float64_only_is_held_to_its_own_rounding(held: bool):
    model = randomize_norms(OfFloat64(held).double().eval())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folded = api.fold(model, example_inputs=x, verify=False)
    assert verify(model, folded, x)
    with torch.no_grad():
        folded.conv.weight[0] *= 1 + 1e-9
    assert not verify(model, folded, x)


def test_a_source_that_does_not_run_is_an_error_about_the_source():
    with pytest.raises(CaptureError, match="does not run on these inputs"):
        verify(net(), net(), torch.randn(2, 7, 6, 6))


def test_a_file_of_another_kind_is_refused():
    with pytest.raises(LoadError, match=r"\.onnx"):
        verify(net(), "model.txt", image())


def test_sample_inputs_keep_shape_type_and_range():
    inputs = {"x": torch.randn(2, 3).half() * 5 + 100, "ids": torch.tensor([[2, 9]]), "flag": torch.tensor([True])}
    samples = sample_inputs(inputs, 5, seed=3).values
    assert samples[0] is inputs
    assert len(samples) == 5
    for sample in samples[1:]:
        assert isinstance(sample, dict)
        assert (sample["x"].shape, sample["x"].dtype) == ((2, 3), torch.float16)
        assert 50 < float(sample["x"].mean()) < 150
        assert set(sample["ids"].flatten().tolist()) <= set(range(2, 10))
        assert torch.equal(sample["flag"], inputs["flag"])
    assert not torch.equal(samples[1]["x"], samples[2]["x"])  # type: ignore[index, call-overload]
    again = sample_inputs(inputs, 5, seed=3).values
    assert torch.equal(samples[4]["x"], again[4]["x"])  # type: ignore[index, call-overload]
    with pytest.raises(ValueError, match="at least 1"):
        sample_inputs(inputs, 0)


def test_text_is_one_line_and_dict_is_json():
    model = net()
    passed, failed = verify(model, folded(model), image()), verify(model, folded(model, wrong="head"), image())
    assert str(passed).startswith("max abs ")
    assert str(passed).endswith("cosine 1.000000  top-1 4/4  PASSED")
    assert "FAILED: output 'out' is off by" in str(failed)
    assert "\n" not in str(failed)
    assert json.loads(json.dumps(failed.to_dict(), allow_nan=False))["diverges_at"] == "head"
    fields = {field.name for field in dataclasses.fields(Comparison)}
    assert set(passed.to_dict()) == fields


def test_json_has_no_infinity():
    found = verify(Map(lambda x: x), Map(lambda x: x * float("nan")), torch.ones(2))
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["max_abs"] is None
