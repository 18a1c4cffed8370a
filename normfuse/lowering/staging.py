"""Write files all or nothing: in a temporary folder beside their destination, then moved into place."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from normfuse.errors import LoweringError


@contextlib.contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder; move all that was written there beside ``path`` at the end.

    After an exception nothing is left behind, and a file that was at ``path`` before is still there.

    Raises:
        LoweringError: The folder of ``path`` does not exist, or cannot be written to.
    """
    final = Path(path)
    try:
        holder = tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent)
    except OSError as error:
        raise LoweringError(f"cannot write {final}: {error.strerror}: {final.parent}") from error
    with holder as folder:
        target = Path(folder) / final.name
        yield target
        for file in sorted(target.parent.iterdir(), key=lambda file: file == target):  # what refers to others: last
            os.replace(file, final.parent / file.name)
