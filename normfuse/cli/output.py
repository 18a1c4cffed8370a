"""Results on standard output, progress on standard error, JSON where asked for; no file is ever half-written."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import click

import normfuse
from normfuse.errors import shown

SCHEMA_VERSION = 1
WIDTH = 1000
STYLES = {"applied": "green", "refused": "yellow", "unmatched": "cyan", "not reached": "dim"}


class Output:
    """Where a command writes its results.

    Attributes:
        document: The JSON document; commands fill in its keys, which are added to but never renamed.
        verbose: Whether to list what is usually summed up.
        force: Whether files may be overwritten.
    """

    def __init__(
        self,
        stream: IO[str],
        *,
        command: str,
        json_file: str | None = None,
        quiet: bool = False,
        no_color: bool = False,
    ) -> None:
        self.stream = stream
        self.json_file = json_file
        self.verbose = False
        self.force = False
        self._status: Any = None
        self.quiet = quiet
        self.no_color = no_color or bool(os.environ.get("NO_COLOR"))
        self.document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "tool": "normfuse",
            "version": normfuse.__version__,
            "command": command,
            "environment": {},
            "model": None,
            "pairs": [],
            "verification": None,
            "verify": None,
            "bench": [],
            "outputs": [],
            "notes": [],
        }

    def require_apart(self, path: Path) -> None:
        """Refuse to write the JSON document over a file that the command reads or writes.

        Raises:
            click.UsageError: ``--json`` names the same file.
        """
        if self.json_file not in (None, "-") and _same_file(Path(self.json_file), path):
            raise click.UsageError(f"--json {self.json_file}: the command reads or writes this file; name another")

    def rows(self, rows: Sequence[tuple[str, ...]], *, style: str = "bold") -> None:
        """Print rows in aligned columns; the first is set in ``style``, or in the colour of its status."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2), pad_edge=False)
        for first, *rest in rows:
            cells = (Text(shown(cell)) for cell in rest)  # names in it may come from a file
            table.add_row(Text(shown(first), style=STYLES.get(first.strip(), style)), *cells)
        self._print(table)

    def field(self, label: str, text: str) -> None:
        """Print one line under its label."""
        self.rows([(f"  {label:<9}", text)])

    def note(self, text: str) -> None:
        """Record something the user should know, and print it."""
        self.document["notes"].append(text)
        self.field("note", text)

    def _print(self, renderable: Any) -> None:
        if self.quiet or self.json_file == "-":
            return
        from rich.console import Console

        # Wide enough for any line: a report that is cut or wrapped at a column is no use to grep, or to copy from.
        console = Console(file=self.stream, no_color=self.no_color, width=WIDTH, highlight=False)
        with console.capture() as captured:
            console.print(renderable)
        with self._without_status():
            self.stream.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())
            self.stream.flush()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show on standard error what is being done, for as long as it takes; nothing off a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.text import Text

        try:
            with Console(stderr=True, no_color=self.no_color).status(Text(shown(what))) as self._status:
                yield
        finally:
            self._status = None

    @contextlib.contextmanager
    def _without_status(self) -> Iterator[None]:
        """Take the line that shows progress away for the time of a print."""
        if self._status is None:
            yield
            return
        self._status.stop()
        yield
        self._status.start()

    def finish(self) -> None:
        """Write the JSON document, if one was asked for."""
        if self.json_file is None:
            return
        text = json.dumps(self.document, indent=2, allow_nan=False) + "\n"
        if self.json_file == "-":
            self.stream.write(text)
            self.stream.flush()
        else:
            from normfuse.atomic_files import write_text

            write_text(Path(self.json_file), text)


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))
    except (OSError, ValueError):  # an argument that is no path
        return False


def require_free(path: Path, *, force: bool) -> None:
    """Refuse a destination before any work is done.

    Raises:
        click.UsageError: The file exists and ``force`` is not given, or its folder does not exist.
    """
    if path.exists() and not force:
        raise click.UsageError(f"{path} exists; --force overwrites it")
    if not path.parent.is_dir():
        raise click.UsageError(f"there is no folder {path.parent}")


def size(path: Path) -> str:
    """Return the size of a file for people: ``"44.6 MB"``."""
    count = float(path.stat().st_size)
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
