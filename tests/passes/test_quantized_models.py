"""What the passes ``quantize`` and ``shiftquant`` give back: to train, to save, to run; and wrong arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normfuse
from normfuse.passes.quantize import Quantize
from normfuse.quantization import Precision, ShiftQuantConv2d, ShiftQuantLinear
from normfuse.quantization.calibrated import CalibratedLayer
from tests.cli.conftest import small_model
from tests.parity import assert_parity, error, outputs
from tests.quantization.operands import image

DATA = image(12, 3, 8, 8, dtype=torch.float32)


# what comes back


def test_training_keeps_parameters_ties_and_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weights = [id(p) for p in model.parameters()]
    quantized = normfuse.quantize(model, bits=6, groups=3, grad_bits=8, inplace=True)
    assert quantized is model
    assert [id(p) for p in model.parameters()] == weights
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], ShiftQuantConv2d)
    assert isinstance(model[4], ShiftQuantLinear)
    assert model[0].precision == Precision(6, 3, grad_bits=8)
    target = (DATA.mean((1, 2, 3)) > 0).long()
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(DATA), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_tied_weights_stay_tied_for_training():
    model = nn.ModuleDict({"words": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    net = nn.Sequential(model["words"], model["head"])
    net[1].weight = net[0].weight
    quantized = normfuse.quantize(net, example_inputs=torch.tensor([[1, 2]]))
    assert quantized[1].weight is quantized[0].weight
    fixed: Any = normfuse.quantize(net, calibration=[torch.tensor([[1, 2]])])
    assert fixed[0].weight.dtype == torch.float32
    assert fixed[1].integers.dtype == torch.int8


def test_a_calibrated_model_does_not_train_and_one_for_training_does():
    model = small_model()
    with pytest.raises(normfuse.DeployedModelError, match="fixed integers"):
        normfuse.quantize(model, calibration=[DATA]).train()
    assert normfuse.quantize(model).train().training


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_load_again(tmp_path: Path, calibrated: bool, suffix: str):
    model = small_model()
    quantized = normfuse.quantize(model, calibration=[DATA] if calibrated else None, bits=6)
    path = tmp_path / f"model{suffix}"
    normfuse.save(quantized, path)
    for source in ([None] if suffix == ".pt" else []) + [copy.deepcopy(model)]:
        loaded = normfuse.load(path, model=source)
        assert [type(m) for m in loaded.modules()] == [type(m) for m in quantized.modules()]
        assert_parity(quantized, loaded, DATA, tolerance=0.0)
        if not calibrated:
            assert loaded[0].precision == Precision(6, 4)
            loaded.train()(DATA).sum().backward()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_trained_on_integers_is_calibrated_like_any_other(tmp_path: Path, inplace: bool):
    model = small_model()
    trained = normfuse.quantize(model, bits=5).train()
    trained(DATA).sum().backward()
    fixed = normfuse.quantize(trained, calibration=[DATA], inplace=inplace)
    assert (fixed is trained) is inplace
    assert len([m for m in fixed.modules() if isinstance(m, CalibratedLayer)]) == 3
    assert not [m for m in fixed.modules() if isinstance(m, nn.BatchNorm2d)]
    normfuse.save(fixed, tmp_path / "model.safetensors")
    loaded = normfuse.load(tmp_path / "model.safetensors", model=model)
    assert_parity(fixed, loaded, DATA, tolerance=0.0)
    if not inplace:
        assert isinstance(trained[0], ShiftQuantConv2d)
        assert error(outputs(trained, DATA)[0], outputs(fixed, DATA)[0]) < 0.2


def test_half_precision_and_in_place():
    model = small_model().half().to(torch.bfloat16)
    x = DATA.to(torch.bfloat16)
    quantized = normfuse.quantize(model, calibration=[x], inplace=True)
    assert quantized is model
    assert quantized[0].weight_scale.dtype == torch.float32
    assert quantized(x).dtype == torch.bfloat16


class Asking(nn.Module):
    """A network that casts its input to what ``ask`` answers, as those of transformers ask a layer or the model."""

    def __init__(self, ask: Callable[[Any], torch.dtype]) -> None:
        super().__init__()
        self.projection, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.projection(x.to(self.ask(self))).flatten(2).mean(2))


ASKED: dict[str, Callable[[Any], torch.dtype]] = {
    "weight of the first layer": lambda model: model.projection.weight.dtype,
    "bias of the first layer": lambda model: model.projection.bias.dtype,
    "weight of the last layer": lambda model: model.head.weight.dtype,
    "first parameter": lambda model: next(model.parameters()).dtype,
    "first of floating point": lambda model: next(p.dtype for p in model.parameters() if p.is_floating_point()),
    "a new tensor": lambda model: model.projection.weight.new_zeros(1).dtype,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("asked", ASKED)
def test_models_that_ask_for_a_dtype(asked: str, calibrated: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    model = Asking(ASKED[asked]).to(dtype).eval()
    data = torch.rand(6, 3, 16, 16).to(dtype) * 2 - 1  # as integers, all would be zero
    options: dict[str, Any] = {"calibration": [data]} if calibrated else {"example_inputs": data}
    quantized = normfuse.quantize(model, **options)
    assert quantized(data.float()).dtype == dtype
    assert error(model(data.float()), quantized(data.float())) < 0.05


def test_loader_of_pairs_and_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(10 * self.layer(x))

    torch.manual_seed(0)
    x = torch.randn(32, 4)
    loader = DataLoader(TensorDataset(x, torch.zeros(32)), batch_size=8)
    model = Twice()
    quantized: Any = normfuse.quantize(model, calibration=loader)
    most = max(float(x.abs().max()), float((10 * model.layer(x)).detach().abs().max()))
    assert float(quantized.layer.input_scale) == pytest.approx(most / 127)


# arguments


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "int4"}, "method is one of"),
        ({"method": "per-channel"}, "needs calibration data"),
        ({"bits": 9}, "bits must be"),
        ({"groups": 0}, "groups must be"),
        ({"calibration": [DATA], "grad_bits": 8}, "grad_bits is for training"),
        ({"calibration": [DATA], "bits": 2}, "bits must be"),
        ({"calibration": [DATA], "range": 0.0}, "range must be"),
        ({"calibration": []}, "empty"),
        ({"calibration": iter([DATA])}, "not an iterator"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        normfuse.quantize(small_model(), **options)


def test_the_pass_without_data():
    with pytest.raises(ValueError, match="needs calibration data"):
        normfuse.apply(small_model(), ["quantize"])
    with pytest.raises(ValueError, match="method is one of"):
        Quantize([DATA], method="int4")  # type: ignore[arg-type]
