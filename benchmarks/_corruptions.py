"""What can be wrong with a picture of a digit: noise, blur, contrast."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Corruption = Callable[[Tensor, torch.Generator], Tensor]


def noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise with a deviation of 0.4 to pictures from 0 to 1, ``(N, 1, H, W)``."""
    return (images + 0.4 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Tensor, _: torch.Generator) -> Tensor:
    """Blur by a Gaussian with a deviation of 2 pixels."""
    at = torch.arange(-6.0, 7.0)
    kernel = torch.exp(-(at**2) / 8)
    kernel = kernel / kernel.sum()
    rows = F.conv2d(images, kernel.reshape(1, 1, -1, 1), padding=(6, 0))
    return F.conv2d(rows, kernel.reshape(1, 1, 1, -1), padding=(0, 6))


def contrast(images: Tensor, _: torch.Generator) -> Tensor:
    """Leave 0.2 of the contrast, about the mean of each picture."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + 0.2 * (images - mean)


CORRUPTIONS: dict[str, Corruption] = {
    "clean": lambda images, _: images,
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
}
