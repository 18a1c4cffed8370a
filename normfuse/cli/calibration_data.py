"""Read ``--calib``: arrays, tensors or a folder of images, cut into batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.cli.arrays import read_arrays, require_file
from normfuse.errors import LoadError, MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normfuse.outputs import Inputs

MOST_PIXELS = 1 << 26
"""In one picture: a small file can say that it is of any size."""

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


def read(path: Path, model: nn.Module, *, batch_size: int, limit: int) -> list[Inputs]:
    """Return the data in a file or folder as batches, each as example inputs are.

    Args:
        path: A ``.npz`` or ``.npy`` file, a torch file of one tensor, a tuple or a dictionary of tensors, or a folder
            of images. The first axis of every array is that of the samples.
        model: What it is for; a folder of images is brought to the size and the mean of its ``default_cfg`` (timm).
        batch_size: Samples in a batch.
        limit: The first so many samples are taken.

    Raises:
        LoadError: The file cannot be read, holds something else, or its arrays have different numbers of samples.
        MissingDependencyError: Images need a package that is not installed.
    """
    if path.is_dir():
        return _image_batches(path, model, batch_size, limit)
    require_file(path)
    values = _read_torch(path) if path.suffix.lower() in (".pt", ".pth") else read_arrays(path)
    return _cut(values, path, batch_size, limit)


def _read_torch(path: Path) -> Any:
    from normfuse.unpickle import unpickle

    loaded = unpickle(path)
    return tuple(loaded) if isinstance(loaded, list) else loaded


def _cut(values: Any, path: Path, batch_size: int, limit: int) -> list[Inputs]:
    from torch import Tensor

    from normfuse.outputs import map_tensors

    tables: Any = values.values() if isinstance(values, Mapping) else values if type(values) is tuple else [values]
    parts = list(tables)
    if not parts or not all(isinstance(part, Tensor) and part.dim() for part in parts):
        raise LoadError(f"{path}: holds something else than one tensor, a tuple or a dictionary of tensors")
    sizes = {part.shape[0] for part in parts}
    if len(sizes) > 1 or min(sizes) == 0:
        raise LoadError(f"{path}: its arrays have {sorted(sizes)} samples; each needs the same number of them")
    count = min(*sizes, limit)
    spans = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]

    def part_of(span: slice) -> Any:
        return map_tensors(values, lambda tensor: tensor[span])

    return [part_of(span) for span in spans]


def _image_batches(folder: Path, model: nn.Module, batch_size: int, limit: int) -> list[Inputs]:
    import torch

    from normfuse.made_up_inputs import setting

    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())[:limit]
    if not files:
        raise LoadError(f"{folder}: there is no image in this folder")
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = tuple(setting(config, "input_size") or (3, 224, 224))
    mean, std = (setting(config, key) or default for key, default in _IMAGENET.items())
    tensors = [_image(file, size, mean, std) for file in files]
    return [torch.stack(tensors[start : start + batch_size]) for start in range(0, len(tensors), batch_size)]


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _image(file: Path, size: tuple[int, ...], mean: Any, std: Any) -> Tensor:
    """Return one picture as ``(C, H, W)``: the centre, at the size of the model, normalised by channel."""
    import torch

    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError("a folder of images needs Pillow: pip install pillow") from error
    try:
        with Image.open(file) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"it has more than {MOST_PIXELS} pixels")
            picture = ImageOps.fit(opened.convert("L" if size[0] == 1 else "RGB"), (size[2], size[1]))
            values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise LoadError(f"{file}: not an image that can be read ({error})") from error
    values = values.reshape(size[1], size[2], size[0]).permute(2, 0, 1).float() / 255
    means, stds = (torch.tensor(list(v)[: size[0]]).reshape(-1, 1, 1) for v in (mean, std))
    return (values - means) / stds
