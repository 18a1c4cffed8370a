"""What the norms of :mod:`normfuse.layers` have in common that become a fixed affine map in eval mode."""

from __future__ import annotations

from torch import Tensor


class AffineInference:
    """A norm whose inference form is ``y = a x + c``, with ``a`` and ``c`` per channel along axis ``dim``.

    Attributes:
        dim: The channel axis of the input; may be negative.
    """

    dim: int

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return ``(a, c)``, each ``(C,)`` in float64 on the CPU."""
        raise NotImplementedError
