"""Load a pickled model without running code from the file.

``torch.load(weights_only=True)`` interprets a small part of the pickle language and calls only what it was told is
safe. Three things are added to it here.

1. The globals that the file asks for are listed first (``get_unsafe_globals_in_checkpoint`` reads opcodes, it runs
   nothing), and each must be one that :mod:`normfuse.allowed_globals` or the user allows.
2. Module classes are handed to it as stand-ins. A stand-in makes an empty instance, as unpickling a module does, and
   ignores arguments: a file can therefore never run the constructor of a class, with arguments of its choice.
3. What came out is checked: no hook and no method of a module may have been replaced by a class or a function, so
   that running the model runs the code of its classes.

Everything else is refused with the ways out: a state dict, ``--allow-global``, ``--trust-pickle``.
"""

from __future__ import annotations

import pickle
import types
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from normfuse.allowed_globals import HOOKS, calls_anything, resolve, resolve_named_by_user
from normfuse.errors import LoadError
from normfuse.formats import Format, is_data, legacy_globals, sniff_stream
from normfuse.stand_ins import PartialRecord, StandIns

WAYS_OUT = (
    "save a state_dict instead (torch.save(model.state_dict(), ...)) and load it with --arch, "
    "or pass --trust-pickle: it runs code from the file, use it only if you trust its source"
)

HOOK_TABLES = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def unpickle(path: str | Path, *, allow_globals: Sequence[str] = (), trust_pickle: bool = False) -> Any:
    """Return the object in a file that ``torch.save`` wrote, on the CPU.

    Args:
        path: A state dict or a pickled module, in the zip or the legacy format.
        allow_globals: Further names, ``"package.module.Class"``, that the file may use; their modules are imported.
        trust_pickle: Load without any restriction. This runs code from the file.

    Raises:
        LoadError: The file is damaged, or asks for names that are not allowed; the text lists them and the ways out.
    """
    with open(path, "rb") as file:
        return unpickle_stream(file, path, allow_globals=allow_globals, trust_pickle=trust_pickle)


def unpickle_stream(
    file: IO[bytes], source: str | Path, *, allow_globals: Sequence[str] = (), trust_pickle: bool = False
) -> Any:
    """Do the same with an open file; ``source`` names it in errors. See :func:`unpickle`."""
    if trust_pickle:
        return _load(file, source, weights_only=False)
    wanted = unsafe_globals(file, source)
    allowed = {name: resolve(name) for name in wanted} | {name: resolve_named_by_user(name) for name in allow_globals}
    refused = [name for name in wanted if allowed[name] is None]
    if refused:
        raise LoadError(refusal(source, refused))
    stand_ins = StandIns()
    with safe_globals(list(stand_ins.entries(allowed))):
        loaded = _load(file, source, weights_only=True)
    loaded = stand_ins.restore(loaded)
    for module in stand_ins.modules:
        _check_module(module, source)
    return loaded


def unsafe_globals(file: IO[bytes], source: str | Path) -> list[str]:
    """Return, sorted, the names that an open file asks for and that are not tensor data; executes nothing.

    Raises:
        LoadError: The pickle in the file cannot be read.
    """
    try:
        if sniff_stream(file) is Format.LEGACY:
            return sorted(name for name in legacy_globals(file) if not is_data(name))
        return sorted(set(get_unsafe_globals_in_checkpoint(file)) - {"functools.partial"})  # type: ignore[arg-type]
    except (pickle.UnpicklingError, ValueError, RuntimeError, EOFError, IndexError) as error:
        raise LoadError(f"{source}: cannot be read safely ({_last_line(error)}); {WAYS_OUT}") from error
    finally:
        file.seek(0)


def refusal(path: str | Path, names: Iterable[str]) -> str:
    """Return the error text for names that are not allowed, with the ways out."""
    names = list(names)
    allow = " ".join(f"--allow-global {name}" for name in names if not calls_anything(name))
    return (
        f"{path} asks for {', '.join(names)}, which normfuse does not allow by itself; ways out: "
        "save a state_dict (torch.save(model.state_dict(), ...)) and load it with --arch; "
        f"{allow + ', if you know what they are; ' if allow else ''}"
        "or --trust-pickle: loading this file runs code from it, use it only if you trust its source"
    )


def _load(file: IO[bytes], source: str | Path, *, weights_only: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old storages and protocols: not the user's to act on
            return torch.load(file, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise LoadError(_failure(source, error, weights_only)) from error


def _failure(path: str | Path, error: Exception, weights_only: bool) -> str:
    if weights_only and "Only persistent_load of storage is allowed" in str(error):
        return f"{path} is a pickled module in the legacy file format, which cannot be read safely; {WAYS_OUT}"
    if weights_only and isinstance(error, pickle.UnpicklingError):
        return f"{path}: refused ({_last_line(error)}); {WAYS_OUT}"
    return f"{path}: damaged, or written by a program that normfuse does not know ({_last_line(error)})"


def _last_line(error: Exception) -> str:
    """Return what torch found; its own advice, to load the file without protection, is left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "docs" not in line]
    detail = next((line for line in lines if "GLOBAL" in line or "nsupported" in line), lines[-1] if lines else "")
    return f"{type(error).__name__}: {detail.removeprefix('WeightsUnpickler error: ')}"[:300]


def _check_module(module: nn.Module, path: str | Path) -> None:
    """Refuse a module whose own code was replaced by a class or function that the file names.

    Raises:
        LoadError: An attribute hides a method, or a hook is not one that torch itself registers.
    """
    state = vars(module)
    hidden = [name for name, value in state.items() if _is_code(value) and callable(getattr(type(module), name, None))]
    hooks = [name for name in HOOK_TABLES if not _own_hooks(state.get(name, {}))]
    if hidden or hooks:
        what = f"a {type(module).__name__} has its own {', '.join(hidden + hooks)} replaced by what the file names"
        raise LoadError(f"{path}: {what}; {WAYS_OUT}")


def _is_code(value: Any) -> bool:
    return isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, PartialRecord, nn.Module)) or (
        type(value).__name__ == "partial"
    )


def _own_hooks(hooks: Any) -> bool:
    if not isinstance(hooks, dict):
        return False
    kinds = (type(getattr(hook, "hook", hook)) for hook in hooks.values())  # torch wraps some of its own
    return all(f"{kind.__module__}.{kind.__qualname__}" in HOOKS for kind in kinds)
