"""Where in the code refusals are made, and which of those places a run came to."""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfuse.base import Refusal, Refused

ROOT = Path(__file__).resolve().parents[2]
COVERED = (
    "absorbers",
    "absorption",
    "affine",
    "aliases",
    "gains",
    "gather",
    "joining",
    "legality",
    "norms",
    "passing",
    "pipeline",
)
COVERED = (*COVERED, "product_calls", "routes", "rules")
PASSES = ("duplicate_shared", "fold_affine", "fold_bn", "merge_branches")
"""The modules of which every refusal needs a case: what folds norms, by way of routes."""


@dataclass(frozen=True)
class Site:
    """A refusal in the code: its file, its first and last line, and how it is written."""

    file: Path
    first: int
    last: int
    text: str

    def __str__(self) -> str:
        return f"{self.file.name}:{self.first}: {self.text}"


def sites() -> list[Site]:
    """Return every place of the covered modules that makes a refusal."""
    files = [ROOT / "normfuse" / f"{name}.py" for name in COVERED] + [ROOT / "passes" / f"{name}.py" for name in PASSES]
    return sites_in(files)


def sites_in(files: list[Path]) -> list[Site]:
    """Return every place of these files that makes a refusal."""
    return [site for file in files for site in _sites_of(file.resolve())]


def _sites_of(file: Path) -> Iterator[Site]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Refused", "Refusal"):
            yield Site(file, node.lineno, node.end_lineno or node.lineno, ast.unparse(node))


Places = set[tuple[Path, int]]


@contextlib.contextmanager
def recorded() -> Iterator[Places]:
    """Collect the file and line of every refusal that is made meanwhile."""
    seen: Places = set()
    before = {cls: cls.__init__ for cls in (Refused, Refusal)}

    def watch(cls: type) -> None:
        plain = before[cls]

        def watched(self: Any, *args: Any, **kwargs: Any) -> None:
            frame = sys._getframe(1)
            seen.add((Path(frame.f_code.co_filename).resolve(), frame.f_lineno))
            plain(self, *args, **kwargs)

        cls.__init__ = watched  # type: ignore[method-assign]

    for cls in before:
        watch(cls)
    try:
        yield seen
    finally:
        for cls, plain in before.items():
            cls.__init__ = plain  # type: ignore[method-assign]
