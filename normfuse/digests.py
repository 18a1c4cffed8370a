"""A digest of each tensor of a file of ours, so that a damaged weight is an error and not another network.

The manifest holds SHA-256 of the elements in order, in the byte order of the file, and of dtype and shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import LoadError


def of(tensor: Tensor) -> str:
    """Return the digest of a tensor's elements, dtype and shape, as text."""
    made = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    plain = tensor.detach().cpu().contiguous().flatten()
    if plain.numel():
        made.update(plain.view(torch.uint8).numpy().data)
    return made.hexdigest()[:32]


def of_all(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of the dense tensors of a state dict, by name."""
    return {name: of(value) for name, value in state.items() if _is_dense(value)}


def require(state: Mapping[str, Any], expected: Any, path: object) -> None:
    """Refuse tensors that are not those that were saved.

    Args:
        state: The tensors of the file.
        expected: Their digests, as the manifest holds them.
        path: The file, for the error.

    Raises:
        LoadError: One differs, or has none.
    """
    known = expected if isinstance(expected, Mapping) else {}
    for name, value in state.items():
        if _is_dense(value) and of(value) != known.get(name):
            raise LoadError(f"{path}: {name} is not what was saved: the file is damaged; copy or download it again")


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized and not value.is_meta
