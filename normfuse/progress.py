"""A progress bar on standard error, for those who look at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, *, shown: bool = True, done: int = 0) -> Iterator[T]:
    """Yield the items, with a bar named ``what`` if ``shown`` and standard error is a terminal.

    Args:
        items: What to go through; without a length the bar only moves.
        what: What is being done.
        shown: False for no bar anywhere.
        done: How many items were done before these.
    """
    if not shown or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    total = len(items) + done if isinstance(items, Sized) else None
    yield from track(items, what, total=total, completed=done, console=Console(stderr=True), transient=True)
