"""The pass ``tune-mode``: which norms it pairs with which layers."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

import normfuse
from normfuse.capture import unwrap
from tests.gradients import assert_same, assert_tunes, gradients, hard_norms, paired, set_mode
from tests.zoo import ZOO, layers
from tests.zoo.sharing import ConvBN
from tests.zoo.trap import image

NOT_DIFFERENTIABLE = {"WriteOverNothing", "NumpyOfConv", "ThroughNumpy"}
COMPILED = {"Compiled"}  # tests/test_tune_mode_transforms.py
NOT_FINITE = {"out_of_range", "broken_bias"}


# the models made to break a fold


@pytest.mark.parametrize("name", sorted(ZOO.keys() - NOT_DIFFERENTIABLE - COMPILED - NOT_FINITE))
def test_zoo(name: str):
    """In both modes, read both ways: the outputs, and the gradients of everything, are those of eval mode."""
    trap = ZOO[name]
    reference = unwrap(trap.build())
    expected = {mode: gradients(set_mode(reference, mode), trap.inputs()) for mode in (False, True)}
    dtypes = {tensor.dtype for tensor in expected[False].values() if tensor is not None}
    for example in (None, trap.inputs()):
        model = trap.build()
        normfuse.tune_mode(model, example_inputs=example)
        inner = unwrap(model)
        for mode, values in expected.items():
            tolerance = 1e-10 if dtypes <= {torch.float64} else 1e-2
            assert_same(values, gradients(inner.train(mode), trap.inputs()), tolerance)


@pytest.mark.parametrize("name", sorted(NOT_FINITE))
def test_zoo_of_values_that_are_not_finite(name: str):
    """An infinite bias stays one; a scaled weight beyond float16 is refused, so the value stays finite."""
    with torch.no_grad():
        expected, found = (
            model(ZOO[name].inputs())
            for model in (ZOO[name].build(), normfuse.tune_mode(ZOO[name].build(), example_inputs=ZOO[name].inputs()))
        )
    assert torch.allclose(expected, found)


# layers

PADDINGS = ["zeros", "reflect", "replicate", "circular"]
CONVS = [
    *itertools.product(["Conv"], [1, 2, 3], [1, 4], PADDINGS),
    *itertools.product(["ConvTranspose"], [1, 2, 3], [1, 2], ["zeros"]),
]


def conv_and_norm(kind: str, dims: int, *, affine: bool = True, eps: float = 1e-5, **conv: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layer = getattr(nn, f"{kind}{dims}d")(4, 8, **({"kernel_size": 3, "padding": 1} | conv))
    norm = getattr(nn, f"BatchNorm{dims}d")(8, affine=affine, eps=eps)
    return hard_norms(nn.Sequential(layer, norm, nn.Sigmoid()).double())  # type: ignore[return-value]


@pytest.mark.parametrize(("kind", "dims", "groups", "padding"), CONVS)
def test_every_convolution(kind: str, dims: int, groups: int, padding: str):
    for bias, affine in ((True, True), (False, True), (True, False)) if padding == "zeros" else ((False, False),):
        options = {"groups": groups, "padding_mode": padding, "bias": bias, "stride": 2}
        model = conv_and_norm(kind, dims, affine=affine, **options)
        assert paired(model) == {"1": ("0",)}
        assert_tunes(model, image(2, 4, *[5] * dims), recorded=dims == 1, training=False)


def takes_no_eps() -> bool:
    """Whether torch computes a norm without eps; version 2.11 does not."""
    try:
        nn.BatchNorm1d(1, eps=0.0).eval()(torch.ones(2, 1))
    except ValueError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same", "kernel_size": 4},
        {"padding": "same", "kernel_size": (2, 3), "dilation": (1, 2)},
        {"padding": "same", "kernel_size": 2, "padding_mode": "circular"},
        {"padding": "valid", "dilation": 2},
        {"groups": 4, "dilation": 2, "padding": 2},
        pytest.param({"eps": 0.0}, marks=pytest.mark.skipif(not takes_no_eps(), reason="torch refuses an eps of 0")),
        {"eps": 0.5},
    ],
    ids=str,
)
def test_geometry(options: dict[str, Any]):
    model = conv_and_norm("Conv", 2, **options)
    assert paired(model) == {"1": ("0",)}
    assert_tunes(model, image(2, 4, 7, 6))


class OutputSize(nn.Module):
    """A transposed convolution that is told the size of its output; two sizes are possible."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x, output_size=[12, 11])) + self.bn(self.conv(x, [12, 11]))


class Keywords(ConvBN):
    """Layers are called by the names of their arguments."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(input=x))


class Unbatched(ConvBN):
    """The convolution sees one image without a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)[None])


class Head(nn.Module):
    """RetinaNet's: one convolution and one norm for all levels of a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.block(level) for level in (x, F.avg_pool2d(x, 2), self.block(F.max_pool2d(x, 2)))]


def same_conv() -> nn.Module:
    from timm.layers.conv2d_same import Conv2dSame

    return layers.chain(Conv2dSame(4, 8, 4, stride=2, dilation=1, groups=2), nn.BatchNorm2d(8))


def lazy() -> nn.Module:
    model = layers.chain(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d())
    model(image(dtype=torch.float32))
    return model


def frozen_of_timm() -> nn.Module:
    from timm.layers.norm_act import FrozenBatchNormAct2d

    return layers.chain(nn.Conv2d(4, 4, 3), FrozenBatchNormAct2d(4))


def activated() -> nn.Module:
    from timm.layers.norm_act import BatchNormAct2d

    return layers.chain(nn.Conv2d(4, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Identity))


PAIRED = {
    "output size": (OutputSize, ("conv",)),
    "keywords": (Keywords, ("conv",)),
    "shared head": (Head, ("block.0",)),
    "Conv2dSame": (same_conv, ("0",)),
    "lazy": (lazy, ("0",)),
    "SyncBatchNorm": (lambda: layers.chain(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), ("0",)),
    "FrozenBatchNorm2d": (lambda: layers.chain(nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6, eps=1e-3)), ("0",)),
    "FrozenBatchNormAct2d": (frozen_of_timm, ("0",)),
    "BatchNormAct2d": (activated, ("0",)),
    "concatenated": (ZOO["ConcatOfConvs"].build, ("conv", "conv2")),
    "two convolutions": (ZOO["SharedNorm"].build, ("conv", "conv2")),
    "block called twice": (ZOO["SharedBlock"].build, ("conv",)),
    "tied weight": (ZOO["TiedParameters"].build, ("conv",)),
    "weight read directly": (ZOO["WeightReadDirectly"].build, ("conv",)),
}


@pytest.mark.parametrize("name", PAIRED)
def test_paired_layers(name: str):
    build, partners = PAIRED[name]
    model = hard_norms(build().double())
    assert list(paired(model).values()) == [partners]
    assert_tunes(model, image())


@pytest.mark.parametrize("name", ["channel_shuffle", "linear_transposed", "linear_flattened", "linear_without_affine"])
def test_routes_that_need_an_example(name: str):
    """What a reshape does to the channels is known once the shapes are."""
    model = hard_norms(ZOO[name].build())
    assert len(paired(model, ZOO[name].inputs())) == 1
    assert_tunes(model, ZOO[name].inputs())


def test_unbatched_convolution():
    model = hard_norms(Unbatched().double())
    assert paired(model, image()[0]) == {"bn": ("conv",)}
    assert_tunes(model, image()[0], traced=False)


# layers whose values a norm takes by their rank


class Projector(nn.Module):
    """A small backbone and the projection head of self-supervised learning, whose last norm has no gain."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        layers = [nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers, nn.Linear(8, 5), nn.BatchNorm1d(5, affine=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(torch.flatten(self.backbone(x), 1))


class Tabular(nn.Module):
    """Columns of numbers beside embedded categories, in layers that are called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 6), nn.Linear(6, 6)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(6), nn.SyncBatchNorm(6)])
        self.table = nn.Embedding(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.table(torch.ones(1, dtype=torch.long)).expand(x.shape[0], -1)], 1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.selu(norm(layer(x)))
        return x


class Linear(nn.Module):
    """A linear layer and a norm of ``(N, C)``, which takes ``(N, L, C)`` too, and normalizes another axis then."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 6), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, tuple[str, ...]]]] = {
    "multilayer perceptron": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU6(), nn.Linear(6, 3)),
        (3, 5),
        {"1": ("0",)},
    ),
    "projector": (
        Projector,
        (3, 4, 5, 5),
        {"backbone.1": ("backbone.0",), "projector.1": ("projector.0",), "projector.4": ("projector.3",)},
    ),
    "tabular": (Tabular, (3, 5), {"norms.0": ("layers.0",), "norms.1": ("layers.1",)}),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_are_paired_without_inputs(name: str):
    make, shape, expected = LINEAR[name]
    model = hard_norms(make().double())
    assert paired(model) == paired(model, image(*shape)) == expected
    assert_tunes(model, image(*shape))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("example", [None, (3, 5)], ids=str)
def test_the_rank_of_each_call_decides(norm: type[nn.Module], example: tuple[int, ...] | None):
    """Found with one rank, or with none; a call of another rank is eval mode's, and so are its errors."""
    model = hard_norms(Linear(norm(6)).double().eval())
    given = None if example is None else image(*example)
    tuned = normfuse.tune_mode(copy.deepcopy(model), example_inputs=given).train()
    for one in (tuned, copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        for shape in ((3, 5), (3, 6, 5), (1, 5)):
            assert_same(gradients(model, image(*shape)), gradients(one, image(*shape)))
        for shape in ((3, 7, 5), (5,)):
            errors = [raised(m, image(*shape)) for m in (model, one)]
            assert errors[0] == errors[1]


def test_an_unbatched_call_of_a_convolution():
    """BatchNorm1d takes (C, L) for (N, C)."""
    model = hard_norms(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)).double().eval())
    tuned = normfuse.tune_mode(copy.deepcopy(model))
    for shape in ((2, 4, 7), (4, 8)):
        assert_same(gradients(model, image(*shape)), gradients(tuned, image(*shape)))
    assert raised(model, image(4, 7)) == raised(tuned, image(4, 7))


def raised(model: nn.Module, x: Tensor) -> str:
    with pytest.raises((RuntimeError, ValueError)) as info:
        model(x)
    return str(info.value)


def test_a_value_that_two_read_is_not_paired():
    class Twice(Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.norm(y) + y

    assert paired(Twice(nn.BatchNorm1d(6))) == {}


# the published cases of the peers


class Backbone(nn.Module):
    """MMEngine's: a plain pair, a convolution called twice, a norm called twice."""

    def __init__(self) -> None:
        super().__init__()
        for index in (1, 2, 3):
            self.add_module(f"conv{index}", nn.Conv2d(6, 6, 6))
            self.add_module(f"bn{index}", nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(self.conv2(x)))
        return self.bn3(self.bn3(self.conv3(x)))


def test_mmengine():
    """Only the plain pair: a pair of which one call is different would need two weights, or two norms."""
    model = hard_norms(Backbone().double())
    assert paired(model) == {"bn1": ("conv1",)}
    assert_tunes(model, image(1, 6, 28, 28))


class Several(nn.Module):
    """Inductor's: several layers of which each is normalized by its own norm, or by one for all."""

    def __init__(self, kind: str, bias: bool, norms: int) -> None:
        super().__init__()
        dims = 1 if kind == "Linear" else int(kind[-2])
        self.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.Linear(4, 4, bias) if kind == "Linear" else getattr(nn, kind)(4, 4, 3, padding=1, bias=bias)
            self.layers.append(layer)
        self.norms = nn.ModuleList(getattr(nn, f"BatchNorm{dims}d")(4) for _ in range(norms))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = self.norms[index % len(self.norms)](layer(x)).relu()
        return x


INDUCTOR = ["Linear", *(f"Conv{t}{n}d" for t in ("", "Transpose") for n in (1, 2, 3))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", INDUCTOR)
def test_inductor(kind: str, bias: bool):
    shape = (3, 4) if kind == "Linear" else (2, 4, *[4] * int(kind[-2]))
    for norms in (1, 2):
        model = hard_norms(Several(kind, bias, norms).double())
        partners = [name for names in paired(model, image(*shape)).values() for name in names]
        assert partners == ["layers.0", "layers.1"]
        assert_tunes(model, image(*shape), traced=False)
