"""What a ShiftQuant layer must survive: changes of its weight, copies, files, compilers, and wrong arguments."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from normfuse.quantization import Precision, ShiftQuantConv1d, ShiftQuantConv2d, ShiftQuantLinear
from tests.parity import error
from tests.quantization.operands import image, quantized

# the weight that is kept


def test_kept_weight_follows_every_change():
    layer = ShiftQuantLinear(6, 4).double().eval()
    x = image(3, 6)
    first = layer(x)
    kept = layer.prepared()
    assert layer.prepared() is kept
    assert torch.equal(layer(x), first)

    def assert_fresh() -> None:
        expected = quantized(nn.Linear(6, 4).double())
        expected.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), expected(x))
        assert not torch.equal(layer(x), first)

    with torch.no_grad():
        layer.weight.mul_(-1.5)
    assert_fresh()
    layer.load_state_dict({key: value + 1 for key, value in layer.state_dict().items()})
    assert_fresh()
    layer.weight = nn.Parameter(layer.weight.detach() * 3)
    assert_fresh()
    layer.weight.data = layer.weight.data.clone() * -2
    assert_fresh()
    layer.train()
    layer.weight.data.add_(1)  # not counted by torch
    layer.eval()
    assert_fresh()


def test_weight_is_quantized_once_in_eval_mode(monkeypatch: pytest.MonkeyPatch):
    layer, x = ShiftQuantConv2d(4, 4, 3, groups=2), image(1, 4, 5, 5, dtype=torch.float32)
    counted: list[bool] = []
    quantize = ShiftQuantConv2d._quantize

    def counting(self: Any, weight: Tensor, *, reused: bool) -> Any:
        counted.append(reused)
        return quantize(self, weight, reused=reused)

    monkeypatch.setattr(ShiftQuantConv2d, "_quantize", counting)
    for training, calls in ((True, 3), (False, 1)):
        layer.train(training)
        counted.clear()
        for _ in range(3):
            layer(x)
        assert len(counted) == calls


def test_parametrized_after_the_fact():
    layer = parametrizations.weight_norm(ShiftQuantLinear(6, 4)).eval()
    x = image(3, 6, dtype=torch.float32)
    before = layer(x)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    assert error((2 * (before - layer.bias)).detach(), (layer(x) - layer.bias).detach()) < 1e-5


def test_inference_mode():
    with torch.inference_mode():
        layer = ShiftQuantLinear(6, 4).eval()
        x = image(3, 6, dtype=torch.float32)
        assert torch.equal(layer(x), layer(x))


# copies, files, compilers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        ShiftQuantConv2d(3, 4, 3, padding=1), nn.Flatten(2), ShiftQuantConv1d(4, 2, 3), ShiftQuantLinear(23, 5)
    ).eval()


def test_copies_pickles_and_state():
    net, x = network(), image(2, 3, 5, 5, dtype=torch.float32)
    y = net(x)  # the quantized weights are now kept, and stay behind
    assert torch.equal(copy.deepcopy(net)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), y)
    assert net.state_dict().keys() == {f"{i}.{p}" for i in (0, 2, 3) for p in ("weight", "bias")}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it itself
@pytest.mark.parametrize("training", [True, False])
def test_compiles(training: bool):
    net, x = network().train(training), image(2, 3, 5, 5, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    assert torch.equal(compiled(x), net(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, 3)], ids=str)
def test_from_float_shares(layer: nn.Module):
    for bias in (True, False):
        layer.register_parameter("bias", layer.bias if bias else None)
        layer.train(bias)
        new = quantized(layer, Precision(4))
        assert isinstance(new, type(layer))
        assert new.weight is layer.weight
        assert new.bias is layer.bias
        assert new.training is bias
        assert "bits=4" in repr(new)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *args: None)
    return layer


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Doubled(2, 2), "does not compute what Linear"),
        (nn.Conv1d(2, 2, 1), "does not compute what Linear"),
        (parametrizations.weight_norm(nn.Linear(2, 2)), "parametrized"),
        (hooked(), "hooks"),
    ],
)
def test_from_float_refuses(module: nn.Module, message: str):
    with pytest.raises(TypeError, match=message):
        ShiftQuantLinear.from_float(module)


@pytest.mark.parametrize("options", [{"bits": 2}, {"groups": 0}, {"weight_groups": 0}, {"grad_bits": 9}, {"range": 0}])
def test_bad_precision(options: dict[str, Any]):
    with pytest.raises(ValueError, match="must be"):
        Precision(**options)


@pytest.mark.parametrize("shape", [(3, 5, 5, 5), (4, 5), (4, 2, 2)])
def test_bad_input(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"expected|exceeds"):
        ShiftQuantConv2d(4, 2, 3)(torch.ones(shape))
