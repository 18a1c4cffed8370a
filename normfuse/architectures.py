"""Build a model from the name of its architecture: ``timm:NAME``, ``torchvision:NAME``, ``package.module:factory``.

The first two make the untrained network; nothing is downloaded unless the caller's keyword arguments ask for it. The
third imports the module, from the current folder too, and calls the class or function: that is the user's own code.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from normfuse.errors import LoadError, MissingDependencyError

DOWNLOADS = ("pretrained", "weights", "checkpoint", "cache_dir")
"""How the keyword arguments begin that make a zoo fetch or open files."""


def build(spec: str, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a new model.

    Args:
        spec: ``timm:resnet18``, ``torchvision:resnet18`` or ``package.module:factory``.
        kwargs: Keyword arguments for the architecture.

    Raises:
        LoadError: No such architecture, or it cannot be built with these arguments.
        MissingDependencyError: The package that has it is not installed.
    """
    source, separator, name = spec.partition(":")
    if not separator or not source or not name:
        raise LoadError(f"--arch {spec}: write it as timm:NAME, torchvision:NAME or package.module:factory")
    factories = {"timm": _timm, "torchvision": _torchvision}
    factory, defaults = factories.get(source, _factory)(*((name,) if source in factories else (source, name)))
    model = _call(spec, factory, {**defaults, **(kwargs or {})})
    if not isinstance(model, nn.Module):
        raise LoadError(f"--arch {spec} made a {type(model).__name__}, not a torch.nn.Module")
    return model


def parse_kwargs(pairs: Iterable[str]) -> dict[str, Any]:
    """Return keyword arguments from ``name=value`` texts; a value is a Python literal, otherwise a string.

    Raises:
        LoadError: A text has no ``=``, or its left side is not a name.
    """
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.isidentifier():
            raise LoadError(f"--arch-kwargs {pair}: write it as name=value")
        try:
            kwargs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            kwargs[key] = text
    return kwargs


def is_harmless(spec: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a *file* may ask for this architecture: a name listed by a zoo, with nothing to download or import."""
    source, _, name = spec.partition(":")
    if source not in ("timm", "torchvision") or any(key.startswith(DOWNLOADS) for key in kwargs):
        return False
    listed = _zoo(source).list_models() if source == "timm" else _zoo("torchvision").models.list_models()
    return name.partition(".")[0] in listed


def _call(spec: str, factory: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return factory(**kwargs)
    except (LoadError, MissingDependencyError):
        raise
    except Exception as error:  # the user's own code, or a zoo's: it can raise anything
        arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise LoadError(f"--arch {spec}({arguments}) failed: {type(error).__name__}: {error}") from error


def _zoo(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"{package} is not installed; run: pip install {package}") from error


def _timm(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    timm = _zoo("timm")
    if not timm.is_model(name):
        raise LoadError(_unknown("timm", name, timm.list_models()))
    return lambda **kwargs: timm.create_model(name, **kwargs), {"pretrained": False}


def _torchvision(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    models = _zoo("torchvision").models
    if name not in models.list_models():
        raise LoadError(_unknown("torchvision", name, models.list_models()))
    builder = models.get_model_builder(name)
    optional = {"weights", "weights_backbone"} & set(inspect.signature(builder).parameters)
    return builder, dict.fromkeys(sorted(optional))


def _unknown(source: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"--arch {source}:{name}: {source} has no such model{hint}"


def _factory(module: str, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    with _current_folder_on_path():
        try:
            found: Any = importlib.import_module(module)
        except ImportError as error:
            raise LoadError(f"--arch {module}:{name}: cannot import {module}: {error}") from error
        except Exception as error:  # the user's own code
            raise LoadError(f"--arch {module}:{name}: {module} failed: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise LoadError(f"--arch {module}:{name}: {module} has no {name}")
        found = getattr(found, part)
    if not callable(found):
        raise LoadError(f"--arch {module}:{name} is a {type(found).__name__}, not a class or function")
    return found, {}


@contextlib.contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Let a module in the current folder be found, after every installed one."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
