"""``fold-bn`` on the norms of normfuse that are a fixed map in eval mode, and on ``addmm``."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import Reason, api, norms, surgery
from normfuse.capture import capture
from normfuse.layers import PowerNorm, UnifiedNorm
from normfuse.layers.power_norm import GroupScaling
from normfuse.lowering.onnx import export_onnx
from normfuse.report import Outcome, Status
from tests.parity import assert_parity, randomize_norms
from tests.transformers_small import Decoder, ViT, built, images, words


def unified(model: nn.Module) -> nn.Module:
    """Return the model in float64 with a random UnifiedNorm for each LayerNorm."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, UnifiedNorm(child.normalized_shape[0]))
    return randomize_norms(model.double().eval())


def pair(norm: nn.Module, *, before: bool = True, after: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [*([nn.Linear(5, 6)] if before else [nn.Identity()]), norm, *([nn.Linear(6, 4)] if after else [])]
    return randomize_norms(nn.Sequential(*layers).double().eval())  # type: ignore[return-value]


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def only(model: nn.Module, inputs: Tensor) -> Outcome:
    (outcome,) = normfuse.inspect(model, example_inputs=inputs).norms
    return outcome


@pytest.mark.parametrize(("kind", "inputs"), [(ViT, images(2, dtype=torch.float64)), (Decoder, words(2))])
def test_no_norm_is_left_of_a_pre_norm_transformer(kind: type[nn.Module], inputs: Tensor):
    model = unified(built(kind))
    folded = normfuse.fold(model, example_inputs=inputs)
    assert norms.find_norms(capture(folded, inputs)) == []
    assert_parity(model, folded, inputs)


@pytest.mark.parametrize(("kind", "inputs"), [(ViT, images(2)), (Decoder, words(2))])
def test_no_norm_is_left_of_its_onnx_file(kind: type[nn.Module], inputs: Tensor, tmp_path: Path):
    folded = normfuse.fold(unified(built(kind, depth=1)).float(), example_inputs=inputs)
    export_onnx(folded, tmp_path / "folded.onnx", example_inputs=inputs)
    ops = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
    assert not {"ReduceMean", "Sqrt", "Reciprocal", "Pow"} & set(ops)
    assert not [op for op in ops if "Norm" in op]


def test_a_norm_that_stays_is_one_multiplication_and_one_addition_in_onnx(tmp_path: Path):
    model = randomize_norms(UnifiedNorm(6).eval())
    export_onnx(model, tmp_path / "norm.onnx", example_inputs=torch.randn(2, 3, 6))
    ops = [node.op_type for node in onnx.load(tmp_path / "norm.onnx").graph.node]
    assert sorted(ops) == ["Add", "Mul"]


@pytest.mark.parametrize("dim", [-1, 2])
@pytest.mark.parametrize("make", [UnifiedNorm, lambda n, **k: PowerNorm(n, group_scaling=None, **k)])
def test_backwards_and_forwards(make, dim: int):
    for before, after in ((True, False), (False, True)):
        model = pair(make(6, dim=dim), before=before, after=after)
        inputs = data(2, 3, 5 if before else 6)
        result = api.apply(model, ["fold-bn"], example_inputs=inputs)
        assert isinstance(result.model[1], nn.Identity)
        assert_parity(model, result.model, inputs)


def test_channels_first():
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 6, 3), UnifiedNorm(6, dim=1), nn.ReLU()).double().eval())
    folded = normfuse.fold(model, example_inputs=data(2, 3, 5, 5))
    assert isinstance(folded[1], nn.Identity)
    assert_parity(model, folded, data(2, 3, 5, 5))


def test_the_axis_counts_from_the_end():
    """The channels of the norm are the last axis, those of the convolution before it are not."""
    outcome = only(randomize_norms(nn.Sequential(nn.Conv1d(3, 6, 1), UnifiedNorm(6)).double().eval()), data(2, 3, 6))
    assert outcome.refusal
    assert outcome.refusal.reason is Reason.AXIS


def test_group_scaling_stays_and_the_rest_folds_forwards():
    model = pair(PowerNorm(6, group_scaling=2))
    result = api.apply(model, ["fold-bn"], example_inputs=data(2, 3, 5))
    assert isinstance(result.model[1], GroupScaling)
    assert torch.equal(result.model[0].weight, model[0].weight)
    (outcome,) = result.report.norms
    assert (outcome.status, outcome.remains) == (Status.APPLIED, True)
    assert outcome.refusal
    assert "1.group_scaling divides each token" in outcome.refusal.detail
    assert_parity(model, result.model, data(2, 3, 5))


def test_a_map_does_not_pass_backwards_through_group_scaling():
    """Also not the map of a norm behind it, after the first one was folded."""
    model = randomize_norms(pair(PowerNorm(6, group_scaling=2), after=False).append(UnifiedNorm(6)).double().eval())
    result = api.apply(model, api.EXACT_PASSES, example_inputs=data(2, 3, 5))
    assert [o.status for o in result.report.norms] == [Status.REFUSED, Status.REFUSED]
    assert_parity(model, result.model, data(2, 3, 5))


def test_group_scaled_norm_without_a_reader():
    assert only(pair(PowerNorm(6), after=False), data(2, 3, 5)).refusal.reason is Reason.EXTRA_CONSUMER  # type: ignore[union-attr]


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 6), UnifiedNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.first(x))
        return x + self.second(x)


def test_a_post_norm_stays_with_the_reason():
    outcome = only(randomize_norms(PostNorm().double().eval()), data(2, 3, 6))
    assert outcome.status is Status.REFUSED
    assert outcome.refusal
    assert outcome.refusal.reason in (Reason.EXTRA_CONSUMER, Reason.OPAQUE_OPERATION, Reason.NO_PRODUCER)


def test_training_mode_inside_a_model_in_eval_mode():
    model = pair(UnifiedNorm(6))
    model[1].train()
    assert only(model, data(2, 3, 5)).refusal.reason is Reason.BATCH_STATISTICS  # type: ignore[union-attr]


def test_a_padding_mask_does_not_matter():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(5, 6), UnifiedNorm(6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(self.first(x), padding_mask=mask)

    model = randomize_norms(Masked().double().eval())
    inputs = (data(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool))
    folded = normfuse.fold(model, example_inputs=inputs)
    assert not [m for m in folded.modules() if isinstance(m, UnifiedNorm)]
    assert_parity(model, folded, inputs)
    replayed = Masked().double().eval()
    surgery.replay(replayed, folded.normfuse_manifest["edits"])  # type: ignore[arg-type]
    replayed.load_state_dict(folded.state_dict())
    assert_parity(model, replayed, inputs)


class Doubled(UnifiedNorm):
    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, padding_mask)


class Bounded(UnifiedNorm):
    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, padding_mask).clamp(-1, 1)


@pytest.mark.parametrize(("kind", "folds"), [(Doubled, True), (Bounded, False)])
def test_a_subclass_with_a_forward_of_its_own_is_what_it_computes(kind: type[UnifiedNorm], folds: bool):
    model = pair(kind(6))
    outcome = only(model, data(2, 3, 5))
    assert (outcome.status is Status.APPLIED) is folds
    assert_parity(model, normfuse.fold(model, example_inputs=data(2, 3, 5)), data(2, 3, 5))


def test_without_inputs_the_rank_is_not_guessed():
    (outcome,) = normfuse.inspect(pair(UnifiedNorm(6))).norms
    assert outcome.refusal
    assert outcome.refusal.reason is Reason.RANK_UNKNOWN


def test_a_folded_file_loads_again(tmp_path: Path):
    model = pair(PowerNorm(6, group_scaling=2))
    folded = normfuse.fold(model, example_inputs=data(2, 3, 5))
    normfuse.save(folded, tmp_path / "folded.pt")
    normfuse.save(folded, tmp_path / "folded.safetensors")
    assert_parity(model, normfuse.load(tmp_path / "folded.pt"), data(2, 3, 5))
    assert_parity(model, normfuse.load(tmp_path / "folded.safetensors", model=model), data(2, 3, 5))


class MatrixProduct(nn.Module):
    """The ``Conv1D`` of GPT-2: ``addmm`` with a weight of ``(in, out)``."""

    def __init__(self, inputs: int, outputs: int, **scales: float) -> None:
        super().__init__()
        self.scales = scales
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        return torch.addmm(self.bias, flat, self.weight, **self.scales).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_addmm_absorbs_on_both_sides(before: bool, after: bool):
    torch.manual_seed(0)
    layers = [*([MatrixProduct(5, 6)] if before else []), UnifiedNorm(6), *([MatrixProduct(6, 4)] if after else [])]
    model = randomize_norms(nn.Sequential(*layers).double().eval())
    inputs = data(2, 3, 5 if before else 6)
    folded = normfuse.fold(model, example_inputs=inputs)
    assert not [m for m in folded.modules() if isinstance(m, UnifiedNorm)]
    assert_parity(model, folded, inputs)


@pytest.mark.parametrize("scales", [{"alpha": 2.0}, {"beta": 0.5}])
def test_scaled_addmm_is_not_a_linear_layer(scales: dict[str, float]):
    model = randomize_norms(nn.Sequential(UnifiedNorm(6), MatrixProduct(6, 4, **scales)).double().eval())
    outcome = only(model, data(2, 3, 6))
    assert outcome.refusal
    assert outcome.refusal.reason in (Reason.OPAQUE_OPERATION, Reason.NO_PRODUCER)


def test_addmm_with_a_computed_addend_is_not_a_linear_layer():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.weight = UnifiedNorm(6), nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(x, self.norm(x), self.weight)

    model = randomize_norms(Added().double().eval())
    assert only(model, data(3, 6)).status is Status.REFUSED
