"""Convolution as a matrix product: windows of an image become rows, on integers as on floats.

For an image ``(N, C, H, W)`` and a kernel of ``kh kw`` taps, row ``(n, i, j)`` holds the window of output ``(i, j)`` in
the order ``(kh, kw, C)``, so that runs of channels are copied whole from an image in channels-last order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the windows of a two-dimensional convolution lie.

    Attributes:
        kernel: Taps, ``(kh, kw)``.
        stride: Between windows.
        dilation: Between taps.
        padding: Zeros around the image, as ``F.pad`` takes them: left, right, top, bottom.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]

    @property
    def taps(self) -> int:
        """Number of taps of the kernel."""
        return self.kernel[0] * self.kernel[1]

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the image with its padding."""
        left, right, top, bottom = self.padding
        return height + top + bottom, width + left + right

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the output for an image without its padding.

        Raises:
            ValueError: The kernel is larger than the padded image.
        """
        sizes = self.padded_size(height, width)
        free = [size - d * (k - 1) - 1 for size, d, k in zip(sizes, self.dilation, self.kernel, strict=True)]
        if min(free) < 0:
            raise ValueError(f"a kernel of {self.kernel}, dilation {self.dilation}, exceeds the padded image {sizes}")
        return free[0] // self.stride[0] + 1, free[1] // self.stride[1] + 1

    def gather(self, image: Tensor) -> Tensor:
        """Return the rows ``(N * outputs, taps * C)`` of an image ``(N, C, H, W)`` of any dtype."""
        (rows, columns), channels = self.outputs(*image.shape[2:]), image.shape[1]
        padded = F.pad(image, self.padding).contiguous(memory_format=torch.channels_last)
        n, c, h, w = padded.stride()
        (sh, sw), (dh, dw) = self.stride, self.dilation
        windows = padded.as_strided(
            (len(image), rows, columns, *self.kernel, channels), (n, h * sh, w * sw, h * dh, w * dw, c)
        )
        # a copy, even where a view would do: windows overlap, and no matrix product takes rows that do
        return windows.reshape(len(image) * rows * columns, self.taps * channels).contiguous()

    def scatter(self, rows: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Return the image, of ``shape`` ``(N, C, H, W)``, that sums up ``rows``: the adjoint of :meth:`gather`."""
        images, channels, height, width = shape
        if rows.numel() == 0:
            return rows.new_zeros(shape)
        # (N outputs, taps C) -> (N, C taps, outputs), the order of F.fold
        unrolled = rows.reshape(images, -1, self.taps, channels).permute(0, 3, 2, 1).flatten(1, 2)
        size = self.padded_size(height, width)
        padded = F.fold(unrolled, size, self.kernel, dilation=self.dilation, stride=self.stride)
        left, _, top, _ = self.padding
        return padded[:, :, top : top + height, left : left + width]


def kernel_rows(weight: Tensor) -> Tensor:
    """Return ``(out, taps * in)``, in the order of :meth:`Windows.gather`, of a kernel ``(out, in, kh, kw)``."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def kernel_of_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """Return the kernel of ``shape`` ``(out, in, kh, kw)`` whose rows are ``rows``."""
    out, inner, height, width = shape
    return rows.reshape(out, height, width, inner).permute(0, 3, 1, 2)
