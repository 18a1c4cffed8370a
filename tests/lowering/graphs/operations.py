"""Operations without weights that mix values, join them, or act on each."""

from __future__ import annotations

import numpy as np

from tests.lowering.graphs.builder import Builder, Shape
from tests.lowering.graphs.layers import Step, reduce

# values are mixed


def reduction(g: Builder, x: str) -> str | None:
    shape = g.shapes[x]
    if not shape:
        return None
    axes = g.random.sample(range(len(shape)), g.random.randint(1, min(2, len(shape))))
    op = g.random.choice(["ReduceMean", "ReduceMean", "ReduceMax", "ReduceMax", "ReduceSum", "ReduceMin"])
    keepdims = int(g.chance(0.6))
    result = tuple(1 if i in axes else n for i, n in enumerate(shape) if keepdims or i not in axes)
    return reduce(g, op, x, axes, result, keepdims=keepdims, keep=True)


def pool(g: Builder, x: str) -> str | None:
    shape = g.shapes[x]
    if not 3 <= len(shape) <= 4:
        return None
    if g.chance(0.4):
        op = g.random.choice(["GlobalAveragePool", "GlobalMaxPool"])
        return g.add(op, [x], (*shape[:2], *[1] * (len(shape) - 2)))
    dims, size, stride = len(shape) - 2, g.random.randint(1, 3), g.random.randint(1, 2)
    op, pads = g.random.choice(["AveragePool", "MaxPool"]), [g.random.choice([0, 0, 1]) if size > 1 else 0] * 2 * dims
    sizes = [(n + pads[0] * 2 - size) // stride + 1 for n in shape[2:]]
    if min(sizes) < 1:
        return None
    attributes = {"count_include_pad": g.random.randint(0, 1)} if op == "AveragePool" else {}
    return g.add(
        op, [x], (*shape[:2], *sizes), kernel_shape=[size] * dims, strides=[stride] * dims, pads=pads, **attributes
    )


# each value on its own


def pointwise(g: Builder, x: str) -> str | None:
    shape = g.shapes[x]
    op = g.random.choice(["Relu", "Relu", "LeakyRelu", "PRelu", "Neg", "Identity", "Dropout", "Sigmoid", "Clip"])
    attributes = {"alpha": g.random.choice([0.1, 0.1, -0.2])} if op == "LeakyRelu" else {}
    inputs = [x]
    if op == "PRelu" and not shape:
        return None
    if op == "PRelu":
        sizes = (shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 and g.chance(0.7) else (1,)
        inputs.append(g.constant(g.uniform(0.1, 0.5, *sizes)))
    if op == "Clip":
        inputs += [g.constant(np.array(n, g.dtype)) for n in (-0.5, 1.0)] if g.opset >= 11 else []
        attributes = {} if g.opset >= 11 else {"min": -0.5, "max": 1.0}
    return g.add(op, inputs, shape, **attributes)


# values are joined


def constant_operand(g: Builder, x: str) -> str | None:
    """Arithmetic with a constant of any shape that broadcasts, which may also enlarge the value."""
    shape = g.shapes[x]
    other = tuple(g.random.choice([1, n, n, 1 if n > 1 else 3]) for n in shape)
    kind = g.random.choice(["any", "suffix", "more axes", "number", "channel"])
    if kind == "suffix":
        other = other[g.random.randint(0, len(other)) :]
    elif kind == "more axes":
        other = (g.random.choice([1, 2]), *other)
    elif kind == "number":
        other = g.random.choice([(), (1,)])
    elif kind == "channel" and len(shape) > 1:
        other = (shape[1], *[1] * (len(shape) - 2))
    op = g.random.choice(["Add", "Sub", "Mul", "Div", "Max"])
    array = g.uniform(0.5, 2, *other) * g.numbers.choice([-1, 1], other)
    if op == "Mul" and g.chance(0.1):
        array = array * (g.uniform(0, 1, *other) > 0.5)
    result = np.broadcast_shapes(shape, other)
    if not g.fits(*result):
        return None
    operands = [x, g.constant(np.asarray(array, g.dtype))]
    if g.chance(0.3) and op != "Div":
        operands.reverse()
    return g.add(op, operands, result)


def two_values(g: Builder, x: str) -> str | None:
    """Arithmetic with a value from elsewhere in the graph that broadcasts with it."""
    fitting = [v for v in g.open if _broadcast(g, x, v)]
    if not fitting:
        return None
    other = g.random.choice(fitting)
    pair = [x, other] if g.chance(0.5) else [other, x]
    return g.add(g.random.choice(["Add", "Add", "Sub", "Mul", "Max"]), pair, _broadcast(g, x, other) or ())


def _broadcast(g: Builder, left: str, right: str) -> Shape | None:
    try:
        shape = np.broadcast_shapes(g.shapes[left], g.shapes[right])
    except ValueError:
        return None
    return shape if g.fits(*shape) else None


def concat(g: Builder, x: str) -> str | None:
    """With values or constants that have the same sizes along the other axes."""
    shape = g.shapes[x]
    if not shape:
        return None
    axis = g.random.randrange(len(shape))

    def others(s: Shape) -> Shape:
        return (*s[:axis], *s[axis + 1 :])

    fitting = [v for v in g.open if len(g.shapes[v]) == len(shape) and others(g.shapes[v]) == others(shape)]
    parts = [x, g.random.choice(fitting)] if g.chance(0.8) else [x, g.constant(g.array(*shape))]
    g.random.shuffle(parts)
    result = tuple(sum(g.shapes[v][axis] for v in parts) if i == axis else n for i, n in enumerate(shape))
    written = axis - len(shape) if g.opset >= 11 and g.chance(0.3) else axis
    return g.add("Concat", parts, result, axis=written) if g.fits(*result) else None


OTHERS: tuple[Step, ...] = (reduction, pool, pool, *[pointwise] * 3, *[constant_operand] * 3, two_values, concat)
