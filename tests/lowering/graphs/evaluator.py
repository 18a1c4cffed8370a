"""The reference evaluator of ONNX, with operators in place of those of its own that are wrong or slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional as F


def run(made: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the outputs of a graph."""
    with np.errstate(all="ignore"):
        results: Any = ReferenceEvaluator(made, new_ops=OPERATORS).run(None, feeds)
    return [np.asarray(value) for value in results]


class BatchNormalization(OpRun):
    """Up to opset 13 theirs mixes the batch into the stored statistics."""

    def _run(self, x, gain, bias, mean, var, epsilon=1e-5, **_):
        gain, bias, mean, var = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in (gain, bias, mean, var))
        return ((gain * (x - mean) / np.sqrt(var + epsilon) + bias).astype(x.dtype),)


class Conv(OpRun):
    """Theirs loops over the taps."""

    def _run(self, x, w, b=None, group=1, strides=None, dilations=None, pads=None, auto_pad="NOTSET", **_):
        dims = x.ndim - 2
        strides, dilations, pads = strides or [1] * dims, dilations or [1] * dims, pads or [0] * 2 * dims
        if auto_pad != "NOTSET":
            pads = _same(x.shape[2:], w.shape[2:], strides)
        x, w, b = _tensors(x, w, b)
        function = getattr(F, f"conv{dims}d")
        return (function(F.pad(x, _widths(pads)), w, b, list(strides), 0, list(dilations), group).numpy(),)


class ConvTranspose(OpRun):
    """Theirs does not know groups."""

    def _run(self, x, w, b=None, group=1, strides=None, pads=None, output_padding=None, **_):
        dims = x.ndim - 2
        strides, pad, extra = strides or [1] * dims, list(pads or [0] * dims)[:dims], output_padding or [0] * dims
        x, w, b = _tensors(x, w, b)
        function = getattr(F, f"conv_transpose{dims}d")
        return (function(x, w, b, list(strides), pad, list(extra), group).numpy(),)


class MaxPool(OpRun):
    """Theirs counts the paddings of one axis as none."""

    def _run(self, x, kernel_shape=None, strides=None, pads=None, **_):
        dims = x.ndim - 2
        (x,) = _tensors(x)
        padded = F.pad(x, _widths(pads or [0] * 2 * dims), value=-np.inf)
        return (getattr(F, f"max_pool{dims}d")(padded, list(kernel_shape), list(strides or [1] * dims)).numpy(),)


class GlobalMaxPool(OpRun):
    """Theirs pools the channels of a value of three axes."""

    def _run(self, x):
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


OPERATORS: list[Any] = [BatchNormalization, Conv, ConvTranspose, MaxPool, GlobalMaxPool]


def _tensors(*arrays: np.ndarray | None) -> tuple[Tensor | None, ...]:
    return tuple(None if v is None else torch.tensor(np.array(v)) for v in arrays)


def _widths(pads: list[int]) -> list[int]:
    """Return the paddings of ONNX, all starts and then all ends, as torch orders them, the last axis first."""
    dims = len(pads) // 2
    return [pads[i + end * dims] for i in reversed(range(dims)) for end in (0, 1)]


def _same(sizes: tuple[int, ...], kernel: tuple[int, ...], strides: list[int]) -> list[int]:
    """Return the paddings of ``SAME_UPPER``."""
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(sizes, kernel, strides, strict=True)]
    return [t // 2 for t in totals] + [t - t // 2 for t in totals]
