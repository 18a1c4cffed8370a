"""``swap_norms``: which norms are found, what they are fitted to, and what comes back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normfuse
from normfuse import CalibrationError, Reason, Report
from normfuse.layers import UnifiedNorm
from normfuse.passes.swap_unified import SwapUnified
from tests.parity import assert_parity, error, outputs, randomize_norms
from tests.transformers_small import Decoder, ViT, built, images, words

PRECISE = 1e-9


def unified(model: nn.Module) -> dict[str, UnifiedNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, UnifiedNorm)}


def report(model: nn.Module, inputs: Tensor, **options: object) -> Report:
    return normfuse.apply(model, [SwapUnified([inputs], **options)], example_inputs=inputs).report  # type: ignore[arg-type]


def double(kind: type[nn.Module]) -> nn.Module:
    return randomize_norms(built(kind).double(), positive=True)


def test_every_norm_is_swapped_and_folds():
    for kind, inputs in ((ViT, images(dtype=torch.float64)), (Decoder, words())):
        model = double(kind)
        swapped = normfuse.swap_norms(model, "unified", [inputs])
        assert type(swapped) is kind
        assert len(unified(swapped)) == 5
        assert not unified(model)
        assert not [m for m in swapped.modules() if isinstance(m, nn.LayerNorm)]
        folded = normfuse.fold(swapped, example_inputs=inputs)
        assert not unified(folded)
        assert_parity(swapped, folded, inputs, tolerance=PRECISE)


def test_each_norm_is_the_best_line_of_its_channel():
    model, inputs = double(ViT), images(dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.blocks[1].norm2.register_forward_hook(lambda m, a, y: seen.append((a[0], y)))  # type: ignore[union-attr, arg-type]
    model(inputs)
    handle.remove()
    (x, y), norm = seen[0], unified(normfuse.swap_norms(model, "unified", list(inputs.split(5))))["blocks.1.norm2"]
    x, y = (t.detach().flatten(0, 1) for t in (x, y))
    slope, intercept = norm.affine_map()
    residual = y - slope * x - intercept
    assert residual.mean(0).abs().max() < 1e-12  # the normal equations
    assert (residual * (x - x.mean(0))).mean(0).abs().max() < 1e-12
    assert torch.allclose(norm.running_second_moment, x.square().mean(0))
    assert int(norm.step) == 0


def test_least_squares_is_nearer_to_each_norm_than_copying():
    model, inputs = double(ViT), images(64, dtype=torch.float64)
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda m, a, y, name=name: calls.update({name: (a[0], y)}))
    outputs(model, inputs)
    errors = {}
    for start in ("copy", "least-squares"):
        fresh = double(ViT)
        norms = unified(normfuse.apply(fresh, [SwapUnified([inputs], start=start)], example_inputs=inputs).model)
        with torch.no_grad():
            errors[start] = {name: float((norms[name](x) - y).square().mean()) for name, (x, y) in calls.items()}
    assert len(calls) == 5
    assert all(errors["least-squares"][name] < errors["copy"][name] for name in calls)


def test_copying_keeps_gain_and_shift():
    model, inputs = double(ViT), images(dtype=torch.float64)
    result = normfuse.apply(model, [SwapUnified([inputs], start="copy")], example_inputs=inputs)
    assert torch.equal(result.model.norm.weight, model.norm.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(result.model.norm.bias, model.norm.bias)  # type: ignore[union-attr, arg-type]


def test_sequential_fits_behind_the_swapped_norms():
    """The last norm reads what the swapped ones make, and its target is what the original wrote."""
    model, inputs = double(ViT), images(dtype=torch.float64)
    swapped = normfuse.swap_norms(model, "unified", list(inputs.split(6)), order="sequential")
    kept: dict[str, Tensor] = {}
    swapped.norm.register_forward_hook(lambda m, a, y: kept.update(x=a[0], found=y))  # type: ignore[union-attr, arg-type]
    model.norm.register_forward_hook(lambda m, a, y: kept.update(wanted=y))  # type: ignore[union-attr, arg-type]
    swapped(inputs)
    model(inputs)
    residual = (kept["wanted"] - kept["found"]).flatten(0, 1)
    x = kept["x"].flatten(0, 1)
    assert residual.mean(0).abs().max() < 1e-12
    assert (residual * (x - x.mean(0))).mean(0).abs().max() < 1e-12


def test_globs_and_the_report():
    model, inputs = double(ViT), images(dtype=torch.float64)
    swapped = normfuse.swap_norms(model, "unified", [inputs], exclude=["norm", "blocks.0.*"])
    assert set(unified(swapped)) == {"blocks.1.norm1", "blocks.1.norm2"}
    assert set(unified(normfuse.swap_norms(model, "unified", [inputs], include=["norm"]))) == {"norm"}
    found = report(model, inputs)
    assert len(found.applied) == len(found.norms) == 5


def test_without_data():
    for call in (lambda: normfuse.apply(built(ViT), ["swap-unified"]), lambda: normfuse.swap_norms(built(ViT))):
        with pytest.raises(ValueError, match="swap-unified needs calibration data"):
            call()


@pytest.mark.parametrize(("name", "value"), [("order", "random"), ("start", "zero")])
def test_wrong_arguments(name: str, value: str):
    with pytest.raises(ValueError, match=f"{name} is one of"):
        SwapUnified([images()], **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="swapped to unified, l1, not to 'batch'"):
        normfuse.swap_norms(built(ViT), "batch", [images()])  # type: ignore[arg-type]


def test_the_result_trains_and_the_folded_one_does_not():
    swapped = normfuse.swap_norms(built(ViT), "unified", [images()], options={"warmup_steps": 7})
    assert not swapped.training
    swapped.train()(images()).sum().backward()
    norm = unified(swapped)["norm"]
    assert (int(norm.step), norm.warmup_steps) == (1, 7)
    with pytest.raises(normfuse.DeployedModelError):
        normfuse.fold(swapped, example_inputs=images()).train()


def test_loader_of_pairs_and_in_place():
    model = built(ViT)
    loader = DataLoader(TensorDataset(images(), torch.zeros(12)), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    assert normfuse.swap_norms(model, "unified", loader, inplace=True) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert len(unified(model)) == 5


def test_frozen_norms_stay_frozen():
    model = built(ViT)
    model.norm.requires_grad_(False)  # type: ignore[union-attr]
    norms = unified(normfuse.swap_norms(model, "unified", [images()]))
    assert not norms["norm"].weight.requires_grad
    assert norms["blocks.0.norm1"].weight.requires_grad


def test_half_precision_keeps_statistics_in_single():
    model = built(ViT).bfloat16()
    norm = unified(normfuse.swap_norms(model, "unified", [images()]))["norm"]
    assert (norm.weight.dtype, norm.running_second_moment.dtype) == (torch.bfloat16, torch.float32)


class Shared(nn.Module):
    """One norm called at two places, one under two names, and two calls of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = self.alias = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(self.alias(x))))
        return F.layer_norm(x, (6,))


def test_a_shared_norm_stays_shared_and_is_fitted_to_all_calls():
    torch.manual_seed(0)
    model, inputs = Shared().double().eval(), torch.randn(20, 6, dtype=torch.float64) * 3
    swapped = normfuse.swap_norms(model, "unified", [inputs])
    assert swapped.norm is swapped.alias
    between = model.first(model.norm(inputs))
    both = torch.cat([inputs, between]).detach()
    assert torch.allclose(swapped.norm.running_second_moment, both.square().mean(0))  # type: ignore[arg-type]
    refused = report(model, inputs).refused
    assert [(o.refusal.reason, o.layer) for o in refused if o.refusal] == [(Reason.UNSUPPORTED_LAYER, "layer_norm")]


class Scaled(nn.LayerNorm):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(x) * (1 if scale is None else scale) + x


class Adaptive(nn.Module):
    def __init__(self, norm: nn.Module, *, extra: bool) -> None:
        super().__init__()
        self.norm, self.extra = norm, extra

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, x) if self.extra else self.norm(x)


@pytest.mark.parametrize(
    ("norm", "extra", "reason"),
    [
        (Scaled(6), False, Reason.UNSUPPORTED_LAYER),
        (Scaled(6), True, Reason.UNSUPPORTED_LAYER),
        (nn.LayerNorm((3, 6)), False, Reason.AXIS),
    ],
)
def test_what_is_refused(norm: nn.Module, extra: bool, reason: Reason):
    (outcome,) = report(Adaptive(norm, extra=extra), torch.randn(2, 3, 6)).norms
    assert outcome.refusal
    assert outcome.refusal.reason is reason


def test_hooks_and_wrong_numbers_are_refused():
    hooked, broken = Adaptive(nn.LayerNorm(6), extra=False), Adaptive(nn.LayerNorm(6), extra=False)
    hooked.norm.register_forward_hook(lambda *_: None)
    outcome = report(hooked, torch.randn(4, 6)).norms[0]
    assert outcome.refusal
    assert outcome.refusal.reason is Reason.HAS_HOOKS
    data = [torch.randn(4, 6), torch.full((4, 6), float("nan"))]
    with pytest.raises(CalibrationError, match="24 of 24 values"):
        normfuse.apply(broken, [SwapUnified(data)], example_inputs=data[0])


def test_padding_is_in_no_moment():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.norm(x) * attention_mask[..., None]

    x, mask = torch.randn(2, 3, 6), torch.tensor([[1, 1, 0], [1, 0, 0]])
    x[mask == 0] = 1e6
    norm = normfuse.swap_norms(Masked(), "unified", [{"x": x, "attention_mask": mask}]).norm
    assert torch.allclose(norm.running_second_moment, x[mask == 1].square().mean(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_calls_its_swapped_norms(norm_first: bool):
    """Its fused inference path would compute LayerNorm on the parameters of the new norms."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    inputs = torch.randn(3, 5, 8, dtype=torch.float64)
    swapped = normfuse.swap_norms(model, "unified", [inputs])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        (expected,) = outputs(swapped, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    (found,) = outputs(swapped, inputs)
    assert error(expected, found) < 1e-12
    folded = normfuse.fold(swapped, example_inputs=inputs)
    assert bool(unified(folded)) is not norm_first  # post-norms stay
    assert_parity(swapped, folded, inputs, tolerance=PRECISE)


def test_files_load_again_and_fold(tmp_path: Path):
    model, inputs = double(ViT), images(dtype=torch.float64)
    swapped = normfuse.swap_norms(model, "unified", [inputs])
    for path in (tmp_path / "swapped.pt", tmp_path / "swapped.safetensors"):
        normfuse.save(swapped, path)
        fresh = copy.deepcopy(model)
        loaded = normfuse.load(path, model=fresh)
        assert_parity(swapped, loaded, inputs, tolerance=1e-15)
        loaded.train()
        again = tmp_path / f"folded{path.suffix}"
        normfuse.save(normfuse.fold(loaded.eval(), example_inputs=inputs), again)
        assert_parity(swapped, normfuse.load(again, model=fresh), inputs, tolerance=PRECISE)
