"""Damage a file by a seed, read it, and say whether what happened may happen.

A reader returns, or raises a :class:`normfuse.NormfuseError` of one line. It does not hang, takes no more memory than
its limits say, and where checksums or digests cover a value, it returns no other value.
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from normfuse.errors import MissingDependencyError, NormfuseError
from tests.damaged.mutations import BYTES, structured
from tests.damaged.samples import SAMPLES, Sample

SECONDS = 20
MEMORY = 600 << 20
"""Bytes by which the process may grow while it reads one small file: the largest limit of a reader, and spare."""


class Files:
    """The valid file of one format, in a folder, and damaged ones in its place.

    Args:
        kind: A key of :data:`SAMPLES`.
        folder: Where to write.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.sample: Sample = SAMPLES[kind]
        self.path = folder / self.sample.name
        self.sample.write(self.path)
        self.damaged = folder / (self.sample.beside or self.sample.name)
        self.content = self.damaged.read_bytes()
        self.values = self.sample.read(self.path)

    def judge(self, seed: int) -> str:
        """Return what is wrong about how the file of a seed is read, empty if nothing."""
        rng = random.Random(seed)
        known = structured(self.sample.name if self.damaged == self.path else "", self.content)
        by_bytes = not known or rng.random() < 0.5
        mutation = rng.choice(BYTES if by_bytes else known)
        content = mutation(self.content, rng)
        self.damaged.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        problem = self._read(guarded=by_bytes and self.sample.guarded)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        return problem or (f"took {grown >> 20} MiB" if grown > MEMORY else "")

    def _read(self, *, guarded: bool) -> str:
        try:
            with _limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = self.sample.read(self.path)
        except MissingDependencyError as error:
            return f"asks for a package: {error}"
        except NormfuseError as error:
            return "" if str(error).isprintable() else f"an error of several lines: {str(error)!r}"
        except _Hangs:
            return "hangs"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"[:300]
        return _changed(values, self.values) if guarded else ""


def _changed(values: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    for name in expected.keys() & values.keys():
        if values[name].shape != expected[name].shape or not torch.equal(values[name], expected[name]):
            return f"{name} is another value, silently"
    return "" if values.keys() == expected.keys() else f"other tensors: {sorted(values.keys() ^ expected.keys())[:3]}"


class _Hangs(BaseException):
    """A reader took too long."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def end(*_: object) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
