"""A quantized model whose error is out of proportion to those of its layers is not returned."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import VerificationError, whole_model_error
from normfuse.calibration import Batch
from normfuse.passes.quantize import Quantize, QuantizedLayer
from normfuse.quantizing import run_quantize
from tests.cli.conftest import small_model
from tests.quantization.operands import image

DATA = image(12, 3, 8, 8, dtype=torch.float32)


class Net(nn.Module):
    """Two layers with something between them that ``broken`` says."""

    def __init__(self, between: str = "") -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        integers = not isinstance(self.first, nn.Conv2d)
        if self.between == "input as integers" and integers:
            x = x.to(torch.int8).float()
        x = F.relu(self.first(x)).flatten(1)
        if self.between == "scale forgotten" and integers:
            x = x / self.first.weight_scale.mean()
        if self.between == "other channels" and integers:
            x = x.flip(1)
        x = self.last(x[:, : self.first.weight_scale.nonzero().numel()] if self.between == "raises" and integers else x)
        return x * math.nan if self.between == "not a number" and integers else x


BROKEN = ["input as integers", "scale forgotten", "other channels", "not a number"]


@pytest.mark.parametrize("between", BROKEN)
@pytest.mark.parametrize("bits", [8, 6])
def test_what_breaks_beside_the_products_is_refused(between: str, bits: int):
    """A forward that asks what its layers are, and then computes something else."""
    torch.manual_seed(0)
    model = Net(between).eval()
    with pytest.raises(VerificationError, match=r"output 'output' of the quantized model is off by .* allow for"):
        normfuse.quantize(model, calibration=[DATA], bits=bits)
    assert normfuse.quantize(model, calibration=[DATA], bits=bits, verify=False)(DATA).shape == (12, 5)


@pytest.mark.parametrize("bits", [8, 6, 4, 3])
@pytest.mark.parametrize("method", ["shiftquant", "per-channel", "per-tensor"])
def test_rounding_alone_passes(bits: int, method: Any):
    for model in (Net().eval(), small_model()):
        one = Quantize([DATA], bits=bits, method=method)
        result = run_quantize(model, one)
        errors = whole_model_error.measured(model, result.model, [Batch(DATA, None)])
        assert 0 < errors["output"] < 3 * whole_model_error.explained(one.layers.values())


def test_in_place_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = Net("input as integers").train()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(VerificationError):
        normfuse.quantize(model, calibration=[DATA], inplace=True)
    assert [type(m) for m in model.modules()] == kinds
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_does_not_run_in_integers_is_refused():
    with pytest.raises(VerificationError, match="does not run on the calibration data: RuntimeError"):
        normfuse.quantize(Net("raises").eval(), calibration=[DATA])


def test_a_layer_that_is_called_often_explains_more():
    class Often(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                x = torch.tanh(self.layer(x))
            return x

    one = Quantize([torch.randn(20, 6)] * 3)
    run_quantize(Often(), one)
    assert one.layers["layer"].calls == 5
    alone = QuantizedLayer("layer", one.layers["layer"].error, 1.0, 1, 8)
    found = whole_model_error.explained(one.layers.values())
    assert found == pytest.approx(math.sqrt(5) * whole_model_error.explained([alone]))


def test_padding_and_what_cannot_be_compared_are_left_out():
    class Outputs(nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            self.noise = noise

        def forward(self, x: Tensor) -> dict[str, Any]:
            moved = x + self.noise * torch.tensor([0.0, 1.0])[None, :, None]  # the second token alone
            mask = torch.tensor([0.0, -math.inf])
            boxes = x[: 1 + int(self.noise)]
            return {"tokens": moved, "mask": mask, "boxes": boxes, "choice": moved.argmax(-1), "name": "net"}

    x = torch.ones(2, 2, 3)
    models = Outputs(0.0), Outputs(1.0)
    assert whole_model_error.measured(*models, [Batch(x, None)]) == {"tokens": math.sqrt(0.5), "mask": 0.0}
    padding = torch.tensor([[False, True], [False, True]])
    assert whole_model_error.measured(*models, [Batch(x, padding)])["tokens"] == 0.0
