"""The compiled form of :class:`.scaled.ScaledProduct`: a convolution in the memory of a CPU, as one operator.

It is built by :func:`normfuse.build_kernels` (:mod:`normfuse.native`), and used only after its gradients have been
those of the Python form on trial convolutions. The two keep the same tensors for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from normfuse import native
from normfuse.layers.products import Convolution, Product
from normfuse.layers.scaled import PLAIN, ScaledProduct, Statistics

SOURCE = Path(__file__).with_suffix(".cpp")
Operator = Callable[..., Tensor]
_DTYPES = (torch.float32, torch.float64)
_TRIALS = (Convolution((1, 1), (1, 1), (1, 1), 1), Convolution((2, 1), (0, 1), (1, 2), 2))
_LIMITS = {torch.float32: 1e-4, torch.float64: 1e-10}


def compiled(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Statistics, product: Product) -> Tensor | None:
    """Return ``z`` of :mod:`.scaled`, or None where the operator is not built or does not take these tensors."""
    operator = kernels.get()
    if operator is None or not isinstance(product, Convolution) or product.transposed or x.dtype not in _DTYPES:
        return None
    gain, shift, mean, var, eps, _ = norm
    for tensor in (x, weight, bias, gain, shift, mean, var):
        if tensor is not None and (type(tensor) not in PLAIN or not tensor.is_cpu or tensor.dtype is not x.dtype):
            return None
    if not _has_rows(weight):
        return None
    geometry = product.stride, product.padding, product.dilation, product.groups
    return operator(x, weight, bias, gain, shift, mean, var, eps, *geometry)


def _has_rows(weight: Tensor) -> bool:
    """Whether the values of each output channel lie together in memory, one channel after the other."""
    if weight.is_contiguous():
        return weight.numel() > 0
    return weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)


def library() -> native.Library:
    """Return the library, linked with the torch that runs."""
    root = Path(torch.__file__).parent
    folders = (root / "include", root / "include/torch/csrc/api/include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ("-std=c++20", "-fopenmp-simd", "-fno-math-errno", abi, *(f"-isystem{folder}" for folder in folders))
    linked = (f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")
    return native.Library(SOURCE, flags, linked, torch.__version__, (SOURCE.with_name("channel_loops.h"),))


def _open(path: Path) -> Operator:
    if not hasattr(torch.ops.normfuse, "scaled_convolution"):  # a process can register it once
        torch.ops.load_library(path)
    return torch.ops.normfuse.scaled_convolution.default


def _is_right(operator: Operator) -> bool:
    """Whether values and gradients are those of the Python form, scaling the weight and scaling the output."""
    return all(
        _differs(operator, product, size, dtype) <= limit
        for product in _TRIALS
        for size in (3, 12)
        for dtype, limit in _LIMITS.items()
    )


@torch.enable_grad()
def _differs(operator: Operator, product: Convolution, size: int, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    values = [draw(2, 8, size, size), draw(64, 8 // product.groups, 3, 3), draw(64), draw(64), draw(64)]
    fixed = [draw(64), draw(64).abs() + 0.5, 1e-3]
    trained = [value.requires_grad_() for value in values]
    one = ScaledProduct.apply(*trained, *fixed, product)
    other = operator(*trained, *fixed, product.stride, product.padding, product.dilation, product.groups)
    grad = draw(*one.shape)  # type: ignore[attr-defined]
    gradients = (torch.autograd.grad((z * grad).sum(), trained) for z in (one, other))
    pairs = [(one, other), *zip(*gradients, strict=True)]
    return max(float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in pairs)  # type: ignore[operator]


kernels = native.Kernels(library, _open, _is_right)
