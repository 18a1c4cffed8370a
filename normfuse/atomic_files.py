"""Write files all or nothing: under another name beside their destination, complete on the disk, then moved into place.

After an error, an interrupt or a full disk nothing is left behind, and a file that was at the destination before is
still there. What is moved into place was flushed to the disk first, so that it is whole after a power cut too.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from normfuse.errors import NormfuseError


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], error: type[NormfuseError] = NormfuseError) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder; move all that was written there beside ``path`` at the end.

    Args:
        path: The destination of the main file; others are moved first, since it refers to them.
        error: The kind of error to raise.

    Raises:
        NormfuseError: The folder of ``path`` does not exist, or cannot be written to; of the kind that was asked for.
    """
    final = Path(path)
    if not final.parent.is_dir():
        raise error(f"cannot write {final}: there is no folder {final.parent}")
    try:
        holder = tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent)
    except OSError as problem:
        raise error(f"cannot write {final}: {problem.strerror}: {final.parent}") from problem
    with holder as folder:
        target = Path(folder) / final.name
        yield target
        files = sorted(target.parent.iterdir(), key=lambda file: file == target)
        for file in files:
            _flush(file)
        for file in files:
            os.replace(file, final.parent / file.name)
    _flush(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file all or nothing."""
    with staged(path) as target:
        target.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk; where the system can do that."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            os.fsync(handle)
    finally:
        os.close(handle)
