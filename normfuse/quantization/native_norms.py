"""The compiled kernels of the integer norms: built when asked for, kept for later processes, and trusted when exact.

Nothing is compiled by itself. :func:`build_kernels` compiles ``integer_norms.c`` for the processor of this machine with
the C compiler that is installed, and keeps the library in a folder of the user: ``$NORMFUSE_CACHE_DIR``, else
``$XDG_CACHE_HOME/normfuse``, else ``~/.cache/normfuse``. From then on the integer norms use it, also in later
processes; with ``NORMFUSE_KERNELS=0`` in the environment they do not. Its name holds the source, the compiler's options
and the features of the processor, so another machine that shares the folder does not load it. A library is used only
after it has reproduced the definition (:mod:`normfuse.quantization.integer_arithmetic`) on trial rows.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import NormfuseError
from normfuse.quantization import integer_arithmetic
from normfuse.quantization.integer_arithmetic import NormForm, make_form

SOURCE = Path(__file__).with_name("integer_norms.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-std=c11")
COMPILERS = ("cc", "gcc", "clang")
PART_BYTES = 2**20  # of input; less is not worth a thread
_ROWS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class Kernels:
    """The functions of a compiled library, on int8 tensors in memory of the CPU.

    Args:
        path: The library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(os.fspath(path))
        self._functions: dict[str, Any] = {}

    def l1_rows(self, x: Tensor, gain: Tensor, shift: Tensor, form: NormForm, *, centred: bool = True) -> Tensor:
        """Do what :func:`.integer_arithmetic.l1_rows` does, on as many threads as torch uses where that pays."""
        return self.rows("normfuse_l1_rows" if centred else "normfuse_l1_rms_rows", x, gain, shift, form)

    def rows(self, function: str, x: Tensor, gain: Tensor, shift: Tensor, form: NormForm) -> Tensor:
        """Call a function of the signature of ``normfuse_l1_rows``."""
        x, gain, shift = x.contiguous(), gain.contiguous(), shift.contiguous()
        y = torch.empty_like(x)
        call, addresses = self._function(function), (x.data_ptr(), y.data_ptr(), gain.data_ptr(), shift.data_ptr())
        constants = _constants(form)
        failed: list[int] = []

        def run(first: int, last: int) -> None:
            at = first * form.size
            failed.append(call(addresses[0] + at, addresses[1] + at, last - first, *addresses[2:], constants))

        parts = max(1, min(torch.get_num_threads(), x.numel() // PART_BYTES))
        ends = [len(x) * part // parts for part in range(parts + 1)]
        threads = [threading.Thread(target=run, args=ends[part : part + 2]) for part in range(1, parts)]
        for thread in threads:  # a call through ctypes lets go of the interpreter's lock
            thread.start()
        run(ends[0], ends[1])
        for thread in threads:
            thread.join()
        if any(failed) or len(failed) < parts:
            raise MemoryError("no memory for the gains of an integer norm")
        return y

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            self._functions[name] = self._library[name]
            self._functions[name].argtypes = _ROWS
        return self._functions[name]

    def affine(self, x: Tensor, multiplier: Tensor, addend: Tensor, down: Tensor, limit: int) -> Tensor:
        """Do what :func:`.integer_arithmetic.affine` does; the output has the memory format of ``x``."""
        constants = [ctypes.c_void_p(t.data_ptr()) for t in (multiplier, addend, down)]
        channels = x.shape[1]
        last = x.movedim(1, -1)
        if last.is_contiguous() and not x.is_contiguous():
            y, function = torch.empty_like(last), self._library.normfuse_affine_last
            sizes = [x.numel() // max(1, channels), channels]
        else:
            last = x.contiguous()
            y, function = torch.empty_like(last), self._library.normfuse_affine_runs
            inner = last[0, 0].numel() if len(x) else 1
            sizes = [x.numel() // max(1, inner), inner, channels]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (last, y)]
        function(*pointers, *map(ctypes.c_int64, sizes), *constants, ctypes.c_int32(limit))
        return y if y.shape == x.shape and function is self._library.normfuse_affine_runs else y.movedim(-1, 1)


@functools.lru_cache(maxsize=256)
def _constants(form: NormForm) -> Any:
    return (ctypes.c_int64 * len(form))(*form)


def build_kernels(*, force: bool = False) -> Path:
    """Compile the kernels of the integer norms for this processor, once, and use them from now on.

    Args:
        force: Compile again where they are there already.

    Returns:
        The library.

    Raises:
        NormfuseError: There is no C compiler, it fails, the folder cannot be written to, or the library does not
            reproduce the definition of the integer norms.
    """
    target = library_path()
    if force or not target.exists():
        compile_library(SOURCE, target)
    kernels.cache_clear()
    if load(target) is None:
        raise NormfuseError(f"{target} does not reproduce the integer norms: delete it; they run without it")
    return target


@functools.cache
def kernels() -> Kernels | None:
    """Return the kernels, if they have been built for this processor and are exact; never compiles."""
    if os.environ.get("NORMFUSE_KERNELS") == "0":
        return None
    target = library_path()
    return load(target) if target.exists() else None


def load(path: Path) -> Kernels | None:
    """Return the kernels in a library that belongs to this user alone and is exact, else None."""
    try:
        found = Kernels(path) if _is_private(path) else None
    except (OSError, AttributeError):  # not a library for this system, or not ours
        return None
    return found if found is not None and _is_exact(found) else None


def library_path() -> Path:
    """Return where the library for this processor is kept."""
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(repr((FLAGS, platform.machine(), platform.system(), _processor())).encode())
    return cache_directory() / f"integer_norms-{key.hexdigest()[:24]}.so"


def cache_directory() -> Path:
    """Return the folder of the user where libraries are kept."""
    given = os.environ.get("NORMFUSE_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfuse"


def compile_library(source: Path, target: Path, options: Sequence[str] = ()) -> None:
    """Compile ``source`` to ``target``, which appears only when complete.

    Raises:
        NormfuseError: There is no C compiler, it fails, or the folder of ``target`` cannot be written to.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NormfuseError("no C compiler found: install gcc or clang, or set CC")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [*compiler.split(), *FLAGS, *options, "-o", os.fspath(made), os.fspath(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                text = next(iter(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
                raise NormfuseError(f"{compiler} cannot compile {source.name}: {text}")
            os.replace(made, target)
    except OSError as error:
        raise NormfuseError(f"cannot build {target}: {error.strerror}; set NORMFUSE_CACHE_DIR") from error


def _is_private(path: Path) -> bool:
    """Whether nobody but this user, or the administrator, can have put the library there."""
    if not hasattr(os, "getuid"):
        return True
    return all(
        entry.st_uid in (os.getuid(), 0) and not entry.st_mode & (stat.S_IWOTH | stat.S_IWGRP)
        for entry in (path.stat(), path.parent.stat())
    )


def _processor() -> str:
    """Return the features that ``-march=native`` depends on, as the kernel states them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model\t", "CPU part"))}))


@torch.inference_mode()
def _is_exact(found: Kernels) -> bool:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 31, 64, 300):
        x = torch.randint(-128, 128, (9, size), generator=generator, device="cpu")
        x[0], x[1], x[2], x[3] = 127, -128, x[2] % 2, (x[3] + 128) // 250
        x = x.to(torch.int8)
        gain, shift = torch.randint(-32767, 32768, (2, size), generator=generator, device="cpu").to(torch.int16)
        form = make_form(size, 1.0, 1e-3, 9, 4, 127)
        for centred in (True, False):
            expected = integer_arithmetic.l1_rows(x, gain, shift, form, centred=centred)
            if not torch.equal(found.l1_rows(x, gain, shift, form, centred=centred), expected):
                return False
        wide = gain.to(torch.int32), 64 * shift.to(torch.int32), (gain % 22).to(torch.int32)
        if not torch.equal(found.affine(x, *wide, 127), integer_arithmetic.affine(x, *wide, 127)):
            return False
    return True
