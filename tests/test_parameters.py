"""Choices of what to train, on small and on real networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import normfuse
from normfuse.parameters import parameter_groups


class Tower(nn.Module):
    """Three stages of different strides, a norm in each, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4))
        self.stage = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))
        self.last = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
        self.neck = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(self.last(self.stage(self.stem(x))).mean((2, 3))))


def names(model: nn.Module, groups: list[dict[str, object]]) -> list[str]:
    """Return the names of the grouped parameters, and check that these are the ones that are trained."""
    called = {id(p): name for name, p in model.named_parameters()}
    found = [called[id(p)] for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert sorted(found) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert len(set(found)) == len(found)
    return found


def chosen(which: str | list[str]) -> list[str]:
    model = Tower()
    return names(model, parameter_groups(model, which))


ALL = [name for name, _ in Tower().named_parameters()]
NORMS = ["stem.1.weight", "stem.1.bias", "stage.1.weight", "stage.1.bias", "last.1.weight", "last.1.bias"]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", ALL),
        ("norm", NORMS),
        ("head", ["head.weight", "head.bias"]),
        ("last-stage", [name for name in ALL if name.startswith(("last", "neck", "head"))]),
        ("bias", [name for name in ALL if name.endswith("bias")]),
        ("last.*", [name for name in ALL if name.startswith("last")]),
        ("last", [name for name in ALL if name.startswith("last")]),
        ("neck.weight", ["neck.weight"]),
        ("*.1", NORMS),
        (["head", "norm"], [*NORMS, "head.weight", "head.bias"]),
        (["head", "head.*"], ["head.weight", "head.bias"]),
    ],
    ids=str,
)
def test_choices(which: str | list[str], expected: list[str]):
    """In the order of the model, whatever the order of the choices."""
    assert chosen(which) == expected


BIASES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
        {"in_proj_bias", "bias_k", "bias_v", "out_proj.bias"},
    ),
    "attention of three widths": (lambda: nn.MultiheadAttention(8, 2, kdim=4), {"in_proj_bias", "out_proj.bias"}),
    "LSTM": (
        lambda: nn.LSTM(3, 4, 2, bidirectional=True),
        {f"bias_{way}_l{layer}{back}" for way in ("ih", "hh") for layer in (0, 1) for back in ("", "_reverse")},
    ),
    "GRU cell": (lambda: nn.GRUCell(3, 4), {"bias_ih", "bias_hh"}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        {"self_attn.in_proj_bias", "self_attn.out_proj.bias"}
        | {f"{layer}.bias" for layer in ("linear1", "linear2", "norm1", "norm2")},
    ),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2), "bias", dim=None),
        {"parametrizations.bias.original0", "parametrizations.bias.original1"},
    ),
    "bilinear": (lambda: nn.Bilinear(2, 2, 2), {"bias"}),
}


@pytest.mark.parametrize("name", BIASES)
def test_every_bias(name: str):
    make, expected = BIASES[name]
    model = make()
    assert set(names(model, parameter_groups(model, "bias"))) == expected


class Positions(nn.Module):
    """What attention adds by position, as Swin has it, beside biases of queries and values, as BEiT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.unbiased = nn.Parameter(torch.zeros(3))


def test_tables_of_positions_are_no_biases():
    model = Positions()
    assert names(model, parameter_groups(model, "bias")) == ["q_bias", "v_bias"]


def test_a_choice_thaws_what_another_froze():
    model = Tower()
    parameter_groups(model, "head")
    assert names(model, parameter_groups(model, "norm")) == NORMS


@pytest.mark.parametrize("which", ["nothing.*", "heads", ["head", "nothing"], "last-stage"])
def test_a_choice_that_names_nothing(which: str | list[str]):
    model = nn.Sequential(nn.Linear(2, 2)) if which == "last-stage" else Tower()
    with pytest.raises(ValueError, match="names no parameter of this model"):
        parameter_groups(model, which)
    assert all(p.requires_grad for p in model.parameters()), "nothing is frozen before the choice is known to be right"


def test_weight_decay_spares_what_has_one_axis():
    model = Tower()
    decayed, spared = parameter_groups(model, "last-stage", weight_decay=0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert {p.dim() for p in spared["params"]} == {1}
    assert sorted(names(model, [decayed, spared])) == sorted(chosen("last-stage"))
    torch.optim.AdamW([decayed, spared], 0.1).step()


def test_weight_decay_makes_no_empty_group():
    (group,) = parameter_groups(Tower(), "norm", weight_decay=0.1)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == 6


def test_shared_parameters_are_in_one_group_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert names(model, parameter_groups(model, "1")) == ["0.weight", "1.bias"]


def test_in_tune_mode_the_choices_are_the_same():
    model = normfuse.tune_mode(Tower())
    assert names(model, parameter_groups(model, "norm")) == NORMS
    assert names(model, parameter_groups(model, "last-stage")) == chosen("last-stage")


REAL = [
    ("torchvision", "resnet18", ("layer4.", "fc.")),
    ("torchvision", "mobilenet_v2", (*(f"features.{n}." for n in range(14, 19)), "classifier.")),
    ("timm", "resnet18", ("layer4.", "fc.")),
    ("timm", "efficientnet_b0", ("blocks.5.", "blocks.6.", "conv_head.", "bn2.", "classifier.")),
]


@pytest.mark.models
@pytest.mark.parametrize(("package", "name", "prefixes"), REAL)
def test_last_stage_of(package: str, name: str, prefixes: tuple[str, ...]):
    library = pytest.importorskip(package)
    with torch.device("meta"):
        model = library.create_model(name) if package == "timm" else library.models.get_model(name)
    expected = [key for key, _ in model.named_parameters() if key.startswith(prefixes)]
    assert names(model, parameter_groups(model, "last-stage")) == expected
    assert names(model, parameter_groups(model, "head")) == expected[-2:]
