"""Real text that comes with Python: the docstrings of the standard library, as numbers.

The text follows from the Python version, which a result has to name; ``Docstrings.digest`` is its SHA-256. Files are
split into training, validation and test by a hash of their names, and no docstring is taken twice.

A token is a word of letters with the space before it, a digit, a line break with the spaces behind it, or one other
character. The most frequent tokens of the training files are numbered; any other is spelled character by character, a
character that is not among the numbered ones as the last number.
"""

from __future__ import annotations

import ast
import collections
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TOKEN = re.compile(r" ?[A-Za-z]+|[0-9]|\n *|[^A-Za-z0-9\n]")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Docstrings:
    """The three parts of the text as tokens, ``(N,)`` each, and what the numbers stand for."""

    train: Tensor
    validation: Tensor
    test: Tensor
    words: tuple[str, ...]
    digest: str

    @property
    def size(self) -> int:
        """How many different numbers there are; the last one is for unknown characters."""
        return len(self.words) + 1


def docstrings(words: int = 1000, files: int | None = None) -> Docstrings:
    """Read the standard library of the running Python.

    Args:
        words: How many tokens are numbered, single characters of the training text among them.
        files: Read only so many source files; all by default.
    """
    joined = parts(files)
    vocabulary = _vocabulary(joined["train"], words)
    numbers = {word: number for number, word in enumerate(vocabulary)}
    digest = hashlib.sha256("\0".join(joined.values()).encode()).hexdigest()
    tokens = {split: torch.tensor(list(_encode(text, numbers))) for split, text in joined.items()}
    return Docstrings(**tokens, words=vocabulary, digest=digest)


def parts(files: int | None = None) -> dict[str, str]:
    """Return the text of training, validation and test; of the first ``files`` source files, or of all."""
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, text in _texts(files):
        texts[_split_of(name)].append(text)
    return {split: "\n\n".join(found) for split, found in texts.items()}


def _texts(files: int | None) -> Iterator[tuple[str, str]]:
    """Yield the path of each source file, below the library, and its docstrings that no file before it has."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    seen: set[str] = set()
    for path in paths[:files]:
        found = [text for text in _docstrings_of(path) if text not in seen]
        seen.update(found)
        if found:
            yield path.relative_to(root).as_posix(), "\n\n".join(dict.fromkeys(found))


def _docstrings_of(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in the library's own strings
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _split_of(name: str) -> str:
    tenth = hashlib.sha256(name.encode()).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(tenth, "train")


def _vocabulary(text: str, words: int) -> tuple[str, ...]:
    counts = collections.Counter(TOKEN.findall(text))
    characters = collections.Counter(text)
    alone = [character for character, count in sorted(characters.items()) if count >= 20]
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    return tuple(dict.fromkeys([*alone, *ranked]))[:words]


def _encode(text: str, numbers: dict[str, int]) -> Iterator[int]:
    unknown = len(numbers)
    for token in TOKEN.findall(text):
        if token in numbers:
            yield numbers[token]
        else:
            yield from (numbers.get(character, unknown) for character in token)
