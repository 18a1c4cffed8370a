"""IBN: half of the channels through an InstanceNorm, the rest through a BatchNorm.

*Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net*, arXiv 1807.09441, of which this is IBN-a:

    h = floor(r C);      y = concat(IN(x[:h]), BN(x[h:]))

The BatchNorm folds: into the rows of the layer before it from h on. The InstanceNorm stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class IBN(nn.Module):
    """Instance-batch normalization (arXiv 1807.09441) over ``(N, C, H, W)``.

    The names of its tensors are those of the authors' code (``IN.weight``, ``BN.running_mean``, ...).

    Args:
        num_features: C.
        ratio: r, the part of the channels that goes through the InstanceNorm.
        device: Of parameters and buffers.
        dtype: Of the parameters and buffers.

    Raises:
        ValueError: One of the halves would be empty.

    Example:
        >>> IBN(8)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        ratio: float = 0.5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.instance_features = int(num_features * ratio)
        if not 0 < self.instance_features < num_features:
            raise ValueError(f"ratio={ratio} leaves no channel of {num_features} for one of the two norms")
        self.IN = nn.InstanceNorm2d(self.instance_features, affine=True, device=device, dtype=dtype)
        self.BN = nn.BatchNorm2d(num_features - self.instance_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``x``, of its shape."""
        first, rest = x.split([self.instance_features, x.shape[1] - self.instance_features], dim=1)
        return torch.cat([self.IN(first), self.BN(rest)], dim=1)
