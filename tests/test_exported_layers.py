"""Exported programs: read with the layers they were exported from, they fold as their sources do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

import normfuse
from normfuse import api
from normfuse.errors import CaptureError, DeployedModelError, NormfuseError
from normfuse.exported_modules import as_module
from tests.parity import Inputs, assert_parity, randomize_norms
from tests.zoo.trap import image

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
TOKENS, IMAGE = image(2, 5, 4), image(2, 4, 6, 6)
FORMS = pytest.mark.parametrize("form", ["exported", "decomposed", "file"])


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.out = nn.Embedding(9, 4, padding_idx=0), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.norm(self.words(ids).transpose(1, 2)).transpose(1, 2))


class Same(nn.Module):
    """A convolution that pads to the size of its input, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    **{
        f"{kind}{n}d": (
            lambda kind=kind, n=n: nn.Sequential(
                getattr(nn, f"{kind}{n}d")(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
                getattr(nn, f"BatchNorm{n}d")(6),
                nn.Sigmoid(),
                getattr(nn, f"{kind}{n}d")(6, 2, 1),
            ),
            image(2, 4, *[6] * n),
        )
        for kind in ("Conv", "ConvTranspose")
        for n in (1, 2, 3)
    },
    "Linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()), image(3, 4)),
    "LayerNorm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), TOKENS),
    "RMSNorm": (lambda: nn.Sequential(nn.RMSNorm(4, eps=0.1), nn.Linear(4, 3)), TOKENS),
    "GroupNorm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1, bias=False)), IMAGE),
    "without gain": (lambda: nn.Sequential(nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3, affine=False)), IMAGE),
    "reflected": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(3)),
        IMAGE,
    ),
    "Embedding": (Embeds, torch.tensor([[1, 2, 3], [0, 7, 8]])),
    "shared": (Same, IMAGE),
}


def program_of(model: nn.Module, inputs: Inputs, form: str, path: Path) -> ExportedProgram | nn.Module:
    program = torch.export.export(model, (inputs,))
    if form == "file":
        torch.export.save(program, path / "model.pt2")
        return normfuse.load(path / "model.pt2")
    return program.run_decompositions() if form == "decomposed" else program


@FORMS
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "traced"])
@pytest.mark.parametrize("name", MODELS)
def test_a_program_folds_as_its_source_does(name: str, recorded: bool, form: str, tmp_path: Path):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    source = randomize_norms(build().double().eval())
    program = program_of(source, inputs, form, tmp_path)
    example = inputs if recorded else None
    result = api.apply(program, api.EXACT_PASSES, example_inputs=example)  # type: ignore[type-var]
    expected = api.inspect(source, api.EXACT_PASSES, example_inputs=example)
    assert [norm.status for norm in result.report.norms] == [norm.status for norm in expected.norms]
    assert_parity(source, result.model, inputs)


@FORMS
def test_names_and_tensors_are_those_of_the_source(form: str, tmp_path: Path):
    build, inputs = MODELS["Conv2d"]
    source = randomize_norms(build().double().eval())
    program = program_of(source, inputs, form, tmp_path)
    module = program if isinstance(program, nn.Module) else as_module(program)
    assert module.state_dict().keys() == source.state_dict().keys()
    assert repr(module.get_submodule("0")) == repr(source.get_submodule("0"))
    assert repr(module.get_submodule("1")) == repr(source.get_submodule("1"))
    assert_parity(source, module, inputs)


def test_a_program_is_not_changed():
    build, inputs = MODELS["Conv2d"]
    program = torch.export.export(randomize_norms(build().double().eval()), (inputs,))
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    folded = normfuse.fold(program, example_inputs=inputs, inplace=True)  # type: ignore[type-var]
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict.items())
    assert normfuse.verify(program, folded, inputs)  # type: ignore[arg-type]
    with pytest.raises(DeployedModelError):
        folded.train()


def test_what_trains_asks_for_the_python_module():
    program = torch.export.export(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double().eval(), (IMAGE,))
    for entry in (normfuse.tune_mode, lambda p: normfuse.swap_norms(p, "l1", [IMAGE])):
        with pytest.raises(CaptureError, match="pass the Python module"):
            entry(program)


class Tied(nn.Module):
    """A weight that a function uses as well, so that no layer stands for it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight, stride=1, padding=0) + self.conv.weight.mean()


def test_a_weight_that_is_read_otherwise_keeps_its_norm():
    source = randomize_norms(Tied().double().eval())
    program = torch.export.export(source, (IMAGE,))
    result = api.apply(program, ["fold-bn"], example_inputs=IMAGE)  # type: ignore[type-var]
    (norm,) = result.report.norms
    assert norm.refusal is not None
    assert "conv.weight is also read by" in norm.refusal.detail
    assert_parity(source, result.model, IMAGE)


def test_a_program_of_training_mode_keeps_its_norms():
    program = torch.export.export(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double().train(), (IMAGE,))
    (norm,) = normfuse.inspect(program, example_inputs=IMAGE).norms  # type: ignore[arg-type]
    assert norm.refusal is not None
    assert "training=True" in norm.refusal.detail


def test_a_folded_program_is_exported_again_and_says_so_when_it_is_pickled(tmp_path: Path):
    build, inputs = MODELS["Conv2d"]
    source = randomize_norms(build().double().eval())
    folded = normfuse.fold(torch.export.export(source, (inputs,)), example_inputs=inputs)  # type: ignore[type-var]
    again = torch.export.export(folded, (inputs,))  # type: ignore[arg-type]
    assert_parity(source, as_module(again), inputs)
    assert normfuse.inspect(again, example_inputs=inputs).norms == ()  # type: ignore[arg-type]
    with pytest.raises(NormfuseError, match="export it again"):
        normfuse.save(folded, tmp_path / "model.pt")  # type: ignore[arg-type]
