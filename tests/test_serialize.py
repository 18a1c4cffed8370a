"""Saving and loading: round trips are exact, and a failure leaves what was there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse import deploy
from normfuse.errors import DeployedModelError, LoadError, NormfuseError
from normfuse.formats import Format
from normfuse.saving import PLAIN_KEY
from normfuse.serialize import load, read, save
from tests.parity import randomize_norms
from tests.saved_net import ARCH, SUFFIXES, Net, folded, net, unfolded, x

# round trips


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["model", "arch"])
def test_folded_round_trip_is_exact(suffix: str, how: str, tmp_path: Path) -> None:
    model, path = folded(), tmp_path / f"m{suffix}"
    save(model, path, arch=ARCH if how == "arch" else None)
    loaded = load(path, model=unfolded()) if how == "model" else load(path, arch=ARCH)
    assert torch.equal(loaded(x()), model(x()))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert loaded.get_parameter("conv1.weight").dtype == torch.float64
    assert loaded.get_parameter("conv1.bias").abs().max() > 0
    assert loaded.get_parameter("tied.weight") is loaded.get_parameter("head.weight")


def test_folded_round_trip_without_architecture(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    nn.init.normal_(model.get_buffer("1.running_mean"))
    model = normfuse.fold_bn(model)
    save(model, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt")
    image = torch.randn(1, 3, 5, 5)
    assert torch.equal(loaded(image), model(image))


def test_own_class_without_architecture_follows_the_allow_list(tmp_path: Path) -> None:
    model, path = folded(), tmp_path / "m.pt"
    save(model, path)
    with pytest.raises(LoadError, match=r"--allow-global .*Net"):
        load(path)
    loaded = load(path, allow_globals=[f"{Net.__module__}.Net"])
    assert torch.equal(loaded(x()), model(x()))
    assert loaded.get_parameter("tied.weight") is loaded.get_parameter("head.weight")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unfolded_round_trip(suffix: str, tmp_path: Path) -> None:
    model, path = net(), tmp_path / f"m{suffix}"
    save(model, path, arch=ARCH)
    answer = read(path, arch=ARCH)
    assert torch.equal(answer.model(x()), model(x()))
    assert answer.manifest is not None
    assert answer.manifest["edits"] == []
    answer.model.train()


def test_modules_that_refer_to_their_weights_twice(tmp_path: Path) -> None:
    model = nn.LSTM(2, 3).eval()
    save(model, tmp_path / "m.pt")
    sequence = torch.randn(4, 2)
    assert torch.equal(load(tmp_path / "m.pt")(sequence)[0], model(sequence)[0])


def test_the_pickled_module_holds_no_weights(tmp_path: Path) -> None:
    save(nn.Linear(500, 500), tmp_path / "m.pt")
    assert (tmp_path / "m.pt").stat().st_size < 1.05 * 4 * 500 * 500


@pytest.mark.models
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_zoo_architecture_of_the_manifest(suffix: str, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    model, path = normfuse.fold_bn(models.resnet18(num_classes=3).eval()), tmp_path / f"m{suffix}"
    save(model, path, arch="torchvision:resnet18", arch_kwargs={"num_classes": 3})
    answer = read(path)
    image = torch.randn(1, 3, 32, 32)
    assert answer.arch == "torchvision:resnet18"
    assert torch.equal(answer.model(image), model(image))


def test_loaded_folded_model_is_guarded_and_carries_its_manifest(tmp_path: Path) -> None:
    save(folded(), tmp_path / "m.pt", verification={"passed": True})
    answer = read(tmp_path / "m.pt", model=unfolded())
    assert answer.format is Format.STATE_DICT
    assert deploy.manifest_of(answer.model) == answer.manifest
    assert answer.manifest is not None
    assert answer.manifest["verify"] == {"passed": True}
    with pytest.raises(DeployedModelError):
        answer.model.train()


def test_saving_twice_gives_the_same_model(tmp_path: Path) -> None:
    save(folded(), tmp_path / "a.pt", arch=ARCH)
    save(load(tmp_path / "a.pt", arch=ARCH), tmp_path / "b.pt")
    first, second = read(tmp_path / "a.pt", arch=ARCH), read(tmp_path / "b.pt", arch=ARCH)
    assert torch.equal(first.model(x()), second.model(x()))
    assert first.manifest == second.manifest


def test_the_given_model_is_not_changed(tmp_path: Path) -> None:
    save(folded(), tmp_path / "m.pt")
    fresh = unfolded()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    load(tmp_path / "m.pt", model=fresh)
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in before.items())


def test_untied_values_of_a_tied_architecture(tmp_path: Path) -> None:
    model = net()
    model.tied.weight = nn.Parameter(torch.randn_like(model.head.weight))
    save(model, tmp_path / "m.pt", arch=ARCH)
    loaded = load(tmp_path / "m.pt", arch=ARCH)
    assert torch.equal(loaded(x()), model(x()))


# what others see of a folded file


def test_load_state_dict_on_the_unfolded_model_says_what_to_do(tmp_path: Path) -> None:
    save(folded(), tmp_path / "m.pt")
    with pytest.raises(RuntimeError, match=r"this_checkpoint_is_folded__load_it_with_normfuse\.load"):
        Net().load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))


def test_folded_tensors_without_a_manifest(tmp_path: Path) -> None:
    torch.save(folded().state_dict(), tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"this checkpoint is folded.*bn1.*conv1\.bias.*normfuse\.load"):
        load(tmp_path / "m.pt", model=unfolded())


def test_folding_the_model_that_is_given_is_an_error(tmp_path: Path) -> None:
    save(folded(), tmp_path / "m.pt")
    with pytest.raises(LoadError, match="folded already"):
        load(tmp_path / "m.pt", model=folded())


# state dicts of others

WRAPS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3}, "'state_dict'"),
    "model": (lambda state: {"model": state, "ema": state}, "not 'ema'"),
    "ema": (lambda state: {"ema": state}, "'ema'"),
    "data parallel": (lambda state: {f"module.{key}": value for key, value in state.items()}, "'module.'"),
    "compiled": (lambda state: {f"_orig_mod.{key}": value for key, value in state.items()}, "'_orig_mod.'"),
    "both": (lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, "'_orig_mod.'"),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("zip_format", [True, False])
def test_state_dicts_as_they_are_found(wrap: str, zip_format: bool, tmp_path: Path) -> None:
    model, (change, note) = net(), WRAPS[wrap]
    torch.save(change(model.state_dict()), tmp_path / "m.pt", _use_new_zipfile_serialization=zip_format)
    answer = read(tmp_path / "m.pt", model=unfolded())
    assert torch.equal(answer.model(x()), model(x()))
    assert note in " ".join(answer.notes)


def test_plain_state_dict_needs_no_note(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "m.pt")
    answer = read(tmp_path / "m.pt", arch=ARCH)
    assert (answer.notes, answer.arch, answer.manifest) == ((), ARCH, None)
    assert not answer.model.training


def test_prefix_that_the_model_has_too_is_kept(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(model.state_dict(), tmp_path / "m.pt")
    answer = read(tmp_path / "m.pt", model=nn.ModuleDict({"module": nn.Linear(2, 2)}))
    assert answer.notes == ()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_state_dict_without_architecture(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file({"a": torch.ones(1)}, path)
    else:
        torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(LoadError, match=r"--arch .*package\.module:factory"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv1.weight"), r"conv1\.weight"),
        (lambda state: state.update({"surplus": torch.ones(1)}), "surplus"),
        (lambda state: state.update({"conv1.weight": torch.ones(1)}), "size mismatch"),
    ],
)
def test_strictness(change: Callable[[dict], Any], message: str, tmp_path: Path) -> None:
    state = net().state_dict()
    change(state)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=message):
        load(tmp_path / "m.pt", model=unfolded())


def test_no_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "lr": 0.1}, tmp_path / "m.pt")
    with pytest.raises(LoadError, match="it holds epoch, lr"):
        load(tmp_path / "m.pt", model=unfolded())


def test_pickled_module_of_torch(tmp_path: Path) -> None:
    torch.save(nn.DataParallel(nn.Linear(2, 2)), tmp_path / "m.pt")
    answer = read(tmp_path / "m.pt")
    assert type(answer.model) is nn.Linear
    assert "DataParallel" in answer.notes[0]


# writing


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("torch.save", fail)
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(net(), path, arch=ARCH)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    model = folded()
    before, attributes = model(x()), set(vars(model))
    save(model, tmp_path / "m.pt", arch=ARCH)
    assert torch.equal(model(x()), before)
    assert set(vars(model)) == attributes
    with pytest.raises(DeployedModelError):
        model.train()


def test_what_cannot_be_pickled_asks_for_an_architecture(tmp_path: Path) -> None:
    model = nn.ReLU()
    vars(model)["function"] = lambda: None
    with pytest.raises(NormfuseError, match="arch="):
        save(model, tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []
    save(model, tmp_path / "m.pt", arch="torch.nn:ReLU")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NormfuseError, match="no folder"):
        save(net(), tmp_path / "none" / "m.pt")


def test_the_file_of_an_unfolded_model_does_not_claim_to_be_folded(tmp_path: Path) -> None:
    save(net(), tmp_path / "m.pt", arch=ARCH)
    assert PLAIN_KEY in torch.load(tmp_path / "m.pt", weights_only=True)


class ByFunction(nn.Module):
    """Nothing of it is replaced when it is folded; its convolution gets a bias, or other values alone."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=bias), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["model", "arch", "pickled"])
def test_a_fold_that_replaces_nothing(suffix: str, bias: bool, how: str, tmp_path: Path) -> None:
    model = randomize_norms(ByFunction(bias).double().eval())
    result, path = normfuse.fold(model), tmp_path / f"folded{suffix}"
    arch = {"arch": "tests.test_serialize:ByFunction", "arch_kwargs": {"bias": bias}} if how == "arch" else {}
    save(result, path, **arch)
    if how == "pickled" and suffix != ".safetensors":
        loaded = load(path, allow_globals=["tests.test_serialize.ByFunction"])
    else:
        loaded = load(path, **arch) if arch else load(path, model=model)
    inputs = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(loaded.double()(inputs), result(inputs))
    with pytest.raises(DeployedModelError):
        loaded.train()
