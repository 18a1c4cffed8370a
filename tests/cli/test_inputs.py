"""Where the example input comes from."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normfuse.cli.arguments import NamedShape
from normfuse.cli.inputs import Example, from_specification, resolve
from normfuse.errors import CaptureError, LoadError
from normfuse.outputs import describe, specification


def example(model: nn.Module, **given) -> Example:
    defaults = {"input_file": None, "input_shapes": (), "stored": None, "device": "cpu", "seed": 0}
    return resolve(model, **{**defaults, **given})


def only(found: Example) -> Tensor:
    (tensor,) = found.inputs if isinstance(found.inputs, tuple) else (found.inputs,)
    assert isinstance(tensor, Tensor)
    return tensor


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 3), (1, 2, 224)),
        (nn.Conv2d(2, 3, 3), (1, 2, 224, 224)),
        (nn.Conv3d(2, 3, 3), (1, 2, 16, 112, 112)),
        (nn.ConvTranspose2d(2, 3, 3), (1, 2, 224, 224)),
        (nn.Linear(7, 3), (1, 7)),
        (nn.Embedding(11, 3), (1, 16)),
        (nn.LSTM(5, 3), (1, 16, 5)),
        (nn.BatchNorm2d(6), (1, 6, 224, 224)),
    ],
)
def test_guess_from_the_first_layer(layer: nn.Module, shape: tuple[int, ...]):
    found = example(nn.Sequential(layer) if not isinstance(layer, nn.LSTM) else layer)
    assert only(found).shape == shape
    assert found.assumed
    assert type(layer).__name__ in found.origin


def test_indices_stay_inside_the_embedding():
    tensor = only(example(nn.Embedding(2, 3)))
    assert tensor.dtype is torch.int64
    assert int(tensor.max()) < 2


def test_sizes_are_tried_until_one_runs():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 3))
    assert only(example(model)).shape == (1, 1, 28, 28)


def test_detectors_get_a_list_of_images():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, images: list[Tensor]) -> list[Tensor]:
            assert isinstance(images, list)
            return [self.conv(image[None]) for image in images]

    found = example(Detector())
    assert isinstance(found.inputs, tuple)
    assert [image.shape for image in found.inputs[0]] == [(3, 224, 224)]


def test_models_of_two_inputs_get_two():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
            return self.linear(a - b) * scale

    assert specification(Pair(), example(Pair()).inputs) == [
        {"name": "a", "shape": [1, 4], "dtype": "float32"},
        {"name": "b", "shape": [1, 4], "dtype": "float32"},
    ]


@pytest.mark.parametrize("name", ["pretrained_cfg", "default_cfg"])
def test_timm_configuration_comes_before_the_guess(name: str):
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    setattr(model, name, {"input_size": (3, 40, 48)})
    found = example(model)
    assert only(found).shape == (1, 3, 40, 48)
    assert name in found.origin


def test_example_input_array():
    model = nn.Sequential(nn.Linear(3, 2))
    model.example_input_array = torch.ones(5, 3)
    assert torch.equal(torch.as_tensor(example(model).inputs), torch.ones(5, 3))


def test_stored_inputs_come_before_configuration_and_are_no_assumption():
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    setattr(model, "default_cfg", {"input_size": (3, 40, 48)})  # noqa: B010 - not an attribute of the class
    found = example(model, stored=(torch.zeros(2, 3, 9, 9),))
    assert only(found).shape == (2, 3, 9, 9)
    assert not found.assumed


def test_shape_comes_before_what_is_stored():
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    found = example(model, input_shapes=[NamedShape("image", (1, 3, 7, 7))], stored=(torch.zeros(2, 3, 9, 9),))
    assert only(found).shape == (1, 3, 7, 7)


def test_file_comes_first(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    found = example(nn.Linear(3, 2), input_file=tmp_path / "x.npy", input_shapes=[NamedShape(None, (1, 3))])
    assert torch.equal(torch.as_tensor(found.inputs), torch.ones(2, 3))


def test_arrays_by_name(tmp_path: Path):
    np.savez(tmp_path / "x.npz", input=np.ones((2, 3), np.float32), weight=np.ones((4, 3), np.float32))

    class Named(nn.Module):
        def forward(self, weight: Tensor, input: Tensor) -> Tensor:
            return input @ weight.T

    found = example(Named(), input_file=tmp_path / "x.npz")
    assert {entry["name"]: entry["shape"] for entry in specification(Named(), found.inputs)} == {
        "weight": [4, 3],
        "input": [2, 3],
    }


def test_arrays_that_need_unpickling_are_refused(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(LoadError, match="plain arrays"):
        example(nn.Linear(3, 2), input_file=tmp_path / "x.npy")


def test_inputs_are_cast_to_the_precision_of_the_model():
    assert only(example(nn.Linear(3, 2).to(torch.bfloat16))).dtype is torch.bfloat16


def test_same_seed_same_input():
    first, second, third = (only(example(nn.Linear(3, 2), seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_the_mode_of_the_model_is_kept():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout()).train()
    model[1].eval()
    example(model)
    assert [module.training for module in model] == [True, False]


def test_wrong_shape_names_the_shape_and_the_problem():
    with pytest.raises(CaptureError, match=r"does not run on input:1x5 float32 .*shapes cannot be multiplied"):
        example(nn.Linear(3, 2), input_shapes=[NamedShape(None, (1, 5))])


def test_nothing_to_guess_from():
    with pytest.raises(CaptureError, match="pass --input-shape"):
        example(nn.ReLU())


def test_no_guess_runs():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("never")

    with pytest.raises(CaptureError, match=r"x:1x3 float32, x:1x16x3 float32 do not run.*--input-shape"):
        example(Picky())


def test_names_must_be_those_of_forward():
    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    shapes = [NamedShape("b", (2,)), NamedShape("a", (2,))]
    assert describe(Pair(), example(Pair(), input_shapes=shapes).inputs) == "a:2 float32, b:2 float32"
    with pytest.raises(click.UsageError, match="are a, b"):
        example(Pair(), input_shapes=[NamedShape("a", (2,)), NamedShape("c", (2,))])
    with pytest.raises(click.UsageError, match="name each or none"):
        example(Pair(), input_shapes=[NamedShape("a", (2,)), NamedShape(None, (2,))])


def test_specification_makes_the_same_inputs_again():
    model = nn.Sequential(nn.Embedding(5, 3))
    entries = [{"name": "input", "shape": [2, 4], "dtype": "int64"}]
    made = from_specification(model, entries)
    assert made is not None
    assert specification(model, made) == entries


@pytest.mark.parametrize(
    "entries",
    [
        None,
        [],
        [{"name": "input"}],
        [{"name": "other", "shape": [1], "dtype": "float32"}],
        [{"name": "input", "shape": [-1], "dtype": "float32"}],
        [{"name": "input", "shape": "abc", "dtype": "float32"}],
        [{"name": "input", "shape": [1], "dtype": "load"}],
    ],
)
def test_a_damaged_specification_is_ignored(entries):
    assert from_specification(nn.Sequential(nn.Linear(1, 1)), entries) is None
