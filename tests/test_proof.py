"""``verify=True``: a wrong result never comes back, a right one always does, and what could not be judged says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import api, surgery
from normfuse.base import Pass
from normfuse.errors import VerificationError
from normfuse.passes import PASSES
from normfuse.passes.fold_bn import FoldBN
from normfuse.report import Verification
from tests.fingerprint import fingerprint
from tests.parity import randomize_norms
from tests.test_all_or_nothing import CASES, prepared

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
EXACT = [name for name, one in PASSES.items() if one.exactness.value == "exact" and name != "duplicate-shared"]


def deep(layers: int = 6, channels: int = 16) -> nn.Module:
    """Return convolutions with norms, of as many channels as hide a fault of one of them well."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.SiLU())

    blocks = [block() for _ in range(layers)]
    model = nn.Sequential(nn.Conv2d(3, channels, 1), *blocks, nn.Conv2d(channels, 8, 3, bias=False))
    return randomize_norms(model.double().eval())


def verification(model: nn.Module, x: Any = X, **options: Any) -> Verification:
    found = normfuse.apply(model, api.EXACT_PASSES, example_inputs=x, **options).report.verification
    assert found is not None
    return found


def spoilt(change: Callable[[Tensor], Tensor], at: int | str = 1) -> Callable[..., None]:
    """Return an ``assign`` that changes the weights of one block of :func:`deep` on their way."""
    assign = surgery.assign

    def wrong(module_of: Any, tensors: Any, *args: Any) -> None:
        names = [name for name in tensors if name.endswith(f"{at}.0.weight")]
        assign(module_of, {**tensors, **{name: change(tensors[name].clone()) for name in names}}, *args)

    return wrong


def flipped(tensor: Tensor) -> Tensor:
    """Turn the sign of the largest output channel."""
    channel = int(tensor.flatten(1).abs().amax(1).argmax())
    tensor[channel] = -tensor[channel]
    return tensor


# wrong results


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("dtype", "at"),
    [(dtype, at) for dtype in (torch.float64, torch.float32) for at in (1, 4, 6)]
    + [(torch.float16, 6), (torch.bfloat16, 6)],
)
def test_the_sign_of_one_channel_is_missed_nowhere(
    dtype: torch.dtype, at: int, inplace: bool, monkeypatch: pytest.MonkeyPatch
):
    """In half precision only near the outputs: five layers further up it moves them less than rounding does."""
    model = deep().to(dtype)
    before = fingerprint(model)
    monkeypatch.setattr(surgery, "assign", spoilt(flipped, at))
    with pytest.raises(VerificationError, match="fold-bn changed what the model computes") as caught:
        normfuse.fold(model, example_inputs=X.to(dtype), inplace=inplace)
    assert fingerprint(model) == before
    assert caught.value.comparison is not None
    assert caught.value.comparison.diverges_at == f"{at}.1"
    assert f"first at {at}.1" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in EXACT if name != "tune-mode"])
def test_the_pass_at_fault_is_named(name: str, monkeypatch: pytest.MonkeyPatch):
    make, build, x = CASES[name]
    one: Any = make()
    apply, model = one.apply, prepared(build)
    before = fingerprint(model)

    def wrong(match: Any, graph: Any) -> None:
        apply(match, graph)
        weights = [t for t in graph.root.parameters() if t.dim() > 1]
        with torch.no_grad():
            weights[0].add_(torch.linspace(0, 0.1, weights[0].numel()).reshape(weights[0].shape))

    monkeypatch.setattr(one, "apply", wrong)
    first = PASSES["materialize"]()
    with pytest.raises(VerificationError, match=f"^{name} changed"):
        normfuse.apply(model, [first, one] if name != "materialize" else [one], example_inputs=x)
    assert fingerprint(model) == before


def test_a_wrong_product_in_tune_mode_is_seen(monkeypatch: pytest.MonkeyPatch):
    from normfuse.layers import tuned

    make, build, x = CASES["tune-mode"]
    model = prepared(build)
    before = fingerprint(model)
    forward = tuned.TunedProduct.forward
    monkeypatch.setattr(tuned.TunedProduct, "forward", lambda self, input: forward(self, input) * 1.001)
    with pytest.raises(VerificationError, match=r"^tune-mode changed"):
        normfuse.apply(model, [make()], example_inputs=x, inplace=True)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t * float("nan"), "has NaN"),
        (lambda t: t[:, :1], "the result does not run"),
        (lambda t: t * (1 + 1e-7), "rounding explains"),
    ],
)
def test_other_faults_are_said(change: Callable[[Tensor], Tensor], text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(surgery, "assign", spoilt(change))
    with pytest.raises(VerificationError, match=text):
        normfuse.fold(deep(), example_inputs=X)


def test_without_verification_a_wrong_result_comes_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(surgery, "assign", spoilt(flipped))
    for run in (normfuse.fold, normfuse.fold_bn):
        assert run(deep(), example_inputs=X, verify=False) is not None
        with pytest.raises(VerificationError):
            run(deep(), example_inputs=X)


def test_a_fault_shows_on_inputs_that_are_made_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(surgery, "assign", spoilt(flipped))
    with pytest.raises(VerificationError, match=r"on .*:1x3x64x64 float64"):
        normfuse.fold(deep())


# right results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_right_result_says_on_what_it_was_verified_and_how_well(dtype: torch.dtype):
    found = verification(deep().to(dtype), X.to(dtype))
    assert found.verified
    assert found.origin == ""
    assert found.inputs == f"input:2x3x9x9 {str(dtype).removeprefix('torch.')}"
    assert found.error <= found.allowed
    assert found.allowed <= torch.finfo(dtype).eps ** 0.5


class Amplifies(nn.Module):
    """A network that multiplies rounding by a factor, and bends what comes of it back into the range of one."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.body, self.factor = deep(2), factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.body(x) * self.factor)


@pytest.mark.parametrize(
    ("dtype", "factor"), [*((torch.float32, f) for f in (1e3, 1e5, 1e7)), *((torch.float16, f) for f in (1e2, 1e3))]
)
def test_rounding_however_amplified_is_no_fault_and_hides_none(
    dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch
):
    x = X.to(dtype)
    for seed in range(4):
        torch.manual_seed(seed)
        assert verification(Amplifies(factor).to(dtype), x).verified
    monkeypatch.setattr(surgery, "assign", spoilt(flipped))
    with pytest.raises(VerificationError):
        normfuse.fold(Amplifies(factor).to(dtype), example_inputs=x)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 1e16), (torch.float32, 1e12)])
def test_a_network_that_is_all_rounding_in_float64_is_not_judged(dtype: torch.dtype, factor: float):
    found = verification(Amplifies(factor).to(dtype), X.to(dtype))
    assert not found.verified
    word = str(dtype).removeprefix("torch.")
    assert f"rounding in {word} alone moves the outputs by" in found.reason


class Answers(nn.Module):
    """Decides: which is the largest, which pass a threshold, in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.body = deep(3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        scores = self.body(x)
        order = scores.flatten().argsort()
        return {"top": scores.argmax(1), "kept": scores[scores > scores.mean()], "order": order, "name": "text"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_integers_and_shapes_that_depend_on_data(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    for seed in range(5):
        torch.manual_seed(seed)
        assert verification(Answers().to(dtype), torch.randn(6, 3, 9, 9).to(dtype)).verified
    monkeypatch.setattr(surgery, "assign", spoilt(flipped))
    with pytest.raises(VerificationError):
        normfuse.fold(Answers().to(dtype), example_inputs=torch.randn(6, 3, 9, 9).to(dtype))


class Draws(nn.Module):
    """Draws numbers in eval mode too, from torch's generator or from the system's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.body, self.draw = deep(2), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.draw()


def test_numbers_that_a_seed_decides_are_the_same_in_both_runs():
    assert verification(Draws(lambda: float(torch.randn(())))).verified


def test_outputs_that_differ_from_run_to_run_are_not_judged():
    found = verification(Draws(lambda: os.urandom(1)[0] * 1.0 + os.urandom(1)[0] / 255))
    assert not found.verified
    assert found.reason == "the outputs of the model differ from run to run"


class Counts(nn.Module):
    """Returns another value at each call, from what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls, self.cache = deep(2), 0, {}
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.cache[self.calls] = x
        return self.body(x) * self.calls + self.seen


def test_what_a_model_keeps_from_call_to_call_stays_out_of_it():
    model = Counts().double()
    for inplace in (False, True):
        result = normfuse.apply(model, ["fold-bn"], example_inputs=X, inplace=inplace)
        assert result.report.verification is not None
        assert result.report.verification.verified
        assert (result.model.calls, float(result.model.seen), result.model.cache) == (0, 0.0, {})


def test_fewer_digits_than_the_type_has_are_allowed_for():
    with torch.autocast("cpu", torch.bfloat16):
        found = verification(deep().float(), X.float())
    assert found.verified


# what cannot be judged


class NoTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = deep(2)

    def forward(self, x: Tensor) -> str:
        return f"{float(self.body(x).sum()):.3f}"


class NotANumber(NoTensor):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.body(x) * float("nan")


class Needs(nn.Module):
    """Takes what nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, record: Any) -> Tensor:
        return self.bn(self.conv(record.image))


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (NoTensor, X, "the model returns no tensor with elements"),
        (NotANumber, X, "the model itself gives NaN in output 'output'"),
        (Needs, None, "no example_inputs were given, and the model runs on none that could be made up"),
    ],
)
def test_what_cannot_be_judged_says_why(
    model: Callable[[], nn.Module], x: Any, reason: str, caplog: pytest.LogCaptureFixture
):
    result = normfuse.apply(randomize_norms(model().double().eval()), ["fold-bn"], example_inputs=x)
    found = result.report.verification
    assert found is not None
    assert not found.verified
    assert found.reason == reason
    assert result.report.summary().endswith("; not verified")
    assert f"  not verified: {reason}" in str(result.report).splitlines()
    assert f"not verified: {reason}" in caplog.text


def test_inputs_are_made_up_where_none_are_given():
    found = verification(deep(), None)
    assert found.verified
    assert found.origin == "guessed from 0 (Conv2d)"
    assert "1x3x64x64" in found.inputs
    assert str(found).endswith("guessed from 0 (Conv2d))")


def test_nothing_is_said_where_nothing_was_to_verify():
    report = normfuse.apply(nn.Sequential(nn.ReLU()), ["fold-bn"], example_inputs=X).report
    assert report.verification is None
    assert normfuse.inspect(deep(), example_inputs=X).verification is None
    assert normfuse.apply(deep(), ["fold-bn"], example_inputs=X, verify=False).report.verification is None
    make, build, x = CASES["recalibrate"]
    assert normfuse.apply(build(), [make()], example_inputs=x).report.verification is None


def test_the_report_has_it_as_text_and_as_json():
    report = normfuse.apply(deep(), ["fold-bn"], example_inputs=X).report
    assert report.summary().endswith("folded; verified")
    assert "  verified: off by " in str(report)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))["verification"]
    assert found["verified"] is True
    assert found["dtype"] == "float64"
    assert 0 <= found["error"] <= found["allowed"] < 1e-11


# what it costs


class Metered(nn.Module):
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.body = deep(2)

    def forward(self, x: Tensor) -> Tensor:
        Metered.runs += 1
        return self.body(x)


@pytest.mark.parametrize("one", ["fold-bn", "tune-mode"])
def test_verifying_runs_the_source_and_the_result_once_each(one: str):
    def runs(**options: Any) -> int:
        Metered.runs = 0
        normfuse.apply(Metered(), [one], example_inputs=X, **options)
        return Metered.runs

    assert runs() == runs(verify=False) + 2


def test_a_model_that_nothing_changes_is_not_run_again():
    def runs(**options: Any) -> int:
        Metered.runs = 0
        normfuse.apply(Metered(), ["merge-branches"], example_inputs=X, **options)
        return Metered.runs

    assert runs() == runs(verify=False) == 1


def test_no_second_copy_of_the_weights_is_made(monkeypatch: pytest.MonkeyPatch):
    copies: list[nn.Module] = []
    copy = surgery.copy
    monkeypatch.setattr(surgery, "copy", lambda model: (copies.append(model), copy(model))[1])
    normfuse.apply(deep(), ["fold-bn"], example_inputs=X, inplace=True)
    assert copies == []
    normfuse.apply(deep(), ["fold-bn"], example_inputs=X)
    assert len(copies) == 1


def test_a_pass_of_the_user_is_verified_too():
    class Doubles(FoldBN):
        name = "doubles"

        def apply(self, match: Any, graph: Any) -> None:
            super().apply(match, graph)
            name = "7.weight"
            graph.assign({name: graph.tensor(name).double() * 2})

    one: Pass = Doubles()
    with pytest.raises(VerificationError, match=r"^doubles changed"):
        normfuse.apply(deep(), [one], example_inputs=X)


def test_functions_of_the_functional_interface_are_moved_with_their_vectors():
    """Vectors that no module's own ``forward`` reads take part in what rounding is measured by."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gain = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(4) + 0.5)
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, self.gain)

    assert verification(Functional().double()).verified


class Domains(nn.Module):
    """Two branches, of which a call takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([deep(1), deep(1)])

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.branches[domain](x)


def test_every_example_is_run(monkeypatch: pytest.MonkeyPatch):
    examples = normfuse.Examples(X, (X[:1], 1))
    assert verification(Domains(), examples).inputs.startswith("x:2x3x9x9 float64; x:1x3x9x9 float64")
    monkeypatch.setattr(surgery, "assign", spoilt(flipped, at="branches.1.1"))
    assert verification(Domains(), X).verified
    with pytest.raises(VerificationError, match=r"^fold-bn changed .*first at branches\.1\.1\.1"):
        normfuse.fold(Domains(), example_inputs=examples)


class Narrow(nn.Module):
    """A norm that computes in a narrower type than it is given, as those of transformers do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = deep(2), dtype
        self.norm, self.last = nn.LayerNorm(7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        rounded = (y / y.norm(dim=-1, keepdim=True)).to(self.dtype).to(y.dtype)
        return self.last(self.norm(rounded))


@pytest.mark.parametrize(("dtype", "narrow"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_digits_that_a_forward_drops_are_no_fault(dtype: torch.dtype, narrow: torch.dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        found = verification(randomize_norms(Narrow(narrow).to(dtype)), X.to(dtype))
        assert found.verified
        assert found.allowed >= torch.finfo(narrow).eps ** 0.75
