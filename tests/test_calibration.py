"""Calibration data and streaming moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from normfuse.base import Reason, Refused
from normfuse.calibration import Batches, Moments, listen
from normfuse.norm_forms import as_tokens, recognise


def pairs(count: int, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, size, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]) + 40
    return x, 0.5 * x + torch.randn(count, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7, 0, 40, 3]])
def test_moments_in_parts_are_those_of_the_whole(sizes: list[int]):
    x, y = pairs(50)
    moments = Moments(3)
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        moments.add(part_x, part_y)
    design = [torch.stack([x[:, c], torch.ones(50, dtype=torch.float64)], 1) for c in range(3)]
    expected = torch.stack([torch.linalg.lstsq(a, y[:, c]).solution for c, a in enumerate(design)])
    slope, intercept = moments.line()
    assert torch.allclose(slope, expected[:, 0], rtol=1e-9)
    assert torch.allclose(intercept, expected[:, 1], rtol=1e-8)
    assert torch.allclose(moments.second_moment, x.square().mean(0), rtol=1e-12)
    residual = (y - slope * x - intercept).square().sum() / (y - y.mean(0)).square().sum()
    assert moments.unexplained() == pytest.approx(float(residual), rel=1e-9)


def test_a_constant_channel_gets_the_mean_output():
    x, y = pairs(20)
    x[:, 1] = 0.1
    x[:, 2] = 0
    moments = Moments(3)
    moments.add(x, y)
    slope, intercept = moments.line()
    assert slope[1:].tolist() == [0.0, 0.0]
    assert torch.allclose(intercept[1:], y[:, 1:].mean(0))


def test_one_token_and_none():
    moments = Moments(3)
    assert moments.line()[0].tolist() == [0, 0, 0]
    x, y = pairs(1)
    moments.add(x, y)
    assert torch.allclose(moments.line()[1], y[0])
    assert moments.unexplained() == 0.0


def items(calibration: object, **options: object) -> list[object]:
    return [batch.inputs for batch in Batches(calibration, nn.Linear(2, 2), **options)]  # type: ignore[arg-type]


def test_what_an_item_is():
    x, label = torch.randn(4, 2), torch.arange(4)
    loader = DataLoader(TensorDataset(x, label), batch_size=2)
    assert [tuple(item.shape) for item in items(loader)] == [(2, 2), (2, 2)]  # type: ignore[attr-defined]
    (positional,) = items([(x, label)])
    assert isinstance(positional, tuple)
    assert [t.shape for t in positional] == [x.shape, label.shape]
    (named,) = items([{"x": x, "mask": label}])
    assert isinstance(named, dict)
    assert set(named) == {"x", "mask"}
    assert len(items(x)) == len(items({"x": x})) == 1


def test_floats_come_in_the_precision_of_the_model():
    model = nn.Linear(2, 2).double()
    (batch,) = Batches([(torch.randn(4, 2), torch.arange(4))], model)
    assert [t.dtype for t in batch.inputs] == [torch.float64, torch.int64]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("calibration", "text"), [(None, "needs calibration data"), (3, "not a int"), (iter([1]), "not an iterator")]
)
def test_data_that_will_not_do(calibration: object, text: str):
    with pytest.raises(ValueError, match=text):
        items(calibration)


def test_no_data():
    with pytest.raises(ValueError, match="is empty"):
        items([])


def test_padding_is_left_out():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    (batch,) = Batches([{"x": torch.randn(2, 3, 4), "attention_mask": mask}], nn.Linear(2, 2))
    assert batch.padding is not None
    values = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(as_tokens(values, -1, batch.padding), values[mask.bool()].double())
    assert as_tokens(values[:, :2], -1, batch.padding).shape == (4, 4)  # a mask of other tokens says nothing
    (by_hand,) = Batches([values], nn.Linear(2, 2), lambda item: item[..., 0] > 3)
    assert by_hand.padding is not None
    assert int(by_hand.padding.sum()) == 5


class Rms(nn.Module):
    """As transformers writes it."""

    def __init__(self, size: int, *, offset: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.variance_epsilon, self.offset = 1e-6, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1 + self.weight if self.offset else self.weight)).to(x.dtype)


class ChannelFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


FORMS = [
    (nn.LayerNorm(6), (2, 3, 6), ("layer", -1)),
    (nn.LayerNorm(6, elementwise_affine=False), (2, 3, 6), ("layer", -1)),
    (nn.LayerNorm(6, bias=False, eps=0.1), (5, 6), ("layer", -1)),
    (nn.RMSNorm(6), (2, 3, 6), ("rms", -1)),
    (Rms(6, offset=False), (2, 3, 6), ("rms", -1)),
    (Rms(6, offset=True), (2, 3, 6), ("rms", -1)),
    (ChannelFirst(6), (2, 6, 3, 3), ("layer", 1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("norm", "shape", "expected"), FORMS)
def test_forms(norm: nn.Module, shape: tuple[int, ...], expected: tuple[str, int], dtype: torch.dtype):
    torch.manual_seed(0)
    norm = norm.to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=dtype) * 3 + 1
    form = recognise("norm", norm, x, norm(x))
    assert (form.kind, form.dim, form.size) == (*expected, 6)
    error = (form.normalise(as_tokens(x, form.dim)) - as_tokens(norm(x), form.dim)).abs().max()
    assert error < (0.1 if dtype is torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [(nn.LayerNorm((3, 6)), Reason.AXIS), (nn.Sequential(nn.LayerNorm(6), nn.ReLU()), Reason.UNSUPPORTED_LAYER)],
)
def test_what_is_no_token_norm(norm: nn.Module, reason: Reason):
    norm.eps = 1e-5  # type: ignore[assignment]
    x = torch.randn(2, 3, 6)
    with pytest.raises(Refused) as refused:
        recognise("norm", norm, x, norm(x))
    assert refused.value.refusal.reason is reason


def test_listening_leaves_the_model_as_it_was():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train()
    heard: list[torch.Size] = []
    batches = Batches([torch.randn(2, 3, 8)], layer)
    listen(layer, {layer.norm1: lambda x, y, _: heard.append(x.shape)}, batches)
    assert heard == [(2, 3, 8)]
    assert layer.training
    assert layer.norm1.training
    assert not layer.norm1._forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()
