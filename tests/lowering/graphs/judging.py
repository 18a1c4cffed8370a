"""Random graphs, and the verdict on a fold of one: right, wrong, or failed with an error."""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from normfuse.lowering.onnx_fold import OnnxFoldResult, count_ops, fold_onnx
from tests.lowering.graphs.builder import Builder
from tests.lowering.graphs.evaluator import run
from tests.lowering.graphs.layers import LAYERS, NORMS
from tests.lowering.graphs.movements import MOVES
from tests.lowering.graphs.operations import OTHERS

OPSETS = (9, 10, 11, 12, 13, 14, 15, 16, 17, 17, 18, 19, 20, 21)
TOLERANCE = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 1e-4}
"""Largest difference of an output, relative to its largest element."""
NOISE = 30  # a norm of nearly equal values magnifies any rounding: so many times what it makes of one in the last place


@dataclass(frozen=True)
class Verdict:
    """What became of a graph.

    Attributes:
        kind: ``"right"``, ``"wrong"``, ``"crash"``, or ``"unusable"`` where the source itself is not finite.
        detail: The largest difference, or the error.
        norms: How many norms the graph has, BatchNormalization nodes and LayerNorms that are written out.
        folded: How many of them were folded, or made one node.
    """

    kind: str
    detail: str
    norms: int = 0
    folded: int = 0


def random_graph(source: random.Random) -> onnx.ModelProto:
    """Return a graph of up to twelve steps on one or two inputs, one of them at least a norm, of any opset from 9."""
    g = Builder(source, source.choice(OPSETS), np.float32 if source.random() < 0.15 else np.float64)
    for _ in range(source.choice([1, 1, 2])):
        g.input(_input_shape(source))
    steps, count = 0, source.randint(2, 12)
    latest = g.open[0]
    while steps < count:
        kinds = source.choice([LAYERS, NORMS, MOVES, OTHERS, OTHERS])
        origin = latest if source.random() < 0.8 else source.choice(g.open)
        added = source.choice(kinds)(g, origin)
        if added is not None:
            latest, steps = added, steps + 1
    if not any(node.op_type in ("BatchNormalization", "Sqrt") for node in g.nodes):
        for norm in NORMS:
            latest = norm(g, latest) or latest
    read = {name for node in g.nodes for name in node.input}
    unread = [name for name in g.open if name not in read and name not in g.inputs]
    outputs = unread + [n for n in g.open if n in read and n not in g.inputs and source.random() < 0.05]
    return g.model(outputs, source.choice(["all"] * 6 + ["but the batch"] * 2 + ["none"]))


def _input_shape(source: random.Random) -> tuple[int, ...]:
    batch, channels = source.choice([1, 2, 2, 3]), source.choice([1, 2, 3, 4, 4, 6, 8])
    return (batch, channels, *source.choice([(), (1,), (5,), (4, 4), (4, 4), (3, 5), (1, 6), (6, 1), (3, 3, 2)]))


def judge(made: onnx.ModelProto) -> Verdict:
    """Fold a graph and compare it with its source."""
    feeds = _feeds(made)
    try:
        expected = run(made, feeds)
    except Exception as error:  # an operator that the reference evaluator has wrong
        return Verdict("unusable", f"{type(error).__name__} in the source: {str(error).splitlines()[0][:200]}")
    if not all(np.isfinite(value).all() for value in expected):
        return Verdict("unusable", "the source is not finite")
    before = made.SerializeToString()
    try:
        result = fold_onnx(made)
        folded = result.to_proto()
        onnx.checker.check_model(folded, full_check=True)
        found = run(folded, feeds)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict("crash", f"{type(error).__name__} in {place.name}: {str(error).splitlines()[0][:200]}")
    worst = max((difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)
    fault = _fault(made, before, folded, result)
    norms, changed = len(result.report.norms), len(result.report.applied)
    if fault:
        return Verdict("wrong", fault, norms, changed)
    allowed = TOLERANCE[expected[0].dtype]
    if worst > allowed:
        allowed += NOISE * sensitivity(made, feeds, expected)
    return Verdict("right" if worst <= allowed else "wrong", f"{worst:.2g}", norms, changed)


def _fault(made: onnx.ModelProto, before: bytes, folded: onnx.ModelProto, result: OnnxFoldResult) -> str:
    """Return which promise besides the values is not kept, empty if none."""
    subjects = [outcome.subject for outcome in result.report.norms if outcome.pass_name == "fold-bn"]
    left = count_ops(folded)["BatchNormalization"]
    done = sum(outcome.pass_name == "fold-bn" for outcome in result.report.applied)
    if made.SerializeToString() != before:
        return "the source was changed"
    if folded.graph.input != made.graph.input or folded.graph.output != made.graph.output:
        return "the interface was changed"
    if len(set(subjects)) != len(subjects) or len(subjects) != count_ops(made)["BatchNormalization"]:
        return "a norm is not in the report exactly once"
    if left != len(subjects) - done:
        return "the report counts other norms than are left"
    if "cannot be followed" in str(result.report):
        return str(result.report)
    return ""


def sensitivity(made: onnx.ModelProto, feeds: dict[str, np.ndarray], expected: list[np.ndarray]) -> float:
    """Return how far the outputs of a graph move when its inputs and constants are rounded another way."""
    numbers, worst = np.random.default_rng(1), 0.0
    for _ in range(3):
        moved = onnx.ModelProto.FromString(made.SerializeToString())
        held = [attribute.t for node in moved.graph.node for attribute in node.attribute if attribute.name == "value"]
        for tensor in (*moved.graph.initializer, *held):
            tensor.CopyFrom(numpy_helper.from_array(_rounded(numpy_helper.to_array(tensor), numbers), tensor.name))
        found = run(moved, {name: _rounded(value, numbers) for name, value in feeds.items()})
        worst = max(worst, *map(difference, expected, found))
    return worst


def _rounded(array: np.ndarray, numbers: np.random.Generator) -> np.ndarray:
    """Return floating-point numbers, each moved by one in its last place; other numbers as they are."""
    if array.dtype.kind != "f":
        return array
    step = np.finfo(array.dtype).eps * numbers.choice([-1, 1], array.shape)
    return np.asarray(array * (1 + step), array.dtype)


def _feeds(made: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return an input for each of a graph, by the sizes that are noted in its documentation string."""
    numbers, feeds = np.random.default_rng(5), {}
    for value in made.graph.input:
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [int(size) for size in value.doc_string.split()]
        feeds[value.name] = numbers.standard_normal(shape).astype(dtype)
    return feeds


def difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference relative to the largest element expected; infinite where the shapes differ."""
    if expected.shape != found.shape or expected.dtype != found.dtype or not np.isfinite(found).all():
        return float("inf")
    if expected.size == 0:
        return 0.0
    return float(np.abs(expected - found).max()) / max(1.0, float(np.abs(expected).max()))
