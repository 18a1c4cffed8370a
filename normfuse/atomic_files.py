"""Write files all or nothing: under another name beside their destination, complete on the disk, then moved into place.

After an error, an interrupt or a full disk nothing is left behind, and a file that was at the destination before is
still there. A process that is killed leaves a hidden folder, which the next writer of the same file removes. What is
moved into place was flushed to the disk first, so that it is whole after a power cut too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
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
        _remove_left_over(final)
        holder = tempfile.TemporaryDirectory(prefix=f"{_prefix(final)}{os.getpid()}.", dir=final.parent)
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


def _prefix(path: Path) -> str:
    """Return how the temporary folders of this machine for a file begin."""
    return f".{path.name}.{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}-"


def _remove_left_over(path: Path) -> None:
    """Remove what writers of the same file left here that were killed: folders of processes that are gone."""
    begin = _prefix(path)
    for entry in list(path.parent.iterdir()):
        number = entry.name.removeprefix(begin).partition(".")[0]
        if (
            entry.name.startswith(begin)
            and number.isdecimal()
            and not entry.is_symlink()
            and not _is_alive(int(number))
        ):
            shutil.rmtree(entry, ignore_errors=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # to ask would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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
