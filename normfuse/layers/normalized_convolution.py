"""The compiled form of what :mod:`.normalized_layer` does with a convolution in the memory of a CPU, in one call.

It is built by :func:`normfuse.build_kernels` (:mod:`normfuse.native`), and used only after its values and gradients
have been those of the formula on trial convolutions. It keeps what the Python form keeps, for backward and from call
to call.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.layers.fixed_statistics import Statistics
from normfuse.layers.kept import Kept
from normfuse.layers.products import Convolution, Product
from normfuse.layers.scaled import plain

SOURCE = Path(__file__).with_suffix(".cpp")
Maker = Callable[..., Any]  # of the object that runs a convolution of some geometry
_HEADERS = ("channel_loops.h", "convolution_pair.h", "kept_factors.h", "scaled_convolution.h")
_TRIALS = (Convolution((1, 1), (1, 1), (1, 1), 1), Convolution((2, 1), (0, 1), (1, 2), 2))
_LIMITS = {torch.float32: 1e-4, torch.float64: 1e-10}


def compiled(product: Product, kept: Kept) -> Callable[..., Tensor | None] | None:
    """Return what runs a convolution of some geometry, or None where the kernels are not built or do not take it.

    It takes ``x, weight, bias, gain, shift, mean, var, eps`` and whether to keep anything from call to call. It returns
    ``z`` of :mod:`.scaled`; or None for tensors that are not dense, not in the memory of a CPU, or not all in float32
    or all in float64, and where somebody has to see each operation: transforms, dispatch modes, autocast.
    """
    make = kernels.get()
    if make is None or type(product) is not Convolution or product.transposed:
        return None
    geometry, run = kept.entry
    if geometry != product:
        run = make(product.stride, product.padding, product.dilation, product.groups).normalized
        kept.entry = product, run
    return run


def library() -> native.Library:
    """Return the library, linked with the torch that runs."""
    root = Path(torch.__file__).parent
    folders = (root / "include", root / "include/torch/csrc/api/include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ("-std=c++20", "-fopenmp-simd", "-fno-math-errno", abi, *(f"-isystem{folder}" for folder in folders))
    linked = (f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")
    return native.Library(SOURCE, flags, linked, torch.__version__, tuple(map(SOURCE.with_name, _HEADERS)))


def _open(path: Path) -> Maker:
    with contextlib.suppress(RuntimeError):
        return torch.classes.normfuse.KeptConvolution  # a process can register it once
    torch.ops.load_library(path)
    return torch.classes.normfuse.KeptConvolution


def _are_right(make: Maker) -> bool:
    """Whether values and gradients are those of the formula, scaling the weight and scaling the output."""
    return all(
        _differs(make, product, size, trained, dtype) <= limit
        for product in _TRIALS
        for size in (3, 16)
        for trained in (range(5), (0, 2, 3, 4), (0, 2, 4), ())
        for dtype, limit in _LIMITS.items()
    )


@torch.enable_grad()
def _differs(make: Maker, product: Convolution, size: int, trained: Sequence[int], dtype: torch.dtype) -> float:
    """Return the largest relative error; ``trained`` are positions in ``x, weight, bias, gain, shift``."""
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    values = [draw(2, 8, size, size), draw(64, 8 // product.groups, 3, 3), draw(64), draw(64), draw(64)]
    wanted = [values[position].requires_grad_() for position in trained]
    fixed = [draw(64), draw(64).abs() + 0.5, 1e-3]
    expected = plain(*values[:3], Statistics(*values[3:], *fixed), product)  # type: ignore[misc,arg-type]
    pair = make(product.stride, product.padding, product.dilation, product.groups)
    found = [pair.normalized(*values, *fixed, True) for _ in range(2)]  # the second by what the first has kept
    if any(z is None for z in found):
        return math.inf
    grad = draw(*expected.shape)
    results = [[z, *(torch.autograd.grad((z * grad).sum(), wanted) if wanted else ())] for z in (expected, *found)]
    return max(_error(a, b) for made in results[1:] for a, b in zip(results[0], made, strict=True))


def _error(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).detach().abs().max() / expected.detach().abs().max())


kernels = native.Kernels(library, _open, _are_right)
