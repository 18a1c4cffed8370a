"""Rebuild a model from the tensors and the manifest of a file.

A folded model is rebuilt in three steps: a fresh unfolded model, the edits of the manifest, the tensors by name; every
key must find its place. What a *file* says is trusted only as far as it cannot run code: its manifest may name an
architecture of timm or torchvision, but ``package.module:factory`` must come from the user, and the module that it may
hold is unpickled by :mod:`normfuse.unpickle`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import architectures, deploy, digests, file_limits, surgery
from normfuse.errors import LoadError
from normfuse.formats import Format
from normfuse.manifest import SCHEMA_VERSION
from normfuse.names import require_plain
from normfuse.saving import MODULE_KEY
from normfuse.state_dicts import StateDict, fit, load_strictly, strip_prefixes
from normfuse.unpickle import unpickle_stream

Manifest = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model from a file.

    Attributes:
        model: The model in eval mode, on the CPU.
        format: What the file holds.
        arch: How the unfolded model was built, where an architecture was used.
        manifest: The manifest in the file, where :func:`normfuse.save` wrote it.
        example_inputs: The sample inputs stored in the file: a tuple, or a dictionary by name.
        notes: What was done on the way that the user should know.
    """

    model: nn.Module
    format: Format
    arch: str | None = None
    manifest: Manifest | None = None
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Request:
    """What the user asked for, and what there is to say about it; the fields are the arguments of ``read``."""

    path: Path
    model: nn.Module | None
    arch: str | None
    arch_kwargs: Mapping[str, Any]
    allow_globals: Sequence[str]
    trust_pickle: bool
    format: Format
    notes: list[str] = field(default_factory=list)

    def done(self, model: nn.Module, manifest: Manifest | None = None) -> LoadedModel:
        """Return the answer, with the model in eval mode."""
        return LoadedModel(model.eval(), self.format, self.arch, manifest, notes=tuple(self.notes))


def parse_manifest(text: str | None, path: Path) -> Manifest | None:
    """Return the manifest in a file, None if it has none.

    Raises:
        LoadError: It is damaged, or of a newer normfuse.
    """
    if text is None:
        return None
    try:
        manifest = json.loads(text)
        version, keys = manifest["schema_version"], manifest["keys"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(f"{path}: the manifest in it is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise LoadError(f"{path}: written by another normfuse (manifest version {version}); update normfuse")
    texts = [key for which in ("before", "after") for key in _list_in(keys, which, path)]
    texts += [text for which in ("passes", "buffers") if which in manifest for text in _list_in(manifest, which, path)]
    edits = _list_in(manifest, "edits", path)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(edit, Mapping) for edit in edits):
        raise LoadError(f"{path}: the manifest in it is damaged (its keys or edits are of another form)")
    return manifest


def _list_in(table: Any, key: str, path: Path) -> list[Any]:
    found = table.get(key) if isinstance(table, Mapping) else None
    if not isinstance(found, list):
        raise LoadError(f"{path}: the manifest in it is damaged (no list of {key})")
    return found


def rebuild(state: StateDict, manifest: Manifest | None, request: Request) -> LoadedModel:
    """Return the model that a state dict belongs to, with its weights.

    Args:
        state: The tensors of the file by name, perhaps with the module that :func:`normfuse.save` put beside them.
        manifest: The manifest of the file; without one the model is as its class makes it.
        request: The arguments of the user.

    Raises:
        LoadError: No architecture is known, or the tensors do not fit it.
    """
    pickled = state.get(MODULE_KEY)
    state = {key: value for key, value in state.items() if key != MODULE_KEY}
    for key in state:
        require_plain(key, f"a tensor in {request.path}", LoadError)
    if manifest is None:
        model = _unfolded(None, state, request)
        load_strictly(model, strip_prefixes(state, model.state_dict().keys(), request.notes), request.path)
        return request.done(model)
    _require_keys(state, manifest, request.path)
    if manifest["schema_version"] > 1:
        digests.require(state, manifest.get("digests"), request.path)
    if pickled is not None and request.model is None and request.arch is None:
        model = _from_skeleton(pickled, state, request)
    else:
        model = _with_edits(_unfolded(manifest, state, request), state, manifest, request.path)
    load_strictly(model, state, request.path)
    loaded = request.done(model, manifest)
    if manifest.get("passes"):
        deploy.guard(model, dict(manifest))
    return loaded


def _require_keys(state: StateDict, manifest: Manifest, path: Path) -> None:
    differing = sorted(set(state) ^ set(manifest["keys"]["after"]))
    if differing:
        raise LoadError(f"{path}: its tensors are not those its manifest lists ({', '.join(differing[:3])})")


def _unfolded(manifest: Manifest | None, state: StateDict, request: Request) -> nn.Module:
    """Return a fresh model of the architecture that the user, or else the manifest, names."""
    if request.model is not None:
        if deploy.manifest_of(request.model):
            raise LoadError(f"{request.path}: model= is folded already; give an unfolded model of the architecture")
        return surgery.copy(request.model)
    if request.arch is None:
        _arch_of(manifest or {}, state, request)
    return architectures.build(str(request.arch), request.arch_kwargs)


def _arch_of(manifest: Manifest, state: StateDict, request: Request) -> None:
    """Take the architecture from the manifest, if to build it cannot run code that the file chose."""
    arch = manifest.get("arch")
    if not arch:
        raise LoadError(
            f"{request.path} holds tensors but no architecture: name it with --arch timm:NAME, torchvision:NAME or "
            "package.module:factory (in python: arch=, or model= with an unfolded model)"
        )
    given = arch.get("kwargs") if isinstance(arch, Mapping) else None
    if not isinstance(given, Mapping) or not all(isinstance(key, str) and key.isidentifier() for key in given):
        raise LoadError(f"{request.path}: the architecture in it is damaged; pass --arch")
    name, kwargs = str(arch.get("name")), {**given, **request.arch_kwargs}
    if not request.trust_pickle and not architectures.is_harmless(name, given):
        raise LoadError(
            f"{request.path} was saved from {name}; building it runs that code, so it is not done at the word of a "
            f"file: if that is what you expect, pass --arch {name}"
        )
    if not request.trust_pickle:
        file_limits.require_architecture(name, given, state, request.path)
    request.arch, request.arch_kwargs = name, kwargs


def _with_edits(model: nn.Module, state: StateDict, manifest: Manifest, path: Path) -> nn.Module:
    """Give an unfolded model the structure of the folded one."""
    if not deploy.has_other_keys(manifest):
        return model
    file_limits.require_edits(manifest["edits"], model, state, path)
    try:
        surgery.replay(model, manifest["edits"])
    except Exception as error:  # edits of a file can be wrong in any way
        raise LoadError(f"{path} does not fit the architecture: {type(error).__name__}: {error}") from error
    fit(model, state, manifest.get("buffers", ()), path)
    return model


def _from_skeleton(pickled: Tensor, state: StateDict, request: Request) -> nn.Module:
    """Return the module in the file, pickled without its state dict, with tensors that the state can be copied to."""
    try:
        file = io.BytesIO(pickled.numpy().tobytes())
    except (AttributeError, TypeError, RuntimeError) as error:
        raise LoadError(f"{request.path}: the module in it is damaged ({error})") from error
    source = f"the module in {request.path}"
    model = unpickle_stream(file, source, allow_globals=request.allow_globals, trust_pickle=request.trust_pickle)
    if not isinstance(model, nn.Module):
        raise LoadError(f"{source} is a {type(model).__name__}, not a model")
    for key, tensor in model.state_dict(keep_vars=True).items():
        saved = state.get(key)  # what is missing or of another shape is an error of the load that follows
        if isinstance(tensor, Tensor) and isinstance(saved, Tensor) and tensor.shape == saved.shape:
            tensor.data = torch.empty_like(saved)
    return model
