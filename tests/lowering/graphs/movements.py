"""Operations that only move values, or pad them, each added behind a value where the value admits it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.lowering.graphs.builder import Builder, Shape
from tests.lowering.graphs.layers import Step


def transpose(g: Builder, x: str) -> str | None:
    shape = g.shapes[x]
    if not shape:
        return None
    order = g.random.sample(range(len(shape)), len(shape))
    if order == list(range(len(shape)))[::-1] and g.chance(0.5):
        return g.add("Transpose", [x], tuple(shape[i] for i in order))
    return g.add("Transpose", [x], tuple(shape[i] for i in order), perm=order)


def reshape(g: Builder, x: str) -> str | None:
    """To merged or split axes, to a suffix of the shape, to anything; with 0 and -1 where they say the same."""
    shape = g.shapes[x]
    kind = g.random.choice(["merge", "split", "drop", "insert", "any"])
    target = list(shape)
    axis = g.random.randrange(max(1, len(shape)))
    if kind == "merge" and len(shape) > 1:
        axis = min(axis, len(shape) - 2)
        target[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    elif kind == "split" and shape:
        factor = g.random.choice([n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0])
        target[axis : axis + 1] = [factor, shape[axis] // factor]
    elif kind == "drop":
        while target and target[0] == 1:
            target.pop(0)
    elif kind == "insert":
        target.insert(axis, 1)
    else:
        target = _factors(g, math.prod(shape))
    if not g.fits(*target):
        return None
    written = [0 if i < len(shape) and n == shape[i] and g.chance(0.3) else n for i, n in enumerate(target)]
    if target and g.chance(0.5):
        written[g.random.randrange(len(target))] = -1
    return g.add("Reshape", [x, g.integers(*written)], tuple(target))


def _factors(g: Builder, total: int) -> list[int]:
    found = []
    while total > 1 and len(found) < 4:
        factor = g.random.choice([n for n in range(1, total + 1) if total % n == 0])
        found.append(factor)
        total //= factor
    return [*found, total] if total > 1 or not found else found


def flatten(g: Builder, x: str) -> str | None:
    shape = g.shapes[x]
    axis = g.random.randrange(len(shape) + 1)
    written = axis - len(shape) if 0 < axis < len(shape) and g.opset >= 11 and g.chance(0.3) else axis
    return g.add("Flatten", [x], (math.prod(shape[:axis]), math.prod(shape[axis:])), axis=written)


def squeeze(g: Builder, x: str) -> str | None:
    shape = g.shapes[x]
    axes = [i for i, n in enumerate(shape) if n == 1]
    if not axes:
        return None
    if g.chance(0.7):
        axes = sorted(g.random.sample(axes, g.random.randint(1, len(axes))))
        return _with_axes(g, "Squeeze", x, axes, tuple(n for i, n in enumerate(shape) if i not in axes))
    return g.add("Squeeze", [x], tuple(n for n in shape if n != 1))


def unsqueeze(g: Builder, x: str) -> str | None:
    shape = list(g.shapes[x])
    axis = g.random.randrange(len(shape) + 1)
    return _with_axes(g, "Unsqueeze", x, [axis], (*shape[:axis], 1, *shape[axis:])) if len(shape) < 5 else None


def _with_axes(g: Builder, op: str, x: str, axes: list[int], shape: Shape) -> str:
    if g.opset >= 13:
        return g.add(op, [x, g.integers(*axes)], shape)
    return g.add(op, [x], shape, axes=axes)


def part(g: Builder, x: str) -> str | None:
    """A Slice along one or two axes, forwards or backwards, in steps."""
    shape = list(g.shapes[x])
    axes = g.random.sample(range(len(shape)), min(len(shape), g.random.choice([1, 1, 2])))
    starts, ends, steps, sizes = [], [], [], list(shape)
    for axis in axes:
        n = shape[axis]
        step = g.random.choice([1, 1, 2, -1]) if g.opset >= 10 else 1
        start, end = (0, n) if step > 0 else (n - 1, -n - 1)
        if step > 0 and n > 1 and g.chance(0.6):
            start, end = sorted(g.random.sample(range(n + 1), 2))
        starts.append(start)
        ends.append(end if end < n or g.chance(0.5) else 2**31)
        steps.append(step)
        sizes[axis] = len(range(*slice(start, None if end < 0 else end, step).indices(n)))
    if min(sizes, default=0) < 1:
        return None
    if g.opset < 10:
        return g.add("Slice", [x], tuple(sizes), axes=axes, starts=starts, ends=ends)
    given = (starts, ends, axes) if set(steps) == {1} else (starts, ends, axes, steps)
    return g.add("Slice", [x, *(g.integers(*v) for v in given)], tuple(sizes))


def split(g: Builder, x: str) -> str | None:
    """Into two parts, of which both go on."""
    shape = g.shapes[x]
    axes = [i for i, n in enumerate(shape) if n > 1]
    if not axes:
        return None
    axis = g.random.choice(axes)
    first = g.random.randint(1, shape[axis] - 1)
    sizes = [first, shape[axis] - first]
    shapes = [tuple(n if i == axis else m for i, m in enumerate(shape)) for n in sizes]
    if g.opset >= 13:
        return g.random.choice(g.add_several("Split", [x, g.integers(*sizes)], shapes, axis=axis))
    return g.random.choice(g.add_several("Split", [x], shapes, axis=axis, split=sizes))


def gather(g: Builder, x: str) -> str | None:
    """Entries along an axis in any order, once or several times; or one entry, and the axis goes."""
    shape = g.shapes[x]
    if not shape:
        return None
    axis = g.random.randrange(len(shape))
    if g.chance(0.2) and len(shape) > 1:
        index = np.array(g.random.randrange(shape[axis]), np.int64)
    else:
        count = g.random.randint(1, shape[axis] + 1)
        low = -shape[axis] if g.opset >= 11 else 0
        index = np.array([g.random.randrange(low, shape[axis]) for _ in range(count)], np.int64)
        if g.chance(0.4):
            index = np.array(g.random.sample(range(shape[axis]), shape[axis]), np.int64)
    result = (*shape[:axis], *index.shape, *shape[axis + 1 :])
    return g.add("Gather", [x, g.constant(index)], result, axis=axis) if g.fits(*result) else None


def expand(g: Builder, x: str) -> str | None:
    shape = g.shapes[x]
    target = tuple(g.random.choice([1, 3]) if n == 1 else n for n in shape)
    target = (g.random.choice([1, 2]), *target) if g.chance(0.3) and len(shape) < 5 else target
    return g.add("Expand", [x, g.integers(*target)], target) if g.fits(*target) else None


def tile(g: Builder, x: str) -> str | None:
    shape = g.shapes[x]
    repeats = [g.random.choice([1, 1, 2]) for _ in shape]
    result = tuple(n * r for n, r in zip(shape, repeats, strict=True))
    return g.add("Tile", [x, g.integers(*repeats)], result) if g.fits(*result) else None


def pixels(g: Builder, x: str) -> str | None:
    """DepthToSpace or SpaceToDepth of blocks of 2."""
    shape = g.shapes[x]
    if len(shape) != 4:
        return None
    n, c, h, w = shape
    if c % 4 == 0 and g.chance(0.6):
        attributes: dict[str, Any] = {"mode": g.random.choice(["CRD", "DCR"])} if g.opset >= 11 else {}
        return g.add("DepthToSpace", [x], (n, c // 4, h * 2, w * 2), blocksize=2, **attributes)
    return g.add("SpaceToDepth", [x], (n, c * 4, h // 2, w // 2), blocksize=2) if h % 2 == w % 2 == 0 else None


def pad(g: Builder, x: str) -> str | None:
    shape = g.shapes[x]
    mode = g.random.choice(["constant", "constant", "reflect", "edge"])
    pads = [g.random.choice([0, 0, 0, 1, 2]) for _ in range(2 * len(shape))]
    if mode == "reflect":
        pads = [min(p, shape[i % len(shape)] - 1) for i, p in enumerate(pads)]
    result = tuple(n + pads[i] + pads[i + len(shape)] for i, n in enumerate(shape))
    value = g.random.choice([0.0, 0.0, 1.5])
    if not shape or not g.fits(*result):
        return None
    if g.opset < 11:
        return g.add("Pad", [x], result, mode=mode, pads=pads, value=value)
    inputs = [x, g.integers(*pads)]
    inputs += [g.constant(np.array(value, g.dtype))] if mode == "constant" and (value or g.chance(0.5)) else []
    return g.add("Pad", inputs, result, mode=mode)


MOVES: tuple[Step, ...] = (transpose, reshape, reshape, flatten, squeeze, unsqueeze, part, split, gather, expand, tile)
MOVES = (*MOVES, pixels, pad, pad)
