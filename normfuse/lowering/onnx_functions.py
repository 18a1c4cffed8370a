"""L1 norms as functions of an ONNX model, in the domain ``normfuse``.

ONNX has no operator for them. Written as plain nodes, each is about ten; as a *function* it is one node, whose body the
model holds once. A runtime that does not know the function runs its body, as ONNX Runtime does; one that has a kernel
for ``normfuse.L1LayerNorm`` can take that. ``stash_type`` is the type of the statistics, as in ``LayerNormalization``.

    L1LayerNorm:  Y = (X - mean) / (factor mean|X - mean| + epsilon) Scale + B       over ``axes``
    L1RMSNorm:    Y = X / (factor mean|X| + epsilon) Scale                           over ``axes``
    L1BatchNorm:  Y = (X - Mean) / (factor Deviation + epsilon) Scale + B            inputs broadcast against X

The exporter meets a stand-in for each norm, which emits one node of that name; the body is added to what it wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.capture.leaves import affine_inference, l1_token_norm
from normfuse.layers.l1_batch_norm import L1BatchNormBase
from normfuse.layers.l1_layer_norm import L1TokenNorm
from normfuse.layers.mean_deviation import deviation_factor

DOMAIN = "normfuse"
_CONSTANTS = """
    f = Constant <value_float: float = @factor> ()
    e = Constant <value_float: float = @epsilon> ()
    x = Cast <to: int = @stash_type> (X)
    scale = CastLike (Scale, x)
    factor = CastLike (f, x)
    epsilon = CastLike (e, x)"""
_DIVISION = """
    scaled = Mul (s, factor)
    divisor = Add (scaled, epsilon)
    z = Div (d, divisor)
    y = Mul (z, scale)"""
_SHIFT = """
    shift = CastLike (B, x)
    shifted = Add (y, shift)
    Y = CastLike (shifted, X)"""
_OF_TOKENS = """
    axes = Constant <value_ints: ints = @axes> ()"""
_MAGNITUDE = """
    a = Abs (d)
    s = ReduceMean <keepdims: int = 1> (a, axes)"""
FUNCTIONS: dict[str, tuple[str, str]] = {
    "L1LayerNorm": (
        "<axes, epsilon, factor, stash_type> (X, Scale, B) => (Y)",
        f"""{_CONSTANTS}{_OF_TOKENS}
    mean = ReduceMean <keepdims: int = 1> (x, axes)
    d = Sub (x, mean){_MAGNITUDE}{_DIVISION}{_SHIFT}""",
    ),
    "L1RMSNorm": (
        "<axes, epsilon, factor, stash_type> (X, Scale) => (Y)",
        f"""{_CONSTANTS}{_OF_TOKENS}
    d = Identity (x){_MAGNITUDE}{_DIVISION}
    Y = CastLike (y, X)""",
    ),
    "L1BatchNorm": (
        "<epsilon, factor, stash_type> (X, Scale, B, Mean, Deviation) => (Y)",
        f"""{_CONSTANTS}
    mean = CastLike (Mean, x)
    s = CastLike (Deviation, x)
    d = Sub (x, mean){_DIVISION}{_SHIFT}""",
    ),
}
"""Signature and body of each function, in the text form of ONNX."""


def stand_in(model: nn.Module) -> nn.Module:
    """Let each L1 norm of a model emit one node where it is exported; the model then computes nothing of use."""
    for module in model.modules():
        emit: Callable[..., Tensor] | None = None
        if l1_token_norm(module) is not None:
            emit = _emit_token_norm
        elif isinstance(module, L1BatchNormBase) and affine_inference(module) is not None:
            emit = _emit_batch_norm
        if emit is not None:
            module.forward = functools.partial(emit, module)
    return model


def define(model: Any) -> None:
    """Add the body of each function that an ``onnx_ir`` model calls, in the version of its operators."""
    import onnx.parser
    import onnx_ir

    for name in sorted({node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}):
        signature, body = FUNCTIONS[name]
        head = f'<domain: "{DOMAIN}", opset_import: ["": {model.opset_imports[""]}]> {name} {signature}'
        proto = onnx.parser.parse_function(f"{head}\n{{{body}\n}}")
        function = onnx_ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function


def _emit_token_norm(norm: L1TokenNorm, x: Tensor) -> Tensor:
    shape = norm.normalized_shape
    scale = torch.ones(shape, dtype=x.dtype) if norm.weight is None else norm.weight
    axes = list(range(-len(shape), 0))
    if not norm.centred:
        y = _emit("L1RMSNorm", (x, scale), norm, axes=axes)
        return y if norm.bias is None else y + norm.bias
    shift = torch.zeros(shape, dtype=x.dtype) if norm.bias is None else norm.bias
    return _emit("L1LayerNorm", (x, scale, shift), norm, axes=axes)


def _emit_batch_norm(norm: L1BatchNormBase, x: Tensor) -> Tensor:
    along = (norm.num_features, *[1] * (x.dim() - 2))
    scale = torch.ones(norm.num_features, dtype=x.dtype) if norm.weight is None else norm.weight
    shift = torch.zeros(norm.num_features, dtype=x.dtype) if norm.bias is None else norm.bias
    inputs = (scale, shift, norm.running_mean, norm.running_deviation)
    return _emit("L1BatchNorm", (x, *(value.reshape(along) for value in inputs)), norm)


def _emit(name: str, inputs: tuple[Tensor, ...], norm: L1TokenNorm | L1BatchNormBase, **attributes: Any) -> Tensor:
    from onnx import TensorProto

    x = inputs[0]
    stash = TensorProto.DOUBLE if x.dtype == torch.float64 else TensorProto.FLOAT
    attributes |= {"epsilon": norm.eps, "factor": deviation_factor(norm.gaussian), "stash_type": int(stash)}
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", inputs, attributes, dtype=x.dtype, shape=x.shape, version=1)
