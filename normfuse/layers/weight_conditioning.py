"""Weight conditioning and weight companding, as parametrizations. Both are reconstructions.

    *Weight Conditioning for Smooth Optimization of Neural Networks*, arXiv 2409.03424:     w_o = W_o / |W_o|_2

    *Weight Compander*, arXiv 2306.16993:      w = a arctan(v / b),      a, b > 0 learnt, one for the tensor

The first is row equilibration, the diagonal preconditioner that makes the rows of a matrix equally long; the second is
a bounded odd map of each weight. Neither formula was read in its paper. The materialize pass evaluates them once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RowEquilibration(nn.Module):
    """Rows of length one (a reconstruction of arXiv 2409.03424), as a parametrization of a weight ``(out, *)``.

    Args:
        eps: Least length that a row is divided by.

    Example:
        >>> layer = nn.utils.parametrize.register_parametrization(nn.Linear(4, 3), "weight", RowEquilibration())
        >>> bool((layer.weight.norm(dim=1) - 1).abs().max() < 1e-6)
        True
    """

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with rows of length one."""
        return nn.functional.normalize(weight.flatten(1), dim=1, eps=self.eps).reshape(weight.shape)


class WeightCompander(nn.Module):
    """A bounded odd map of each weight (a reconstruction of arXiv 2306.16993), as a parametrization.

    Args:
        a: Half of pi times it is the bound; its logarithm is learnt.
        b: Width of the part that is nearly linear; its logarithm is learnt.

    Raises:
        ValueError: ``a`` or ``b`` is not positive.

    Example:
        >>> layer = nn.utils.parametrize.register_parametrization(nn.Linear(4, 3), "weight", WeightCompander())
        >>> bool(layer.weight.abs().max() < torch.pi / 2)
        True
    """

    def __init__(self, a: float = 1.0, b: float = 1.0) -> None:
        super().__init__()
        if a <= 0 or b <= 0:
            raise ValueError(f"a and b are positive, not {a} and {b}")
        self.log_a = nn.Parameter(torch.tensor(a).log())
        self.log_b = nn.Parameter(torch.tensor(b).log())

    def forward(self, weight: Tensor) -> Tensor:
        """Return the companded weight."""
        return self.log_a.exp() * torch.arctan(weight / self.log_b.exp())
