"""Save and load models; :mod:`normfuse.saving` describes the files, :mod:`normfuse.rebuild` how a model is rebuilt.

Any file that can hold a model is accepted, told apart by its content; what could run code is refused unless trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from normfuse import deploy
from normfuse.capture import unwrap
from normfuse.errors import LoadError
from normfuse.formats import Format, sniff
from normfuse.rebuild import LoadedModel, Manifest, Request, parse_manifest, rebuild
from normfuse.saving import ALIASES_KEY, FOLDED_KEY, PLAIN_KEY, save
from normfuse.state_dicts import StateDict, unnest
from normfuse.unpickle import unpickle

__all__ = ["LoadedModel", "load", "read", "save"]

REFUSED = {
    Format.EMPTY: "the file is empty",
    Format.TRUNCATED: "the file is truncated or damaged; copy or download it again",
    Format.PICKLE: "a plain Python pickle, not a file of torch.save; save the model's state_dict with torch.save",
    Format.UNKNOWN: "not a model file that normfuse knows (.pt, .pth, .safetensors, .pt2, .onnx)",
    Format.ONNX: "an ONNX graph, not a torch model; normfuse export, verify and bench take it",
    Format.TORCHSCRIPT: (
        "TorchScript, whose layers can no longer be edited; load the python model it was made from, save its "
        "state_dict with torch.save(model.state_dict(), ...) and pass that file with --arch"
    ),
}


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    allow_globals: Sequence[str] = (),
    trust_pickle: bool = False,
) -> nn.Module:
    """Return the model in a file, in eval mode on the CPU; a folded one refuses ``.train()``.

    Args:
        path: A file of :func:`normfuse.save`, a state dict, a pickled module, or an ExportedProgram.
        model: An unfolded model of the same architecture, to build from; it is copied, not changed.
        arch: Or how to build one: ``timm:NAME``, ``torchvision:NAME``, ``package.module:factory``.
        arch_kwargs: Keyword arguments for the architecture.
        allow_globals: Names, ``"package.module.Class"``, that a pickle in the file may use beyond the safe ones.
        trust_pickle: Load pickles without restriction, which runs code from the file.

    Raises:
        LoadError: The file is damaged, unsafe, of another architecture, or needs one to be named.
    """
    return read(
        path,
        model=model,
        arch=arch,
        arch_kwargs=arch_kwargs,
        allow_globals=allow_globals,
        trust_pickle=trust_pickle,
    ).model


def read(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    allow_globals: Sequence[str] = (),
    trust_pickle: bool = False,
) -> LoadedModel:
    """Return the model in a file with what else the file says; arguments and errors as :func:`load`."""
    found = sniff(path)
    if found in REFUSED:
        raise LoadError(f"{path}: {REFUSED[found]}")
    request = Request(Path(path), model, arch, arch_kwargs or {}, allow_globals, trust_pickle, found)
    if found is Format.EXPORTED:
        return _read_exported(request)
    if found is Format.SAFETENSORS:
        return rebuild(*_read_safetensors(request.path), request)
    return _from_object(unpickle(path, allow_globals=allow_globals, trust_pickle=trust_pickle), request)


def _read_exported(request: Request) -> LoadedModel:
    from normfuse.exported_modules import as_module
    from normfuse.exported_program import example_inputs, load_exported_program

    program = load_exported_program(request.path, trust_pickle=request.trust_pickle)
    return LoadedModel(as_module(program), request.format, example_inputs=example_inputs(program))


def _read_safetensors(path: Path) -> tuple[StateDict, Manifest | None]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
        aliases = json.loads(metadata.get(ALIASES_KEY, "{}"))
        state |= {key: state[source] for key, source in aliases.items()}
    except Exception as error:  # SafetensorError is not exported by every version
        raise LoadError(f"{path}: damaged safetensors file ({error})") from error
    return state, parse_manifest(metadata.get(PLAIN_KEY), path)


def _from_object(loaded: Any, request: Request) -> LoadedModel:
    if isinstance(loaded, Mapping):
        key = next((key for key in (FOLDED_KEY, PLAIN_KEY) if isinstance(loaded.get(key), str)), None)
        if key is not None:
            state = {name: value for name, value in loaded.items() if name != key}
            return rebuild(state, parse_manifest(loaded[key], request.path), request)
        loaded = unnest(loaded, request.path, request.notes)
    if isinstance(loaded, nn.Module):
        return _from_module(loaded, request)
    if isinstance(loaded, Mapping):
        return rebuild(loaded, None, request)
    raise LoadError(f"{request.path}: holds a {type(loaded).__name__}, not a model or a state_dict")


def _from_module(loaded: nn.Module, request: Request) -> LoadedModel:
    inner = unwrap(loaded)
    if inner is not loaded:
        request.notes.append(f"took the model out of its {type(loaded).__name__}")
    if request.arch or request.model is not None:
        request.notes.append("the file holds the model itself; the architecture that was given is not used")
        request.arch = None
    if any(module.training for module in inner.modules()):
        request.notes.append("the model was saved in training mode; what is worked on is its eval form")
    return request.done(inner, deploy.manifest_of(inner))
