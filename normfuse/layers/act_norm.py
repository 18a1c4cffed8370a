"""ActNorm: a gain and a shift per channel that start so that the first batch is normalised.

*Glow: Generative Flow with Invertible 1x1 Convolutions*, arXiv 1807.03039. Per channel:

    first batch in training:   s = 1 / (std(x) + eps),   b = -s E[x]            (biased standard deviation)
    always:                    y = s x + b;   x = (y - b) / s;   log|det dy/dx| = P sum_c log|s_c|   per sample

with P positions (H W of an image). It is a fixed map in training mode too. A fold loses the log-determinant: it is
refused where the model asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import NormfuseError
from normfuse.layers.affine_inference import AffineInference
from normfuse.numerics import exact


class ActNorm(AffineInference, nn.Module):
    """ActNorm (arXiv 1807.03039) over ``(N, C, *)``, initialised by the first batch in training mode.

    Args:
        num_features: C.
        eps: Added to the standard deviation of the first batch.
        dim: Channel axis of the input, not 0.
        device: Of parameters and buffers.
        dtype: Of the parameters.

    Example:
        >>> norm = ActNorm(3)
        >>> y, log_det = norm(torch.randn(4, 3, 5, 5), return_log_det=True)
        >>> log_det.shape
        torch.Size([4])
    """

    fixed_in_training = True
    initialized: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-6,
        dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1 or eps < 0 or dim == 0:
            raise ValueError("give num_features >= 1, eps >= 0 and a channel axis other than 0")
        self.num_features = num_features
        self.eps = eps
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))

    def forward(self, x: Tensor, return_log_det: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return ``y``, of the shape of ``x``; with ``return_log_det`` also the log-determinant per sample, ``(N,)``.

        Raises:
            NormfuseError: Called in eval mode before the first batch.
            ValueError: Another number of channels.
        """
        axis = self._axis(x)
        if not torch.compiler.is_exporting() and not self.initialized:  # an exporter follows no value
            if not self.training:
                raise NormfuseError("ActNorm has not seen its first batch: call it once in training mode")
            self._initialize(x, axis)
        y = x * self._along(self.weight, axis, x) + self._along(self.bias, axis, x)
        return (y, self._log_det(x, axis)) if return_log_det else y

    def inverse(self, y: Tensor) -> Tensor:
        """Return the ``x`` of which the forward makes ``y``."""
        axis = self._axis(y)
        return (y - self._along(self.bias, axis, y)) / self._along(self.weight, axis, y)

    @torch.no_grad()
    def _initialize(self, x: Tensor, axis: int) -> None:
        rows = x.movedim(axis, 0).flatten(1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        scale = 1 / (rows.std(1, unbiased=False) + self.eps)
        self.weight.copy_(scale)
        self.bias.copy_(-scale * rows.mean(1))
        self.initialized.fill_(True)

    def _log_det(self, x: Tensor, axis: int) -> Tensor:
        positions = x[0].numel() // x.shape[axis]
        return (positions * self.weight.abs().log().sum()).expand(x.shape[0])

    def _axis(self, x: Tensor) -> int:
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.num_features:
            raise ValueError(f"input {tuple(x.shape)} has not {self.num_features} channels on axis {self.dim}")
        return self.dim % x.dim()

    @staticmethod
    def _along(values: Tensor, axis: int, x: Tensor) -> Tensor:
        return values.reshape([-1 if i == axis else 1 for i in range(x.dim())])

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return ``(s, b)``, each ``(C,)``, in float64 on the CPU."""
        return exact(self.weight), exact(self.bias)

    def is_ready(self) -> bool:
        """Whether the first batch was seen."""
        return bool(self.initialized)

    def is_map_of(self, *_args: Any, **_kwargs: Any) -> bool:
        """Whether the log-determinant is not asked for."""
        return not (_kwargs.get("return_log_det") or any(_args[1:2]))

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.num_features}, eps={self.eps}, dim={self.dim}"
