"""Models by name: timm:NAME, torchvision:NAME, package.module:factory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from normfuse.architectures import build, is_harmless, parse_kwargs
from normfuse.errors import LoadError, MissingDependencyError

SOURCE = """
from torch import nn

class Net(nn.Linear):
    def __init__(self, width=2):
        super().__init__(width, width)

    @classmethod
    def wide(cls):
        return cls(8)

def broken():
    raise RuntimeError("no weights here")

def other():
    return {"not": "a model"}

constant = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, which is not on the path."""
    name = "normfuse_test_architectures"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_torch_class() -> None:
    model = build("torch.nn:Linear", {"in_features": 2, "out_features": 3})
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (3, 2)


def test_module_of_the_current_folder(package: str) -> None:
    before = list(sys.path)
    assert build(f"{package}:Net", {"width": 5})(torch.ones(1, 5)).shape == (1, 5)
    assert build(f"{package}:Net.wide")(torch.ones(1, 8)).shape == (1, 8)
    assert sys.path == before


@pytest.mark.parametrize(
    ("factory", "kwargs", "message"),
    [
        ("Net", {"height": 2}, "height"),
        ("broken", {}, "no weights here"),
        ("other", {}, "not a torch.nn.Module"),
        ("constant", {}, "not a class or function"),
        ("absent", {}, "has no absent"),
    ],
)
def test_factory_errors_are_one_line(package: str, factory: str, kwargs: dict, message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        build(f"{package}:{factory}", kwargs)
    assert "\n" not in str(caught.value)


def test_module_that_fails_to_import(package: str) -> None:
    Path(f"{package}.py").write_text("1 / 0")
    with pytest.raises(LoadError, match="ZeroDivisionError"):
        build(f"{package}:Net")


@pytest.mark.parametrize("spec", ["resnet18", "timm:", ":Net", ""])
def test_malformed(spec: str) -> None:
    with pytest.raises(LoadError, match=r"timm:NAME, torchvision:NAME or package\.module:factory"):
        build(spec)


def test_no_such_module() -> None:
    with pytest.raises(LoadError, match="cannot import no_such_package"):
        build("no_such_package.models:Net")


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_zoo(source: str) -> None:
    pytest.importorskip(source)
    model = build(f"{source}:resnet18", {"num_classes": 3})
    assert model.get_parameter("fc.weight").shape[0] == 3
    with pytest.raises(LoadError, match=r"did you mean .*resnet18"):
        build(f"{source}:resnet_18")


def test_torchvision_backbone_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("it downloads"))
    build("torchvision:ssdlite320_mobilenet_v3_large", {"num_classes": 2})


@pytest.mark.parametrize("package_name", ["timm", "torchvision"])
def test_zoo_that_is_not_installed(package_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package_name, None)
    with pytest.raises(MissingDependencyError, match=f"pip install {package_name}"):
        build(f"{package_name}:resnet18")


@pytest.mark.parametrize(
    ("spec", "kwargs", "harmless"),
    [
        ("timm:resnet18", {"num_classes": 3}, True),
        ("torchvision:resnet18", {}, True),
        ("timm:resnet18", {"pretrained": True}, False),
        ("timm:resnet18", {"checkpoint_path": "x.pt"}, False),
        ("timm:hf-hub:someone/model", {}, False),
        ("timm:local-dir:/somewhere", {}, False),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, False),
        ("os:system", {}, False),
    ],
)
def test_what_a_file_may_ask_for(spec: str, kwargs: dict, harmless: bool) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    assert is_harmless(spec, kwargs) is harmless


def test_parse_kwargs() -> None:
    pairs = ["num_classes=10", "act=gelu", "sizes=(1, 2)", "flag=True", "text=a=b"]
    expected = {"num_classes": 10, "act": "gelu", "sizes": (1, 2), "flag": True, "text": "a=b"}
    assert parse_kwargs(pairs) == expected
    with pytest.raises(LoadError, match="name=value"):
        parse_kwargs(["10"])
