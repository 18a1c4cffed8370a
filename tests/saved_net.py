"""A small network that is folded, saved and loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normfuse

SUFFIXES = [".pt", ".pth", ".safetensors"]


class Net(nn.Module):
    """Two folds, a shift that needs a new bias, a tied linear, a buffer that is not saved."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, width)
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.head.weight
        self.register_buffer("offset", torch.full((width,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu().mean((2, 3))
        return self.tied(self.head(x)) + self.offset


ARCH = f"{__name__}:Net"


def net() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    for key, tensor in [*model.bn1.state_dict().items(), *model.bn2.state_dict().items()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5 if key == "running_var" else -2.0, 2.0)
    return model.eval()


def folded() -> nn.Module:
    return normfuse.fold_bn(net())


def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def unfolded() -> Net:
    return Net()
