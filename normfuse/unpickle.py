"""Load a file of ``torch.save`` without running code from it.

The pickle is read as data, checked as a whole, and only then made (:mod:`normfuse.pickles`). What is not known to be
inert is refused with the ways out: a state dict, ``--allow-global`` for a class of modules, ``--trust-pickle``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from normfuse.errors import LoadError, shown
from normfuse.pickles.allowed import Allowed
from normfuse.pickles.archives import open_archive
from normfuse.pickles.checks import Checker, looks_like_a_module, path_of
from normfuse.pickles.objects import Builder

WAYS_OUT = (
    "save a state_dict instead (torch.save(model.state_dict(), ...)) and load it with --arch, "
    "or pass --trust-pickle: it runs code from the file, use it only if you trust its source"
)
_MOST_NAMED = 8


def unpickle(path: str | Path, *, allow_globals: Sequence[str] = (), trust_pickle: bool = False) -> Any:
    """Return the object in a file that ``torch.save`` wrote, on the CPU.

    Args:
        path: A state dict or a pickled module, in the zip or the legacy format.
        allow_globals: Further classes of modules, ``"package.module.Class"``, that the file may use; their modules are
            imported.
        trust_pickle: Load without any restriction. This runs code from the file.

    Raises:
        LoadError: The file is damaged, or asks for what is not allowed; the text says what, and the ways out.
    """
    with open(path, "rb") as file:
        return unpickle_stream(file, path, allow_globals=allow_globals, trust_pickle=trust_pickle)


def unpickle_stream(
    file: IO[bytes], source: str | Path, *, allow_globals: Sequence[str] = (), trust_pickle: bool = False
) -> Any:
    """Do the same with an open file; ``source`` names it in errors. See :func:`unpickle`."""
    if trust_pickle:
        return _trusted(file, source)
    allowed = Allowed(allow_globals)
    checker = Checker(allowed)
    try:
        archive = open_archive(file)
        unknown = checker.unknown(archive.description)
        if unknown:
            raise LoadError(refusal(source, unknown))
        checker.require(archive.description)
        return Builder(archive, allowed).build(archive.description)
    except LoadError as error:
        known = str(source) in str(error)
        raise error if known else LoadError(f"{source}: {error}; {WAYS_OUT}") from error
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise LoadError(f"{source}: damaged, or not a file of torch.save ({_first_line(error)}); {WAYS_OUT}") from error


def refusal(source: str | Path, unknown: Iterable[Any]) -> str:
    """Return the error text for what is not allowed, with the ways out.

    Args:
        source: The file.
        unknown: What the description makes of, or refers to by, each name.
    """
    things = list(unknown)
    names = [str(path_of(thing)) for thing in things]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    layers = [name for name, thing in zip(names, things, strict=True) if looks_like_a_module(thing)]
    allow = " ".join(f"--allow-global {name}" for name in layers) if len(layers) == len(names) else ""
    return (
        f"{source} asks for {', '.join(names[:_MOST_NAMED])}{more}, which normfuse does not allow by itself; ways out: "
        "save a state_dict (torch.save(model.state_dict(), ...)) and load it with --arch; "
        f"{allow + ', if these layers are yours; ' if allow else ''}"
        "or --trust-pickle: loading this file runs code from it, use it only if you trust its source"
    )


def _trusted(file: IO[bytes], source: str | Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old storages and protocols: not the user's to act on
            return torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever the code in the file raises
        text = f"{source}: damaged, or written by a program that normfuse does not know ({_first_line(error)})"
        raise LoadError(text) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": "))[:300]
