"""What the norms of :mod:`normfuse.layers` have in common that become a fixed affine map in eval mode."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor


class AffineInference:
    """A norm whose inference form is ``y = a x + c``, with ``a`` and ``c`` per channel along axis ``dim``.

    Attributes:
        dim: The channel axis of the input; may be negative.
        fixed_in_training: Whether the map is the same in training mode.
    """

    dim: int
    fixed_in_training: ClassVar[bool] = False

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return ``(a, c)``, each ``(C,)`` in float64 on the CPU."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Whether the map has its values."""
        return True

    def is_map_of(self, *_args: Any, **_kwargs: Any) -> bool:
        """Whether a call with these arguments returns the map of its input and nothing else."""
        return True
