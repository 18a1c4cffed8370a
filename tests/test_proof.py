"""``verify=True``: a wrong result never comes back, and the error says which pass and which layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import surgery
from normfuse.base import Pass
from normfuse.errors import VerificationError
from normfuse.passes import PASSES
from normfuse.passes.fold_bn import FoldBN
from tests.edited_models import CASES, prepared
from tests.fingerprint import fingerprint
from tests.spoilt_folds import X, deep, flipped, spoilt, verification

EXACT = [name for name, one in PASSES.items() if one.exactness.value == "exact" and name != "duplicate-shared"]


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
