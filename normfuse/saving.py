"""Write a model to a file that cannot be mistaken for something else.

A ``.pt`` file is the ``state_dict()`` of the model and, beside the tensors, its manifest as JSON text. The key of the
manifest says what to do, because ``load_state_dict`` on the unfolded model prints it. Each entry is a tensor or a text,
so the file loads with ``weights_only=True``. Without ``arch`` it also holds the module, pickled without those tensors,
as one tensor of bytes: that part is read only where no architecture is given, and follows the rules for pickles.

A ``.safetensors`` file holds tensors, and the manifest in its metadata.
"""

from __future__ import annotations

import copy
import io
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse import deploy, digests
from normfuse.atomic_files import staged
from normfuse.capture import unwrap
from normfuse.errors import NormfuseError
from normfuse.layers import change_of_class
from normfuse.manifest import make_manifest
from normfuse.report import Report

FOLDED_KEY = "this_checkpoint_is_folded__load_it_with_normfuse.load"
PLAIN_KEY = "normfuse_manifest"
MODULE_KEY = "normfuse_module"
ALIASES_KEY = "normfuse_aliases"


def save(
    model: nn.Module,
    path: str | Path,
    *,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    verification: Any = None,
) -> None:
    """Save a model, folded or not, so that :func:`normfuse.load` rebuilds it; one in Tune mode as it was before.

    Args:
        model: The model.
        path: Where to. ``.safetensors`` writes that format, any other extension a torch file. An existing file is
            replaced at once when the new one is complete; after a failure nothing is left behind.
        arch: How to build the unfolded model: ``timm:NAME``, ``torchvision:NAME``, ``package.module:factory``. Without
            it a torch file also holds the pickled module; a ``.safetensors`` file then needs one when it is loaded.
        arch_kwargs: Keyword arguments for the architecture; JSON values.
        verification: A :class:`normfuse.Comparison` or a dictionary to keep in the manifest.

    Raises:
        NormfuseError: The model cannot be pickled, or the format cannot hold it.
    """
    model, path = unwrap(model), Path(path)
    with change_of_class.left(model), staged(path) as temporary:
        manifest = complete_manifest(model, arch, arch_kwargs, verification)
        manifest["digests"] = digests.of_all(model.state_dict())
        if path.suffix == ".safetensors":
            _write_safetensors(model, manifest, temporary)
        else:
            _write_torch(model, manifest, temporary)


def complete_manifest(
    model: nn.Module, arch: str | None, arch_kwargs: Mapping[str, Any] | None, verification: Any
) -> dict[str, Any]:
    """Return the manifest of the file: the model's own, or one without edits; with what only the file knows."""
    state = model.state_dict(keep_vars=True)
    manifest = deploy.manifest_of(model) or make_manifest(model, list(state), [], Report(()))
    buffers = [key for key, value in state.items() if not isinstance(value, nn.Parameter)]
    to_dict = getattr(verification, "to_dict", None)
    kept = {
        "arch": {"name": arch, "kwargs": dict(arch_kwargs or {})} if arch else manifest.get("arch"),
        "buffers": buffers,
        "keys": {**manifest["keys"], "after": list(state)},
        "verify": (to_dict() if to_dict else verification) or manifest["verify"],
    }
    return {**manifest, **kept}


def _write_torch(model: nn.Module, manifest: Mapping[str, Any], path: Path) -> None:
    state = model.state_dict()
    entries = OrderedDict({FOLDED_KEY if deploy.has_other_keys(manifest) else PLAIN_KEY: json.dumps(manifest), **state})
    if hasattr(state, "_metadata"):
        entries._metadata = state._metadata  # type: ignore[attr-defined] - as state_dict() itself does
    if not manifest["arch"]:
        entries[MODULE_KEY] = torch.frombuffer(bytearray(_pickled_skeleton(model)), dtype=torch.uint8)
    with open(path, "wb") as file:
        torch.save(entries, file)


def _pickled_skeleton(model: nn.Module) -> bytes:
    """Return the module pickled with one shared zero in each tensor of its state dict: structure without weights."""
    memo: dict[int, Any] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            empty = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    buffer = io.BytesIO()
    try:
        skeleton = copy.deepcopy(_without_guard(model), memo)
        torch.save(skeleton, buffer)
    except Exception as error:  # whatever the user's classes raise when they are copied or pickled
        remedy = "pass arch=, such as arch='package.module:factory', so that it need not be"
        if isinstance(model, fx.GraphModule):
            remedy = "export it again with torch.export.export, or write it as ONNX with normfuse export"
        text = f"this {type(model).__name__} cannot be pickled ({type(error).__name__}: {error}); {remedy}"
        raise NormfuseError(text) from error
    return buffer.getvalue()


def _without_guard(model: nn.Module) -> nn.Module:
    """Return a shallow copy without what only a live folded model carries; the file has the manifest already."""
    shallow = copy.copy(model)
    vars(shallow).pop(deploy.MANIFEST, None)
    vars(shallow).pop("train", None)
    return shallow


def _write_safetensors(model: nn.Module, manifest: Mapping[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise NormfuseError(f"{key} is a {type(value).__name__}, which .safetensors cannot hold; save as .pt")
        source = first.setdefault(_identity(value), key)
        if source == key:
            tensors[key] = value.detach().cpu().contiguous().clone()  # a clone: no two may share memory
        else:
            aliases[key] = source
    metadata = {"format": "pt", PLAIN_KEY: json.dumps(manifest), ALIASES_KEY: json.dumps(aliases)}
    save_file(tensors, path, metadata=metadata)


def _identity(tensor: Tensor) -> tuple:
    """Return what two tensors have in common exactly when one is the other; empty ones are all told apart."""
    place = tensor.data_ptr() or id(tensor)
    return place, tensor.shape, tensor.stride(), tensor.dtype, tensor.device
