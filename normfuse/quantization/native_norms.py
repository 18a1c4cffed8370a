"""The compiled kernels of the integer norms: trusted when exact.

They are built by :func:`normfuse.build_kernels` (:mod:`normfuse.native`), and used only after they have reproduced the
definition (:mod:`normfuse.quantization.integer_arithmetic`) on trial rows.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.quantization import integer_arithmetic
from normfuse.quantization.integer_arithmetic import NormForm, make_form

LIBRARY = native.Library(Path(__file__).with_name("integer_norms.c"), ("-std=c11",))
PART_BYTES = 2**20  # of input; less is not worth a thread
_ROWS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class IntegerNorms:
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


@torch.inference_mode()
def _is_exact(found: IntegerNorms) -> bool:
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


kernels = native.Kernels(lambda: LIBRARY, IntegerNorms, _is_exact)
