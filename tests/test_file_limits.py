"""A manifest asks for nothing larger than its file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import normfuse
from normfuse.errors import LoadError
from normfuse.saving import FOLDED_KEY, MODULE_KEY
from tests.saved_net import folded, unfolded

_SIZES = {"in_channels": 100_000, "out_channels": 100_000, "kernel_size": 3}
CONV = {"class": "torch.nn.modules.conv.Conv2d", "kwargs": _SIZES}
LINEAR = {"class": "torch.nn.modules.linear.Linear", "kwargs": {"in_features": 1000, "out_features": 1000}}


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Save a folded model, and change its manifest."""
    normfuse.save(folded(), path)
    entries = torch.load(path, weights_only=True)
    manifest = json.loads(entries[FOLDED_KEY])
    change(manifest)
    entries.pop(MODULE_KEY, None)
    torch.save({**entries, FOLDED_KEY: json.dumps(manifest)}, path)
    return path


EDITS: dict[str, dict[str, Any]] = {
    "a layer": {"op": "replace", "path": "head", "module": CONV},
    "a layer in a chain": {"op": "replace", "path": "head", "module": {"sequential": [{"sequential": [CONV]}]}},
    "many layers": {
        "op": "replace",
        "path": "head",
        "module": {"sequential": [LINEAR] * 100},
    },
    "a tensor": {"op": "resize", "path": "head", "attributes": {}, "tensors": {"weight": [1 << 20, 1 << 20]}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_that_build_more_than_the_file_holds(edit: str, tmp_path: Path):
    path = changed(tmp_path / "m.pt", lambda manifest: manifest["edits"].append(EDITS[edit]))
    with pytest.raises(LoadError, match="what its edits build has"):
        normfuse.load(path, model=unfolded())


ARCHES: dict[str, tuple[dict[str, Any], str]] = {
    "many classes": ({"num_classes": 1_000_000}, "elements"),
    "larger numbers": ({"num_classes": 1 << 40}, "numbers and words"),
    "not a number": ({"num_classes": float("inf")}, "numbers and words"),
    "a long text": ({"act_layer": "a" * 1000}, "numbers and words"),
    "a path": ({"act_layer": "../x"}, "numbers and words"),
    "many arguments": ({"a": [1] * 2000}, "numbers and words"),
    "deep arguments": ({"a": [[[[[[[[1]]]]]]]]}, "numbers and words"),
    "unknown arguments": ({"no_such_argument": 1}, "cannot be measured"),
}


@pytest.mark.parametrize("case", ARCHES)
def test_architectures_that_are_larger_than_the_file(case: str, tmp_path: Path):
    pytest.importorskip("timm")
    kwargs, message = ARCHES[case]
    path = changed(
        tmp_path / "m.pt", lambda manifest: manifest.update(arch={"name": "timm:resnet18", "kwargs": kwargs})
    )
    with pytest.raises(LoadError, match=message):
        normfuse.load(path)


@pytest.mark.parametrize(
    "arch",
    [
        "timm:resnet18",
        ["timm:resnet18"],
        {"name": "timm:resnet18"},
        {"kwargs": {}},
        3,
        {"name": 1, "kwargs": {"a b": 1}},
    ],
)
def test_damaged_architectures(arch: Any, tmp_path: Path):
    path = changed(tmp_path / "m.pt", lambda manifest: manifest.update(arch=arch))
    with pytest.raises(LoadError, match="--arch"):
        normfuse.load(path)


def test_architecture_of_a_file_that_fits(tmp_path: Path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_byobnet", num_classes=7).eval()
    folded_model = normfuse.fold(model, example_inputs=torch.randn(1, 3, 32, 32))
    normfuse.save(folded_model, tmp_path / "m.pt", arch="timm:test_byobnet", arch_kwargs={"num_classes": 7})
    assert normfuse.load(tmp_path / "m.pt").get_classifier().out_features == 7


@pytest.mark.parametrize("depth", [100_000])
def test_manifests_that_nest_without_end(depth: int, tmp_path: Path):
    path = tmp_path / "m.pt"
    normfuse.save(folded(), path)
    entries = torch.load(path, weights_only=True)
    torch.save({**entries, FOLDED_KEY: "[" * depth + "]" * depth}, path)
    with pytest.raises(LoadError, match="manifest in it is damaged"):
        normfuse.load(path, model=unfolded())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_pipes_and_folders_are_no_models(tmp_path: Path):
    os.mkfifo(tmp_path / "m.pt")
    for path in (tmp_path / "m.pt", tmp_path):
        with pytest.raises(LoadError, match="not a file"):
            normfuse.load(path)
