"""List the classes that a pickled model may be made of: ``python benchmarks/list_inert_classes.py``.

Every class of ``nn.Module`` that torch, torchvision, timm, transformers and normfuse define in :data:`PACKAGES`, but
those that compile code, and those of whose methods one could run what an attribute of its state chooses: see
:func:`faults`. What a method calls on ``self``, and functions of its own package, are followed. The list is written to
``normfuse/pickles/inert_classes.json``, with the versions; what was refused, and why, is printed.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from normfuse.pickles.allowed import is_plain_module_class

OUTPUT = Path(__file__).resolve().parent.parent / "normfuse" / "pickles" / "inert_classes.json"
PACKAGES = (
    *("torch.nn.modules", "torch.nn.utils", "torch.nn.parallel.data_parallel", "torchvision.models", "torchvision.ops"),
    *("torchvision.transforms", "timm.layers", "timm.models", "transformers.models", "transformers.activations"),
    *("transformers.modeling_layers", "transformers.modeling_utils", "transformers.pytorch_utils"),
    *("normfuse.layers", "normfuse.quantization"),
)
"""torch.jit, torch.fx and torch.distributed compile code or open connections, and are left out."""

ROOTS = (
    *("forward", "__call__", "__setstate__", "__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__"),
    *("__getattr__", "__getattribute__", "__setattr__", "__delattr__", "__dir__", "__repr__", "__len__", "__iter__"),
    *("__getitem__", "__contains__", "__eq__", "__hash__", "__bool__", "__del__", "__class_getitem__", "extra_repr"),
    *("train", "eval", "_apply", "apply", "to", "half", "float", "double", "state_dict", "load_state_dict"),
    *("_load_from_state_dict", "_save_to_state_dict", "named_parameters", "named_buffers", "named_modules", "children"),
)
"""Methods that loading, copying, reading, running or saving a model calls."""

CALLS = frozenset({"exec", "eval", "compile", "open", "__import__", "input", "breakpoint", "execfile"})
MODULES = frozenset(
    {"importlib", "subprocess", "pickle", "ctypes", "runpy", "socket", "urllib", "requests", "shutil", "marshal", "pty"}
)
ATTRIBUTES = frozenset({"recompile", "load_state_dict_from_url", "load_library", "load_inline", "system", "popen"})
TORCH = frozenset({"torch.load", "torch.compile", "torch.hub.load", "torch.jit.script", "torch.jit.load"})


def faults(function: Any) -> Iterator[str]:
    """Yield what a function does that a state could turn into running anything."""
    for node in ast.walk(tree_of(function)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        if called in CALLS or called in TORCH or name in ATTRIBUTES or called.partition(".")[0] in MODULES:
            yield f"calls {called}"
        got = node.func if isinstance(node.func, ast.Call) and ast.unparse(node.func.func) == "getattr" else None
        if got is not None and not isinstance(got.args[1], ast.Constant):
            yield f"calls an attribute by a computed name: {called}"
        if called == "os.system" or called.startswith(("os.exec", "os.spawn", "os.popen", "os.remove", "os.unlink")):
            yield f"calls {called}"


@functools.cache
def tree_of(function: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return ast.Module([], [])


def reached(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, function)`` for the methods that run, and for those that they call on ``self``."""
    todo, seen = [name for name in ROOTS if function_of(cls, name)], set()
    todo += [name for name, value in inspect.getmembers_static(cls) if isinstance(value, property)]
    while todo:
        name = todo.pop()
        function = None if name in seen else function_of(cls, name)
        seen.add(name)
        if function is None or is_plain_torch(function):
            continue
        yield name, function
        for node in ast.walk(tree_of(function)):
            owner = node.value if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Attribute) and isinstance(owner, ast.Name) and owner.id in ("self", "cls"):
                todo.append(node.attr)
        for helper in helpers(function):
            yield helper.__name__, helper


def helpers(function: Any) -> list[Any]:
    """Return the functions of the same top package that a function calls by their plain names."""
    plain = inspect.unwrap(function)
    space = getattr(plain, "__globals__", {})
    package = getattr(plain, "__module__", "").partition(".")[0]
    names = {n.func.id for n in ast.walk(tree_of(function)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    found = [space.get(name) for name in sorted(names)]
    return [f for f in found if isinstance(f, types.FunctionType) and f.__module__.partition(".")[0] == package]


def function_of(cls: type, name: str) -> Any | None:
    try:
        value = inspect.getattr_static(cls, name)
    except AttributeError:
        return None
    if isinstance(value, property):
        return value.fget
    value = getattr(value, "__func__", value)
    return value if isinstance(value, types.FunctionType) else None


def is_plain_torch(function: Any) -> bool:
    """Whether a function is one of ``nn.Module`` itself, which a person has read."""
    return function.__qualname__.startswith("Module.") and function.__module__ == "torch.nn.modules.module"


def modules_of(package: str) -> Iterator[types.ModuleType]:
    """Yield a module and all below it that can be imported here."""
    try:
        root = importlib.import_module(package)
    except ImportError:
        return
    yield root
    for info in pkgutil.walk_packages(getattr(root, "__path__", ()), f"{package}.", onerror=lambda name: None):
        stem = info.name.rpartition(".")[2]
        if "transformers.models" in info.name and not (info.ispkg or stem.startswith(("modeling_", "configuration_"))):
            continue
        try:
            yield importlib.import_module(info.name)
        except Exception as error:  # an optional dependency that is not installed here
            print(f"not imported: {info.name} ({type(error).__name__})", file=sys.stderr)


def is_config(cls: type) -> bool:
    names = {base.__name__ for base in cls.__mro__ if base.__module__ == "transformers.configuration_utils"}
    return bool(names & {"PretrainedConfig", "PreTrainedConfig"})


def collect() -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, str]]:
    """Return the modules and records that are listed, by where they are defined; and what is refused, and why."""
    listed: dict[str, set[str]] = collections.defaultdict(set)
    records: dict[str, set[str]] = collections.defaultdict(set)
    refused: dict[str, str] = {}
    for package in PACKAGES:
        for module in modules_of(package):
            for name, cls in vars(module).items():
                if not isinstance(cls, type) or cls.__module__ != module.__name__ or cls.__qualname__ != name:
                    continue
                table = listed if issubclass(cls, nn.Module) else records if is_config(cls) else None
                if table is None:
                    continue
                found = [f"{method} {fault}" for method, function in reached(cls) for fault in faults(function)]
                if table is listed and not is_plain_module_class(cls):
                    found.append("compiles code")
                if found:
                    refused[f"{cls.__module__}.{name}"] = found[0]
                else:
                    table[cls.__module__].add(name)
    tables = [{module: sorted(names) for module, names in sorted(table.items())} for table in (listed, records)]
    return tables[0], tables[1], refused


def as_text(document: dict[str, dict[str, Any]]) -> str:
    """Return the list as JSON, one module a line, so that a change of it can be read."""
    parts = []
    for key, table in document.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table.items())
        parts.append(f"{json.dumps(key)}: {{\n{lines}\n}}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Write the list, and print what is not on it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    listed, records, refused = collect()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "transformers")}
    document = {"versions": versions, "modules": listed, "records": records, "refused": dict(sorted(refused.items()))}
    OUTPUT.write_text(as_text(document))
    print(f"{sum(map(len, listed.values()))} classes of modules, {sum(map(len, records.values()))} of configurations")
    for name, reason in sorted(refused.items()):
        print(f"  refused: {name}: {reason}")


if __name__ == "__main__":
    main()
