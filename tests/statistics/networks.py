"""Small networks with BatchNorms, in float64, and data for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.parity import randomize_norms


def network(seed: int = 0, *, classes: int = 6) -> nn.Sequential:
    """Return two convolutions with norms and a linear layer with one; it takes ``(N, 3, 7, 7)``."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, classes)),
    )
    return randomize_norms(model.double().eval(), seed)  # type: ignore[return-value]


def images(count: int, seed: int = 0) -> Tensor:
    """Return random pictures ``(count, 3, 7, 7)``, each with a mean and contrast of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 7, 7, generator=generator, dtype=torch.float64)
    level, contrast = torch.randn(2, count, 3, 1, 1, generator=generator, dtype=torch.float64)
    return x * contrast.exp() + 3 * level


def norms_of(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorms of a model in order."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
