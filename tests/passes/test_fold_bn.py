"""``fold-bn`` over every kind of convolution, and every reason it refuses for."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse import api
from normfuse.base import Reason
from normfuse.layers.deployed import OneRank
from normfuse.report import Outcome, Status
from tests.parity import assert_parity, randomize_norms
from tests.zoo import ZOO, layers, sharing
from tests.zoo.trap import image

CONVS = [
    *itertools.product(["Conv"], [1, 2, 3], [1, 2, 4], ["zeros", "reflect", "replicate", "circular"]),
    *itertools.product(["ConvTranspose"], [1, 2, 3], [1, 2, 4], ["zeros"]),
]
LAYOUTS = {1: [torch.contiguous_format], 2: [torch.contiguous_format, torch.channels_last],
           3: [torch.contiguous_format, torch.channels_last_3d]}  # fmt: skip
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""What one more rounding of each weight may do to an output, relative to the largest one."""


def outcome(model: nn.Module, inputs: Any, **options: Any) -> Outcome:
    """Return what became of the only norm of a model."""
    (only,) = normfuse.inspect(model, example_inputs=inputs, **options).norms
    return only


def reason(model: nn.Module, inputs: Any, **options: Any) -> Reason | None:
    found = outcome(model, inputs, **options)
    return found.refusal.reason if found.refusal else None


def conv_and_norm(kind: str, dims: int, groups: int, padding: str, *, bias: bool, affine: bool) -> nn.Sequential:
    torch.manual_seed(0)
    conv = getattr(nn, f"{kind}{dims}d")(4, 8, 3, stride=2, padding=1, groups=groups, bias=bias, padding_mode=padding)
    norm = getattr(nn, f"BatchNorm{dims}d")(8, affine=affine)
    return randomize_norms(nn.Sequential(conv, norm).double().eval())  # type: ignore[return-value]


@pytest.mark.parametrize(("kind", "dims", "groups", "padding"), CONVS)
def test_every_convolution(kind: str, dims: int, groups: int, padding: str):
    """With and without bias and affine, in every memory format: exact in float64."""
    for bias, affine, layout in itertools.product([True, False], [True, False], LAYOUTS[dims]):
        model = conv_and_norm(kind, dims, groups, padding, bias=bias, affine=affine).to(memory_format=layout)  # type: ignore[call-overload]
        inputs = image(2, 4, *[5] * dims).contiguous(memory_format=layout)
        result = api.apply(model, ["fold-bn"], example_inputs=inputs)
        assert isinstance(result.model[1], nn.Identity)
        assert_parity(model, result.model, inputs)
        assert result.model[0].weight.stride() == model[0].weight.stride()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("kind", "dims", "groups", "padding"), [c for c in CONVS if c[3] in ("zeros", "circular")])
def test_every_convolution_in_lower_precision(kind: str, dims: int, groups: int, padding: str, dtype: torch.dtype):
    """Folded in float64 and rounded once: the weights, run in float64, are as close as that rounding allows."""
    model = conv_and_norm(kind, dims, groups, padding, bias=True, affine=True).to(dtype)
    inputs = image(2, 4, *[5] * dims)
    folded = api.fold_bn(model, example_inputs=inputs.to(dtype))
    assert {p.dtype for p in folded.parameters()} == {dtype}
    assert isinstance(folded[1], nn.Identity)
    assert_parity(model.double(), folded.double(), inputs, tolerance=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, *ROUNDING], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_linear(dtype: torch.dtype, bias: bool, affine: bool):
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.BatchNorm1d(6, affine=affine)).to(dtype).eval()
    randomize_norms(model)
    folded = api.fold_bn(model, example_inputs=image(3, 5, dtype=dtype))
    assert isinstance(folded[1], nn.Identity)
    assert_parity(model.double(), folded.double(), image(3, 5), tolerance=ROUNDING.get(dtype))


# what is left where the norm was


def test_activation_of_a_norm_class_stays():
    model = ZOO["norm_with_activation"].build()
    folded = api.fold_bn(model, example_inputs=image())
    assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in folded.modules())
    assert any(isinstance(m, nn.ReLU) for m in folded.modules())


def test_functional_norm_becomes_neutral_and_is_not_folded_again():
    model = ZOO["FunctionalLayers"].build()
    folded = api.fold_bn(model, example_inputs=image())
    assert torch.equal(folded.get_buffer("running_mean"), torch.zeros(4).double())
    assert reason(folded, image()) is Reason.NOT_CHEAPER


def test_norm_under_two_names_goes_from_both():
    folded = api.fold_bn(ZOO["NormUnderTwoNames"].build(), example_inputs=image())
    assert isinstance(folded.bn, nn.Identity)
    assert folded.alias is folded.bn


def test_partners_name_the_layers_that_absorb():
    report = normfuse.inspect(ZOO["ConcatOfConvs"].build(), example_inputs=image())
    assert report.applied[0].partners == ("conv", "conv2")


# reasons that need more than a model and an input


class EightBit(Tensor):
    """A weight kept in eight bits, as quantization libraries make them: a tensor subclass that reads as floats."""

    codes: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor) -> EightBit:
        self = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float64)  # type: ignore[attr-defined]
        self.codes = codes
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        plain = [a.codes.double() / 64 if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        return nn.Parameter(EightBit(self.codes.clone()), requires_grad=False)


def test_quantized_weight():
    model = layers.chain(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().eval()
    model[0].weight = nn.Parameter(EightBit(torch.randint(-99, 99, (4, 4), dtype=torch.int8)), requires_grad=False)
    randomize_norms(model[1])
    assert reason(model, image(3, 4)) is Reason.QUANTIZED


def test_lazy_layer_without_values():
    model = layers.chain(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(normfuse.CaptureError, match=r"0 \(LazyConv2d\) has no values yet"):
        api.fold_bn(model, example_inputs=image(dtype=torch.float32))
    assert isinstance(model[0], nn.LazyConv2d)


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()], ids=["conv", "norm"])
def test_lazy_layer_without_inputs(lazy: nn.Module):
    pair = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    pair[isinstance(lazy, nn.LazyBatchNorm2d)] = lazy
    assert reason(layers.chain(*pair).eval(), None) is Reason.UNINITIALIZED


def test_rank_is_not_known_without_inputs():
    model = layers.chain(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().eval()
    assert reason(model, None) is Reason.RANK_UNKNOWN
    assert reason(model, image(3, 4)) is None


class Untraceable(sharing.ConvBN):
    """Which way it goes depends on the input: only its children can be traced without one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = sharing.ConvBN()
        del self.conv, self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() > 0 else self.block(-x)


def test_partial_capture():
    model = randomize_norms(Untraceable().double().eval())
    assert reason(model, None) is Reason.PARTIAL_CAPTURE
    assert reason(model, image()) is None


def test_excluded():
    model = ZOO["float32"].build()
    assert reason(model, image(dtype=torch.float32), exclude=["1"]) is Reason.EXCLUDED


def test_refusal_names_the_thing_and_the_remedy():
    found = outcome(ZOO["SharedConv"].build(), image())
    assert found.refusal is not None
    assert found.refusal.reason is Reason.SHARED_MODULE
    assert "conv is called 2 times" in found.refusal.detail
    assert "duplicate_shared" in found.refusal.hint


def test_failure_of_one_match_leaves_the_model_untouched():
    """A refused norm changes no weight: every new tensor is computed before the first is assigned."""
    model = ZOO["ForwardOneBranchStays"].build()
    folded = api.fold_bn(model, example_inputs=image())
    for key, value in model.state_dict().items():
        assert torch.equal(value, folded.state_dict()[key])


@pytest.mark.parametrize("name", ["SharedConv", "SharedConvTwoNorms", "TiedParameters"])
def test_duplicating_shared_layers_lets_them_fold(name: str):
    model = ZOO[name].build()
    result = api.apply(model, ["fold-bn"], example_inputs=image(), duplicate_shared=True)
    assert all(o.status is Status.APPLIED for o in result.report.norms)
    assert_parity(model, result.model, image())
    assert_parity(model, copy.deepcopy(result.model), image())


class DoublesNorm(nn.BatchNorm2d):
    """A norm that does more than its class, behind a check of sizes that no tracer follows."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class DoublesInstanceNorm(nn.InstanceNorm2d):
    """The same of an InstanceNorm with running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True, track_running_stats=True)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize("norm", [DoublesNorm, DoublesInstanceNorm])
def test_norm_whose_own_forward_cannot_be_traced(norm: type[nn.Module]):
    """Neither its map nor the map of a norm behind it may go where its forward does more than the norm."""
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.BatchNorm2d(4)).double().eval())
    for inputs in (None, image(2, 3, 6, 6)):
        result = api.apply(model, api.EXACT_PASSES, example_inputs=inputs)
        assert_parity(model, result.model, image(2, 3, 6, 6))
    (first, _) = normfuse.inspect(model).norms
    text = f"1 ({norm.__name__}) has its own forward, which cannot be traced"
    assert first.refusal == normfuse.Refusal(Reason.FORWARD_OVERRIDDEN, text, "pass example_inputs")


class NormsAroundAFunction(nn.Module):
    """The function is handed a bias that is None, until a fold gives the layer one."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], layer: nn.Module, *norms: nn.Module) -> None:
        super().__init__()
        self.call, self.layer, self.norms = call, layer, nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        front, first, second = self.norms
        return second(first(self.call(self.layer, front(x))))


class Gate(nn.Module):
    """Multiplies by what is computed of a parameter at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate.sigmoid()


BIAS_OF_NONE: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[..., nn.Module]]] = {
    "by position": (lambda c, x: F.conv2d(x, c.weight, c.bias), nn.Conv2d),
    "by keyword": (lambda c, x: F.conv2d(x, weight=c.weight, bias=c.bias), nn.Conv2d),
    "its method": (lambda c, x: c._conv_forward(x, c.weight, c.bias), nn.Conv2d),
    "transposed": (lambda c, x: F.conv_transpose2d(x, c.weight, c.bias), nn.ConvTranspose2d),
    "module": (lambda c, x: c(x), nn.Conv2d),
}


@pytest.mark.parametrize("kind", BIAS_OF_NONE)
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("front", [nn.Identity, lambda: nn.GroupNorm(1, 4), Gate], ids=["behind", "around", "gated"])
def test_norms_share_the_bias_that_the_first_brings(kind: str, recorded: bool, front: Callable[[], nn.Module]):
    call, layer = BIAS_OF_NONE[kind]
    norms = (front(), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model = randomize_norms(NormsAroundAFunction(call, layer(4, 4, 1, bias=False), *norms).double().eval())
    result = api.apply(model, api.EXACT_PASSES, example_inputs=image(2, 4, 6, 6) if recorded else None)
    assert [o.status for o in result.report.norms[-2:]] == [Status.APPLIED] * 2
    assert_parity(model, result.model, image(2, 4, 6, 6))


class ActivatedNorm1d(nn.BatchNorm1d):
    """A norm with what follows it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        args = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(F.batch_norm(input, *args, eps=self.eps))


class AsksItsNorm1d(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return self[1](self[0](input)) + self[1].eps


SIGNALS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)),
    "synchronised": lambda: nn.Sequential(nn.ConvTranspose1d(3, 5, 3), nn.SyncBatchNorm(5)),
    "activated": lambda: nn.Sequential(nn.Conv1d(3, 5, 3), ActivatedNorm1d(5)),
    "asked": lambda: AsksItsNorm1d(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_traced_norm_of_signals_takes_batches_only(name: str, tmp_path: Path):
    """Of as many channels as steps, a signal without a batch is normalized step by step, which no example told."""
    model = randomize_norms(SIGNALS[name]().double().eval())
    folded = normfuse.fold(model)
    batch, signal = image(2, 3, 7), image(3, 3 if name == "synchronised" else 7)
    normfuse.save(folded, tmp_path / "signals.pt")
    again = normfuse.load(tmp_path / "signals.pt", model=model)
    for one in (folded, copy.deepcopy(folded), again):
        assert_parity(model, one, batch)
        with pytest.raises(normfuse.DeployedModelError, match="3 axes where this one has 2"):
            one(signal)
    assert torch.equal(torch.fx.symbolic_trace(folded)(batch), folded(batch))
    known = normfuse.fold(model, example_inputs=batch)
    assert not any(isinstance(module, OneRank) for module in known.modules())


class ByFunction2d(nn.BatchNorm2d):
    """Is replaced as a whole when its norm is folded, so that what its function was called on is gone."""

    def forward(self, input: Tensor) -> Tensor:
        args = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(input, *args, eps=self.eps)


@pytest.mark.parametrize("first", [nn.BatchNorm2d, ByFunction2d])
@pytest.mark.parametrize("behind", [nn.Sigmoid, lambda: nn.Conv2d(4, 2, 1)], ids=["nothing", "a layer"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_norm_in_front_of_one_that_was_folded(
    first: type[nn.Module], behind: Callable[[], nn.Module], recorded: bool
):
    """The second goes into the gain of the first, which is then asked again where its map could go."""
    model = randomize_norms(nn.Sequential(first(4), ByFunction2d(4), behind()).double().eval())
    result = api.apply(model, api.EXACT_PASSES, example_inputs=image() if recorded else None)
    assert result.report.norms[1].status is Status.APPLIED
    assert_parity(model, result.model, image())


class ByFunctionAlone(nn.Module):
    """Holds a norm where nothing else could be put, and calls a function on what it stores."""

    def __init__(self, hold: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.held = hold(self.bn)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)


@pytest.mark.parametrize("hold", [functools.partial, lambda bn: bn.forward, lambda bn: lambda x: bn(x)])
def test_a_norm_whose_function_is_called_may_be_held_anywhere(hold: Callable[[nn.Module], Any]):
    """Its module stays, with other values."""
    model = randomize_norms(ByFunctionAlone(hold).double().eval())
    result = api.apply(model, ["fold-bn"], example_inputs=image())
    assert result.report.norms[0].status is Status.APPLIED
    assert_parity(model, result.model, image())


def test_traced_frozen_norm_takes_batches_of_pictures_only():
    """Its constants would broadcast a picture without a batch to one of four axes."""
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    for tensor in frozen.buffers():
        torch.nn.init.uniform_(tensor, 0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), frozen).double().eval()
    folded = normfuse.fold(model)
    assert_parity(model, folded, image(2, 3, 5, 5))
    with pytest.raises(normfuse.DeployedModelError, match="4 axes where this one has 3"):
        folded(image(3, 5, 5))
