"""Print the smallest member with a BatchNorm of every timm module: the table in ``zoo_networks.py``.

Networks are built on the meta device, so that no memory is filled; timm's ``test_`` networks are not candidates.
"""

from __future__ import annotations

import warnings

import timm
import torch
import zoo_calibrate
from torch import nn


def main() -> None:
    """Print one table row per timm module that has a member with stored statistics."""
    warnings.simplefilter("ignore")
    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
            if not name.startswith("test_") and has_batch_norm(model):
                sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes:
            print(f'    "{module}": "{min(sizes, key=lambda name: sizes[name])}",', flush=True)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether any layer stores running statistics."""
    return any(zoo_calibrate.has_statistics(module) for module in model.modules())


if __name__ == "__main__":
    main()
