"""An ONNX graph under construction: its values with their sizes, and constants in every form that exporters write."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]
_MAX_ELEMENTS = 3000


class Builder:
    """Adds nodes one by one; each value has a name and a shape that is known here, whatever the file declares.

    Attributes:
        random: Every choice is drawn from it.
        opset: Version of the operators, 9 to 21.
        dtype: Of the floating-point values.
        shapes: The shape of every value.
        open: Values that may be read further, oldest first.
    """

    def __init__(self, source: random.Random, opset: int, dtype: type = np.float64) -> None:
        self.random, self.opset, self.dtype = source, opset, np.dtype(dtype)
        self.numbers = np.random.default_rng(source.getrandbits(32))
        self.shapes: dict[str, Shape] = {}
        self.open: list[str] = []
        self.inputs: list[str] = []
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._shared: dict[tuple[str, Shape], str] = {}
        self._count = 0

    def chance(self, probability: float) -> bool:
        """Return True this often."""
        return self.random.random() < probability

    def name(self, stem: str) -> str:
        """Return a name that no value has yet."""
        self._count += 1
        return f"{stem}{self._count}"

    def input(self, shape: Shape) -> str:
        """Add an input of the graph."""
        name = self.name("x")
        self.inputs.append(name)
        self.shapes[name] = shape
        self.open.append(name)
        return name

    def array(self, *shape: int) -> np.ndarray:
        """Return normal numbers."""
        return self.numbers.standard_normal(shape).astype(self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        """Return numbers between two others."""
        return self.numbers.uniform(low, high, shape).astype(self.dtype)

    def constant(self, array: np.ndarray) -> str:
        """Add a constant: an initializer, one that is used already, a Constant node, or one behind other nodes."""
        key = (array.dtype.name, array.shape)
        shared = array.dtype == self.dtype and not bool((array > 0).all())  # a variance is no value for anything else
        if shared and key in self._shared and self.chance(0.1):
            return self._shared[key]
        form = self.random.choice(["initializer"] * 6 + ["node", "identity", "transpose"])
        if form == "transpose" and array.ndim == 2:
            turned = self._initializer(np.ascontiguousarray(array.T))
            return self.add("Transpose", [turned], array.shape, keep=False, perm=[1, 0])
        if form == "node":
            value = numpy_helper.from_array(array)
            name = self.add("Constant", [], array.shape, keep=False, value=value)
        else:
            name = self._initializer(array)
        if form == "identity":
            name = self.add("Identity", [name], array.shape, keep=False)
        if shared:
            self._shared[key] = name
        return name

    def integers(self, *values: int) -> str:
        """Add a constant vector of indices, sizes or axes."""
        return self.constant(np.array(values, np.int64))

    def _initializer(self, array: np.ndarray) -> str:
        name = self.name("w")
        self.initializers.append(numpy_helper.from_array(array, name))
        self.shapes[name] = array.shape
        return name

    def add(self, op: str, inputs: list[str], shape: Shape, *, keep: bool = True, **attributes: Any) -> str:
        """Add a node with one output of this shape, and return the output."""
        (name,) = self.add_several(op, inputs, [shape], keep=keep, **attributes)
        return name

    def add_several(
        self, op: str, inputs: list[str], shapes: list[Shape], *, keep: bool = True, **attributes: Any
    ) -> list[str]:
        """Add a node with outputs of these shapes, and return them."""
        names = [self.name("v") for _ in shapes]
        label = self.name(op.lower()) if self.chance(0.5) else ""
        self.nodes.append(helper.make_node(op, inputs, names, name=label, **attributes))
        self.shapes.update(zip(names, shapes, strict=True))
        self.open += names if keep else []
        return names

    def fits(self, *shape: int) -> bool:
        """Whether a value of this shape is neither empty nor so large that a run takes long."""
        return 0 < math.prod(shape) <= _MAX_ELEMENTS and len(shape) <= 6

    def model(self, outputs: list[str], known: str) -> onnx.ModelProto:
        """Return the model; of its input sizes all are ``known``, or all but the batch, or none.

        Args:
            outputs: Names of its outputs.
            known: ``"all"``, ``"but the batch"`` or ``"none"``.
        """
        kind = TensorProto.DOUBLE if self.dtype == np.float64 else TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "random",
            [self._input(name, kind, known) for name in self.inputs],
            [helper.make_tensor_value_info(n, kind, [None] * len(self.shapes[n])) for n in outputs],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10 if self.opset <= 21 else 11)

    def _input(self, name: str, kind: int, known: str) -> onnx.ValueInfoProto:
        """Return the declaration of an input; its true sizes stand in the documentation, for those who feed it."""
        shape = self.shapes[name]
        return helper.make_tensor_value_info(name, kind, self._declared(shape, known), " ".join(map(str, shape)))

    @staticmethod
    def _declared(shape: Shape, known: str) -> list[int | str | None]:
        if known == "none":
            return [None] * len(shape)
        return ["N" if known == "but the batch" and axis == 0 else size for axis, size in enumerate(shape)]
