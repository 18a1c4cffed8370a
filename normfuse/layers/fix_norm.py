"""FixNorm: word embeddings of length one, as a parametrization.

*Transformers without Tears*, arXiv 1910.05895:      e_i = s E_i / |E_i|,      s fixed

where the paper's code scales the embeddings that are read and takes the unit vectors as the output projection. It does
not depend on the input: the materialize pass computes the table once, and what reads the weight of the embedding,
such as a tied projection ``F.linear(h, embedding.weight)``, reads the same table.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FixNorm(nn.Module):
    """Rows of length ``scale`` (arXiv 1910.05895), as a parametrization of a table ``(rows, d)``.

    Args:
        scale: s, the length of a row.
        eps: Least length that a row is divided by.

    Raises:
        ValueError: ``scale`` is not positive.

    Example:
        >>> table = nn.Embedding(10, 4)
        >>> table = nn.utils.parametrize.register_parametrization(table, "weight", FixNorm())
        >>> bool((table.weight.norm(dim=1) - 1).abs().max() < 1e-6)
        True
    """

    def __init__(self, scale: float = 1.0, eps: float = 1e-12) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"scale is positive, not {scale}")
        self.scale = scale
        self.eps = eps

    def forward(self, table: Tensor) -> Tensor:
        """Return the table with rows of one length."""
        return self.scale * F.normalize(table, dim=1, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"scale={self.scale}, eps={self.eps}"
