"""What can a pickled model reach by the state it chooses for its layers? Every listed class, under an audit hook.

    python benchmarks/gadgets.py [--packages torch,timm] [--out benchmarks/results/gadgets.json]

Each class of ``normfuse/pickles/inert_classes.json``, and each record, hook and function of
:mod:`normfuse.pickles.allowed`, is filled as a file would fill it: every attribute that its methods read gets, in turn,
texts that are paths, code and names of functions, numbers, containers, modules, tensors and partials of listed
functions, all of them with a mark. Then it is copied, printed, switched, moved, saved, loaded and called. An audit
hook of the interpreter records what runs: processes, sockets, deletions in any case; code, imports and files where the
mark stands in them. Each package has a process of its own. Exit code 1 if anything was recorded.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import functools
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from list_inert_classes import function_of, reached, tree_of
from torch import nn

from normfuse.pickles.allowed import FUNCTIONS, HOOKS, RECORDS, Allowed, Kind, listed

HERE = Path(__file__).resolve().parent
MARK = "gadget_mark"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "normfuse", "others")
ALWAYS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
ALWAYS += ("subprocess.Popen", "socket.connect", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen")
MARKED = (
    "exec",
    "compile",
    "import",
    "open",
    "os.listdir",
    "os.mkdir",
    "glob.glob",
    "pickle.find_class",
    "marshal.loads",
)
SECONDS = 2

STATES: dict[str, Callable[[], Any]] = {
    "path": lambda: f"./{MARK}",
    "code": lambda: f"{MARK}()",
    "name": lambda: f"{MARK}.system",
    "method": lambda: "_get_name",
    "number": lambda: 1,
    "list": lambda: [f"{MARK}.a", 1],
    "dictionary": lambda: {"a": f"{MARK}()", MARK: 1},
    "module": nn.Identity,
    "tensor": lambda: torch.ones(2, 2),
    "partial": lambda: functools.partial(nn.functional.relu, inplace=False),
    "function": lambda: nn.functional.relu,
}

seen: list[str] = []
watching = False


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Record what the interpreter announces, while a class is tried."""
    if watching and (event.startswith(ALWAYS) or (event in MARKED and MARK in shown(arguments))):
        seen.append(f"{event}: {shown(arguments)[:120]}")


def shown(arguments: tuple[Any, ...]) -> str:
    """Return the texts among an event's arguments; nothing of theirs is called."""
    return " ".join(
        part if isinstance(part, str) else str(part) for part in arguments if isinstance(part, (str, bytes))
    )


def attributes_of(cls: type) -> list[str]:
    """Return the names that the methods of a class read from ``self``."""
    names: set[str] = set()
    for _, function in reached(cls):
        for node in ast.walk(tree_of(function)):
            owner = node.value if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Attribute) and isinstance(owner, ast.Name) and owner.id == "self":
                names.add(node.attr)
    return sorted(name for name in names if not name.startswith("__") and function_of(cls, name) is None)


def filled(cls: type, make: Callable[[], Any]) -> Any:
    """Return an instance whose state a file could have chosen."""
    made = object.__new__(cls)
    state = dict(vars(nn.Module())) if issubclass(cls, nn.Module) else {}
    for name in attributes_of(cls):
        value = make()
        if isinstance(value, nn.Module) and "_modules" in state:
            state["_modules"][name] = value
        elif isinstance(value, torch.Tensor) and "_buffers" in state:
            state["_buffers"][name] = value
        elif name not in state:
            state[name] = value
    if hasattr(made, "__setstate__"):
        made.__setstate__(state)
    else:
        vars(made).update(state)
    return made


def uses(made: Any) -> Iterator[Callable[[], object]]:
    """Yield what is done to a loaded model, by us or its user."""
    x = torch.ones(1, 2, 4, 4)
    yield lambda: copy.deepcopy(made)
    yield lambda: copy.copy(made)
    yield lambda: repr(made)
    yield lambda: list(dir(made))
    for name in ("eval", "train", "half", "float", "state_dict", "parameters", "named_modules", "extra_repr"):
        yield lambda name=name: getattr(made, name)()
    yield lambda: made.load_state_dict(made.state_dict())
    yield lambda: torch.save(made, io.BytesIO())
    for given in ((), (x,), (x[0, 0],), (x.long(),), (x, x), ([x],), ({"x": x},)):
        yield lambda given=given: made(*given)
    yield lambda: [
        getattr(made, name) for name in dir(type(made)) if isinstance(function_property(type(made), name), property)
    ]


def function_property(cls: type, name: str) -> Any:
    """Return what stands in a class under a name, without calling it."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Record events, and end what takes too long; errors of any kind are what hostile states deserve."""
    global watching
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    watching = True
    try:
        yield
    except (Exception, TimeoutError, SystemExit):
        pass
    finally:
        watching = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def tried(name: str, cls: Any) -> list[str]:
    """Return what a class or function reached, under each kind of state."""
    found: list[str] = []
    for kind, make in STATES.items():
        seen.clear()
        if not isinstance(cls, type):
            with watched():
                cls(make())
        else:
            made: list[Any] = []
            with watched():
                made.append(filled(cls, make))
            for use in uses(made[0]) if made else ():
                with watched():
                    use()
        found += [f"{name} ({kind}): {event}" for event in dict.fromkeys(seen)]
    return found


def names_of(package: str) -> list[str]:
    """Return what is allowed of a package."""
    if package == "others":
        return sorted({*FUNCTIONS, *HOOKS, *RECORDS})
    kinds = listed()
    tables = (kinds[Kind.MODULE], kinds[Kind.RECORD])
    return [
        f"{m}.{n}"
        for table in tables
        for m, names in table.items()
        for n in sorted(names)
        if m.split(".")[0] == package
    ]


def work(package: str, limit: int) -> dict[str, Any]:
    """Try every class of a package in this process."""

    def late(*_: object) -> None:
        if watching:  # one that comes late is of the use before
            raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.addaudithook(audit)
    names, events, missing = names_of(package), [], 0
    if limit and len(names) > limit:
        names = random.Random(0).sample(names, limit)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()):
        for name in names:
            try:
                found = Allowed().find(name)
            except Exception:  # an optional dependency of its package is not installed
                missing += 1
                continue
            events += tried(name, found)
    return {"tried": len(names) - missing, "not importable here": missing, "recorded": events}


def main() -> int:
    """Try every package, write the result, and return the exit code."""
    parser = argparse.ArgumentParser(description="what hostile states of listed classes reach")
    parser.add_argument("--packages", default=",".join(PACKAGES), help="separated by commas")
    parser.add_argument("--limit", type=int, default=0, help="classes of a package, drawn at random; 0 for all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gadgets.json", help="the result")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.limit)))
        return 0
    rows: dict[str, Any] = {}
    for package in options.packages.split(","):
        command = [sys.executable, __file__, "--worker", package, "--limit", str(options.limit)]
        done = subprocess.run(command, capture_output=True, text=True)
        ended = {"tried": 0, "recorded": [f"the process ended with {done.returncode}: {done.stderr[-300:]}"]}
        rows[package] = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else ended
        print(package, {key: len(v) if isinstance(v, list) else v for key, v in rows[package].items()}, flush=True)
    options.out.write_text(json.dumps({"environment": environment(), "packages": rows}, indent=2) + "\n")
    return int(any(row["recorded"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
