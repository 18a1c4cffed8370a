"""The constants of normalizer-free residual networks.

*Characterizing signal propagation to close the performance gap in unnormalized ResNets*, arXiv 2101.08692, and NFNets,
arXiv 2102.06171:

    x_{l+1} = x_l + alpha f_l(x_l / beta_l),      beta_0 = 1,   beta_{l+1}^2 = beta_l^2 + alpha^2,
    and beta^2 = 1 + alpha^2 after a block that changes the width

An activation times its gain keeps the variance 1 of a Gaussian. All of these are constants: as a
:class:`ConstantScale` they move into the weights around them (fold-affine), as the gain of a scaled weight
standardization they are part of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_GAINS = {
    "identity": 1.0,
    "relu": 1.7139588594436646,
    "silu": 1.7881293296813965,
    "gelu": 1.7015043497085571,
    "tanh": 1.5939117670059204,
}


def activation_gain(name: str) -> float:
    """Return the gain that makes an activation of Gaussian values of variance 1, as the authors sampled it (to 0.2 %).

    Args:
        name: ``"identity"``, ``"relu"``, ``"silu"``, ``"gelu"`` or ``"tanh"``.

    Raises:
        ValueError: Another name.
    """
    if name not in _GAINS:
        raise ValueError(f"no gain is known of {name!r}; there are {', '.join(_GAINS)}")
    return _GAINS[name]


def residual_betas(transitions: list[bool], alpha: float = 0.2) -> list[float]:
    """Return beta_l of each block.

    Args:
        transitions: For each block in order, whether it changes the width.
        alpha: The factor of the branches.
    """
    betas, variance = [], 1.0
    for changes in transitions:
        betas.append(variance**0.5)
        variance = 1 + alpha**2 if changes else variance + alpha**2
    return betas


class ConstantScale(nn.Module):
    """Multiply by a constant, which fold-affine moves into the weights before or behind it.

    Args:
        value: The constant: alpha, 1 / beta or the gain of an activation. It is a parameter that is not trained.

    Example:
        >>> ConstantScale(0.2)(torch.ones(2))
        tensor([0.2000, 0.2000])
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, scaled."""
        return x * self.value
