"""The arguments of a call have the same names however the call spells them."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normfuse.call_arguments import arguments_of

GRAPH = fx.Graph()
X, W, B = (GRAPH.placeholder(name) for name in "xwb")
ATEN = torch.ops.aten
CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]] = [
    (torch.conv2d, (X, W), {}, {"input": X, "weight": W}),
    (torch.conv2d, (X,), {"weight": W, "bias": None}, {"input": X, "weight": W, "bias": None}),
    (ATEN.conv2d.default, (X, W, B, [2, 2]), {}, {"input": X, "weight": W, "bias": B, "stride": [2, 2]}),
    (ATEN.conv2d, (X, W, B), {}, {"input": X, "weight": W, "bias": B}),
    (F.batch_norm, (X, W, B), {"eps": 1.0}, {"input": X, "running_mean": W, "running_var": B, "eps": 1.0}),
    (ATEN._native_batch_norm_legit_no_training.default, (X, W, B, W, B, 0.1, 1.0), {},
     {"input": X, "weight": W, "bias": B, "running_mean": W, "running_var": B, "momentum": 0.1, "eps": 1.0}),
    (F.embedding, (X, W), {}, {"input": X, "weight": W}),
    (torch.embedding, (W, X), {}, {"weight": W, "indices": X}),
    (torch.addmm, (B, X, W), {"beta": 2}, {"input": B, "mat1": X, "mat2": W, "beta": 2}),
    (Tensor.mean, (X,), {"axis": -1, "keepdims": True}, {"input": X, "dim": -1, "keepdim": True}),
    ("mean", (X, -1, True), {}, {"input": X, "dim": -1, "keepdim": True}),
    ("std", (X, False), {}, {"input": X, "unbiased": False}),
    ("std", (X, -1), {"unbiased": False}, {"input": X, "dim": -1, "unbiased": False}),
    ("max", (X, 1), {}, {"input": X, "dim": 1}),
    ("max", (X, W), {}, {"input": X, "other": W}),
    (torch.add, (), {"x1": X, "x2": W}, {"input": X, "other": W}),
    (operator.iadd, (X, W), {}, {"input": X, "other": W}),
    (Tensor.__pow__, (X, 2), {}, {"input": X, "exponent": 2}),
    (Tensor.__radd__, (X, 1), {}, {"input": X, "other": 1}),
    (torch.concatenate, ([X, W],), {"axis": 1}, {"tensors": [X, W], "dim": 1}),
    (F.pad, (X,), {"pad": (1, 1)}, {"input": X, "padding": (1, 1)}),
    (F.max_pool2d, (X, 2), {"stride": 1}, {"input": X, "kernel_size": 2, "stride": 1}),
    (F.max_pool2d, (X, 2, 1, 0, 1, False, True), {}, {"input": X, "kernel_size": 2, "stride": 1, "padding": 0,
                                                      "dilation": 1, "ceil_mode": False, "return_indices": True}),
]  # fmt: skip


def node_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    return (GRAPH.call_method if isinstance(target, str) else GRAPH.call_function)(target, args, kwargs)


@pytest.mark.parametrize(("target", "args", "kwargs", "expected"), CALLS)
def test_names(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], expected: dict[str, Any]):
    assert arguments_of(node_of(target, args, kwargs)) == expected


def test_a_deprecated_spelling_is_not_read_as_another_one():
    """``torch.addmm(beta, input, alpha, mat1, mat2)`` and ``x.add(alpha, other)`` still run."""
    assert arguments_of(node_of(torch.addmm, (2, B, 3, X, W), {})) == {}
    assert arguments_of(node_of("add", (X, 2, W), {}))["alpha"] is W


def test_a_call_of_a_module_has_none():
    assert arguments_of(GRAPH.call_module("layer", (X,))) == {}
