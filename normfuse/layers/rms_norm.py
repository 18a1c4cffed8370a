"""RMSNorm with what a LayerNorm has and ``torch.nn.RMSNorm`` has not: a shift, and channels on another axis than last.

y = gamma x / sqrt(mean(x^2) + eps) + beta
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467) with a shift, on ``(*, *normalized_shape)`` or with the channels on another axis.

    Args:
        normalized_shape: Sizes of the trailing axes; one size, C, where ``axis`` is not the last.
        eps: Added to the mean of the squares.
        elementwise_affine: Whether there is a gain, ``weight``, of ``normalized_shape``.
        bias: Whether there is a shift, ``bias``, of ``normalized_shape``.
        axis: The axis of the channels: -1, or 1 for ``(N, C, *)``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | list[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        bias: bool = True,
        axis: int = -1,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.axis = axis
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.normalized_shape)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``x``, of its shape."""
        y = nn.functional.rms_norm(x.movedim(self.axis, -1), self.normalized_shape, self.weight, self.eps)
        if self.bias is not None:
            y = y + self.bias
        return y.movedim(-1, self.axis)

    def extra_repr(self) -> str:
        """Show the shape, and what torch's layer has not."""
        return f"{super().extra_repr()}, bias={self.bias is not None}, axis={self.axis}"
