"""Norms and layers with weights, each added behind a value where the value admits it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.lowering.graphs.builder import Builder, Shape

Step = Callable[[Builder, str], "str | None"]
"""Adds an operation behind a value and returns its result, or None where the value does not admit it."""


def batch_norm(g: Builder, x: str) -> str | None:
    """A BatchNormalization of any gains: positive, of both signs, with a zero; with or without a shift."""
    shape = g.shapes[x]
    if len(shape) < 2:
        return None
    channels = shape[1]
    gain = g.uniform(0.5, 2, channels)
    signs = g.random.choice(["positive", "positive", "any", "zero", "zeros", "one"])
    if signs == "any":
        gain[::2] *= -1
    elif signs in ("zero", "zeros"):
        gain[0 : 1 if signs == "zero" else None] = 0
    elif signs == "one":
        gain[:] = 1
    shifts = g.chance(0.7)
    bias, mean = (g.array(channels) if shifts else np.zeros(channels, g.dtype) for _ in range(2))
    parts = [gain, bias, mean, g.uniform(0.3, 3, channels)]
    attributes: dict[str, Any] = {"epsilon": 1e-3} if g.chance(0.3) else {}
    if g.opset >= 14 and g.chance(0.3):
        attributes["training_mode"] = 0
    return g.add("BatchNormalization", [x, *map(g.constant, parts)], shape, **attributes)


def instance_norm(g: Builder, x: str) -> str | None:
    """An InstanceNormalization."""
    shape = g.shapes[x]
    if len(shape) < 3 or np.prod(shape[2:]) < 3:
        return None
    parts = [g.uniform(0.5, 2, shape[1]), g.array(shape[1])]
    return g.add("InstanceNormalization", [x, *map(g.constant, parts)], shape)


def layer_norm(g: Builder, x: str) -> str | None:
    """A LayerNormalization over the last axes."""
    shape = g.shapes[x]
    axis = g.random.randrange(len(shape)) if shape else 0
    if g.opset < 17 or not shape or np.prod(shape[axis:]) < 3:
        return None
    parts = [g.uniform(0.5, 2, *shape[axis:])] + ([g.array(*shape[axis:])] if g.chance(0.7) else [])
    written = axis - g.random.choice([0, len(shape)])
    return g.add("LayerNormalization", [x, *map(g.constant, parts)], shape, axis=written)


def written_norm(g: Builder, x: str) -> str | None:
    """A LayerNorm written out in small nodes, over any one axis, also of size 1, or over the last ones."""
    shape = g.shapes[x]
    if not shape:
        return None
    axis = g.random.randrange(len(shape))
    axes = list(range(axis, len(shape))) if g.chance(0.3) else [axis]
    reduced = tuple(1 if i in axes else n for i, n in enumerate(shape))
    mean = reduce(g, "ReduceMean", x, axes, reduced)
    centred = g.add("Sub", [x, mean], shape, keep=g.chance(0.2))
    square = g.add("Mul", [centred, centred], shape, keep=False) if g.chance(0.5) else _power(g, centred, 2.0)
    variance = reduce(g, "ReduceMean", square, axes, reduced)
    shifted = g.add("Add", [variance, g.constant(np.array(1e-3, g.dtype))], reduced, keep=False)
    root = g.add("Sqrt", [shifted], reduced, keep=False)
    value = g.add("Div", [centred, root], shape)
    larger = 3 if g.chance(0.1) else 1  # a gain or shift may repeat what has size 1
    gain = tuple((n if n > 1 else larger) if i in axes else 1 for i, n in enumerate(shape))
    if not g.fits(*np.broadcast_shapes(shape, gain)):
        return value
    if g.chance(0.7):
        value = g.add("Mul", [value, g.constant(g.uniform(0.5, 2, *gain))], np.broadcast_shapes(shape, gain))
    if g.chance(0.7):
        result = np.broadcast_shapes(g.shapes[value], gain)
        value = g.add("Add", [value, g.constant(g.array(*gain))], result)
    return value


def _power(g: Builder, x: str, exponent: float) -> str:
    return g.add("Pow", [x, g.constant(np.array(exponent, g.dtype))], g.shapes[x], keep=False)


def reduce(g: Builder, op: str, x: str, axes: list[int], shape: Shape, *, keepdims: int = 1, keep: bool = False) -> str:
    """Add a reduction; its axes became an input with opset 13 for sums and 18 for the others."""
    if g.opset >= (13 if op == "ReduceSum" else 18):
        return g.add(op, [x, g.integers(*axes)], shape, keep=keep, keepdims=keepdims)
    return g.add(op, [x], shape, keep=keep, axes=axes, keepdims=keepdims)


def conv(g: Builder, x: str) -> str | None:
    """A convolution along one to three axes, with groups, strides, dilations and paddings."""
    shape = g.shapes[x]
    if not 3 <= len(shape) <= 5:
        return None
    groups = g.random.choice([n for n in (1, 1, 1, 2, 3, shape[1]) if shape[1] % n == 0])
    out, dims = groups * g.random.randint(1, 3), len(shape) - 2
    kernel = [g.random.randint(1, 3) for _ in range(dims)]
    strides, dilations = ([g.random.choice([1, 1, 2]) for _ in range(dims)] for _ in range(2))
    pads = [g.random.choice([0, 0, 1]) for _ in range(2 * dims)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    padded = [n + a + b for n, a, b in zip(shape[2:], pads[:dims], pads[dims:], strict=True)]
    sizes = [(n - r) // s + 1 for n, r, s in zip(padded, reach, strides, strict=True)]
    attributes: dict[str, Any] = {"group": groups, "strides": strides, "dilations": dilations, "pads": pads}
    if g.chance(0.1) and max(dilations) == 1:
        attributes = {"group": groups, "strides": strides, "auto_pad": "SAME_UPPER"}
        sizes = [-(-n // s) for n, s in zip(shape[2:], strides, strict=True)]
    if min(sizes) < 1 or not g.fits(shape[0], out, *sizes):
        return None
    weights = [g.array(out, shape[1] // groups, *kernel)] + ([g.array(out)] if g.chance(0.6) else [])
    return g.add("Conv", [x, *map(g.constant, weights)], (shape[0], out, *sizes), **attributes)


def conv_transpose(g: Builder, x: str) -> str | None:
    """A transposed convolution along one or two axes."""
    shape = g.shapes[x]
    if not 3 <= len(shape) <= 4:
        return None
    groups = g.random.choice([n for n in (1, 1, 2, shape[1]) if shape[1] % n == 0])
    per_group, dims = g.random.randint(1, 3), len(shape) - 2
    kernel, strides = ([g.random.choice(choices)] * dims for choices in ((1, 2, 3), (1, 1, 2)))
    pad = g.random.choice([0, 0, 1])
    extra = g.random.choice([0, 0, strides[0] - 1])
    sizes = [(n - 1) * s - 2 * pad + k + extra for n, s, k in zip(shape[2:], strides, kernel, strict=True)]
    if min(sizes) < 1 or not g.fits(shape[0], groups * per_group, *sizes):
        return None
    weights = [g.array(shape[1], per_group, *kernel)] + ([g.array(groups * per_group)] if g.chance(0.6) else [])
    attributes = {"group": groups, "strides": strides, "pads": [pad] * 2 * dims, "output_padding": [extra] * dims}
    return g.add("ConvTranspose", [x, *map(g.constant, weights)], (shape[0], groups * per_group, *sizes), **attributes)


def gemm(g: Builder, x: str) -> str | None:
    """A Gemm with its factors and transpositions, and a bias of any shape that broadcasts."""
    shape = g.shapes[x]
    if len(shape) != 2:
        return None
    turned, by_output = g.chance(0.2), g.chance(0.5)
    rows, inner = shape[::-1] if turned else shape
    out = g.random.randint(1, 5)
    weight = g.array(out, inner) if by_output else g.array(inner, out)
    bias = g.random.choice([None, (out,), (1,), (), (rows, 1), (rows, out), (1, out)])
    inputs = [x, g.constant(weight)] + ([] if bias is None else [g.constant(g.array(*bias))])
    attributes: dict[str, Any] = {"transA": int(turned), "transB": int(by_output)}
    if g.chance(0.3):
        attributes |= {"alpha": 0.5, "beta": 2.0}
    if bias is None and g.opset < 11:
        return None
    return g.add("Gemm", inputs, (rows, out), **attributes)


def matmul(g: Builder, x: str) -> str | None:
    """A product with a constant matrix from either side, which may have axes of a batch or be a vector."""
    shape = g.shapes[x]
    if len(shape) < 2:
        return None
    out, kind = g.random.randint(1, 5), g.random.choice(["right", "right", "left", "stacked", "vector"])
    if kind == "right":
        return g.add("MatMul", [x, g.constant(g.array(shape[-1], out))], (*shape[:-1], out))
    if kind == "left":
        return g.add("MatMul", [g.constant(g.array(out, shape[-2])), x], (*shape[:-2], out, shape[-1]))
    if kind == "stacked":
        return g.add("MatMul", [x, g.constant(g.array(*shape[:-2], shape[-1], out))], (*shape[:-1], out))
    return g.add("MatMul", [x, g.constant(g.array(shape[-1]))], shape[:-1])


LAYERS: tuple[Step, ...] = (conv, conv, conv, conv_transpose, gemm, gemm, matmul)
NORMS: tuple[Step, ...] = (*[batch_norm] * 5, instance_norm, layer_norm, written_norm)
