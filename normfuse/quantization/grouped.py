"""Convolutions of many groups on integers: one convolution of floats that hold them, where that is exact.

A matrix product for each group is slow where there are hundreds of groups (depthwise). Sums of at most 2^24 are exact
in float32 in any order: ``K q^2 <= 2^24`` for K products. That needs a convolution that sums plainly. ``F.conv2d``
promises no such thing: by size and settings it may take NNPACK or cuDNN, which transform images (Winograd, FFT) and
round. oneDNN's convolution is direct, so on CPUs that one is called by its name. On CUDA numbers are held in float64,
where what transforms leave behind is far below a half, and rounded. That it is so under the settings of torch at the
time is also tried out on the extremes, once for each setting. No other device is relied on.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from normfuse.quantization.columns import Windows, kernel_rows
from normfuse.quantization.engine_choice import extremes
from normfuse.quantization.integer_engines import reference

LARGEST_SUM = 2**24


def grouped_sums(image: Tensor, kernel: Tensor, groups: int, windows: Windows, limit: int) -> Tensor | None:
    """Return the sums of a convolution, ``(N, out, H', W')``, as floats of integer value; None where not exact.

    Args:
        image: int8 ``(N, C, H, W)``.
        kernel: int8 ``(out, C / groups, kh, kw)``.
        groups: Of the convolution.
        windows: Its geometry.
        limit: Largest magnitude of an integer.
    """
    if kernel[0].numel() * limit * limit > LARGEST_SUM or image.numel() == 0 or not _sums_plainly(image.device.type):
        return None
    return _convolve(image, kernel, groups, windows) if _is_exact(str(image.device), _settings(image)) else None


def _sums_plainly(device: str) -> bool:
    return device == "cuda" or (device == "cpu" and torch.backends.mkldnn.is_available())


def _convolve(image: Tensor, kernel: Tensor, groups: int, windows: Windows) -> Tensor:
    padded = F.pad(image, windows.padding)
    with torch.autocast(image.device.type, enabled=False):
        if image.device.type == "cpu":
            held = padded.to(torch.float32), kernel.to(torch.float32)
            convolve = torch.ops.aten.mkldnn_convolution
            return convolve(*held, None, (0, 0), windows.stride, windows.dilation, groups)
        held = padded.to(torch.float64), kernel.to(torch.float64)
        return F.conv2d(*held, None, windows.stride, 0, windows.dilation, groups).round_()


def _settings(image: Tensor) -> tuple[object, ...]:
    cudnn = torch.backends.cudnn.allow_tf32 if image.is_cuda else None
    return torch.get_num_threads(), torch.get_float32_matmul_precision(), cudnn


@functools.cache
def _is_exact(device: str, settings: tuple[object, ...]) -> bool:
    """Return whether convolutions equal the definition on the extremes, depthwise and of the largest depth."""
    for groups, channels, outputs in ((16, 1, 1), (2, 115, 3)):  # 115 * 9 * 127^2 is just within the largest sum
        image = extremes(2 * groups * channels, 49, 127, device).reshape(2, groups * channels, 7, 7)
        kernel = extremes(groups * outputs, channels * 9, 127, device).reshape(groups * outputs, channels, 3, 3)
        windows = Windows((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
        parts = zip(image.chunk(groups, 1), kernel.chunk(groups), strict=True)
        expected = torch.cat([reference(windows.gather(x), kernel_rows(w)) for x, w in parts], 1)
        found = _convolve(image, kernel, groups, windows).permute(0, 2, 3, 1).flatten(0, 2)
        if not torch.equal(found.cpu().double(), expected.double()):
            return False
    return True
