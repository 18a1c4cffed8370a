"""Compiled libraries: built when asked for, kept for later processes, and loaded only where nobody else can write.

Nothing is compiled by itself. :func:`normfuse.build_kernels` compiles a source for the processor of this machine with
the compiler that is installed, and keeps the library in a folder of the user: ``$NORMFUSE_CACHE_DIR``, else
``$XDG_CACHE_HOME/normfuse``, else ``~/.cache/normfuse``. From then on it is used, also in later processes; with
``NORMFUSE_KERNELS=0`` in the environment it is not. Its name holds the source, the compiler's options, the version of
what it is linked with and the features of the processor, so another machine that shares the folder does not load it.
Beside it stands the digest of the file: what is damaged or cut off is not opened, and is built again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from normfuse.errors import NormfuseError

T = TypeVar("T")

LONGEST = 900
"""Seconds that a compiler may take; about a minute is usual."""

_BUILD = ".build-"
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_COMPILERS = {"CC": ("cc", "gcc", "clang"), "CXX": ("c++", "g++", "clang++")}


@dataclass(frozen=True, slots=True)
class Library:
    """A source file that can be compiled to a library.

    Attributes:
        source: The file.
        flags: Options of the compiler beside those that every library gets; they go before the source.
        linked: Options that go after the source.
        key: What the library depends on that the options do not say, such as a version.
        headers: Files that the source includes.
    """

    source: Path
    flags: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()
    key: str = ""
    headers: tuple[Path, ...] = ()

    @property
    def path(self) -> Path:
        """Where the library for this processor is kept."""
        parts = (_FLAGS, self.flags, self.linked, self.key, platform.machine(), platform.system(), _processor())
        made = hashlib.sha256(b"".join(file.read_bytes() for file in (self.source, *self.headers)))
        made.update(repr(parts).encode())
        return cache_directory() / f"{self.source.stem}-{made.hexdigest()[:24]}.so"

    def compile(self, target: Path, options: Sequence[str] = ()) -> None:
        """Compile to ``target``, which appears only when complete, with its digest.

        Raises:
            NormfuseError: There is no compiler, it fails or does not end, or the folder of ``target`` cannot be
                written to.
        """
        compiler = self._compiler()
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_left_over(target.parent)
            with tempfile.TemporaryDirectory(prefix=_BUILD, dir=target.parent) as folder:
                made = Path(folder) / target.name
                flags = [*_FLAGS, *self.flags, *options]
                command = [*compiler.split(), *flags, "-o", os.fspath(made), os.fspath(self.source), *self.linked]
                done = _run(command, compiler, self.source.name)
                if done.returncode:
                    raise NormfuseError(f"{compiler} cannot compile {self.source.name}: {_first_error(done)}")
                made.chmod(0o700)
                digest = _digest_file(made)
                digest.write_text(_digest(made), encoding="ascii")
                digest.chmod(0o600)
                os.replace(digest, _digest_file(target))
                os.replace(made, target)
        except OSError as error:
            raise NormfuseError(f"cannot build {target}: {error.strerror}; set NORMFUSE_CACHE_DIR") from error

    def _compiler(self) -> str:
        variable = "CC" if self.source.suffix == ".c" else "CXX"
        found = os.environ.get(variable) or next(filter(None, map(shutil.which, _COMPILERS[variable])), None)
        if found is None:
            language = "C" if variable == "CC" else "C++"
            raise NormfuseError(f"no {language} compiler found: install gcc or clang, or set {variable}")
        return found


class Kernels(Generic[T]):
    """What a library offers, if it has been built for this processor and is right.

    Args:
        library: Returns the library; it may need torch's options, which are looked up late.
        open_file: Opens a file of it; may raise OSError or AttributeError.
        are_right: Whether what was opened reproduces its definition.
    """

    def __init__(
        self, library: Callable[[], Library], open_file: Callable[[Path], T], are_right: Callable[[T], bool]
    ) -> None:
        self.library = library
        self._open, self._are_right = open_file, are_right
        self._found: list[T | None] = []

    def get(self) -> T | None:
        """Return the kernels, or None where they are not built, not right, or turned off; never compiles."""
        if not self._found:
            allowed = os.environ.get("NORMFUSE_KERNELS") != "0"
            self._found = [self.load(self.library().path) if allowed else None]
        return self._found[0]

    def forget(self) -> None:
        """Look for the library again at the next call."""
        self._found = []

    @contextlib.contextmanager
    def unused(self) -> Iterator[None]:
        """Run a block as if they were not built."""
        found = self._found
        self._found = [None]
        try:
            yield
        finally:
            self._found = found

    def load(self, path: Path) -> T | None:
        """Return the kernels in a file that belongs to this user alone and is right, else None."""
        try:
            found = self._open(path) if is_private(path) and is_whole(path) else None
        except (OSError, AttributeError, RuntimeError):  # not there, not a library for this system, or not ours
            return None
        if found is None:
            return None
        with concurrent.futures.ThreadPoolExecutor(1) as thread:  # of its own: no mode or hook of the caller's is there
            return found if thread.submit(self._are_right, found).result() else None

    def build(self, *, force: bool = False) -> Path:
        """Compile the library where it is not there already, or always with ``force``, and use it from now on.

        Raises:
            NormfuseError: It cannot be compiled, others can write to its folder, or it does not reproduce its
                definition.
        """
        library = self.library()
        target = library.path
        if force or not is_whole(target):
            library.compile(target)
        self.forget()
        if not is_private(target):
            raise NormfuseError(f"others can write to {target.parent}: set NORMFUSE_CACHE_DIR to a folder of your own")
        if self.load(target) is None:
            raise NormfuseError(f"{target} does not reproduce its definition: delete it; everything works without it")
        return target


def _run(command: list[str], compiler: str, source: str) -> subprocess.CompletedProcess[str]:
    """Run a compiler, and end it with all that it started where it takes too long."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=LONGEST)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise NormfuseError(f"{compiler} did not compile {source} within {LONGEST} seconds") from error
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _remove_left_over(folder: Path) -> None:
    """Remove what builds that were killed left behind: folders that are older than any build lasts."""
    for left in folder.glob(f"{_BUILD}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > 2 * LONGEST and not left.is_symlink():
                shutil.rmtree(left)


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a library is there, with the digest of just this file beside it."""
    try:
        return _digest_file(path).read_text(encoding="ascii") == _digest(path)
    except (OSError, ValueError):
        return False


def _first_error(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return next((line for line in lines if "error" in line), next(iter(lines), f"exit status {done.returncode}"))


def is_private(path: Path) -> bool:
    """Whether nobody but this user, or the administrator, can have put a file there, by whichever folder above it.

    A folder that others can write to, such as ``/tmp``, may stand above only if it keeps them from what is not theirs
    (the sticky bit). The file itself is no link, and a folder above may be one only into such places.
    """
    if not hasattr(os, "getuid"):
        return True
    if path.is_symlink():
        return False
    given, real = Path(os.path.abspath(path)), path.resolve()
    nearest = (given, given.parent, real, real.parent)
    above = (*given.parents, *real.parents)
    return all(_is_mine(one.lstat(), sticky=False) for one in nearest if not one.is_symlink()) and all(
        _is_mine(one.lstat(), sticky=True) for one in above
    )


def _is_mine(entry: os.stat_result, *, sticky: bool) -> bool:
    """Whether only this user or the administrator owns and writes an entry; or, above it, others may add their own."""
    writable = entry.st_mode & (stat.S_IWOTH | stat.S_IWGRP) and not stat.S_ISLNK(entry.st_mode)
    kept = sticky and entry.st_mode & stat.S_ISVTX
    return entry.st_uid in (os.getuid(), 0) and (not writable or bool(kept))


def cache_directory() -> Path:
    """Return the folder of the user where libraries are kept."""
    given = os.environ.get("NORMFUSE_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfuse"


def _processor() -> str:
    """Return the features that ``-march=native`` depends on, as the kernel states them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model\t", "CPU part"))}))
