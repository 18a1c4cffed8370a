"""The rank of a value, where the layers that made it imply it: what a capture without shapes still knows."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from normfuse import adapters
from normfuse.graph import ModelGraph, function_name
from normfuse.layers.affine_inference import AffineInference
from normfuse.layers.l1_layer_norm import L1TokenNorm


def ranks(node: fx.Node, graph: ModelGraph) -> int | None:
    """Return the rank of a value where layers imply it (a symbolic capture has no shapes), else None."""
    module = graph.module_of(node)
    for classes, rank in _RANK_OF_LAYER:
        if isinstance(module, classes):
            return rank
    if adapters.is_known(module) if module is not None else False:
        return 4
    if isinstance(module, nn.Flatten):
        return 2 if (module.start_dim, module.end_dim) == (1, -1) else None
    name = function_name(node)
    if name in _RANK_OF_FUNCTION:
        return _RANK_OF_FUNCTION[name]
    keeps = isinstance(module, (*_KEEP_RANK, AffineInference)) or name in _KEEP_RANK_FUNCTIONS
    first = next(iter(node.all_input_nodes), None)
    return ranks(first, graph) if keeps and first is not None else None


_RANK_OF_LAYER: tuple[tuple[Any, int], ...] = (
    ((nn.Conv1d, nn.ConvTranspose1d, nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d), 3),
    ((nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d), 4),
    ((nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.PixelShuffle, nn.ZeroPad2d), 4),
    ((nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.AvgPool3d, nn.MaxPool3d), 5),
)
_RANK_OF_FUNCTION = {"conv1d": 3, "conv2d": 4, "conv3d": 5, "avg_pool2d": 4, "max_pool2d": 4}
_KEEP_RANK = (nn.Linear, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Tanh)
_KEEP_RANK = (
    *_KEEP_RANK,
    nn.Identity,
    nn.BatchNorm1d,
    nn.SyncBatchNorm,
    nn.LayerNorm,
    L1TokenNorm,
    nn.ELU,
    nn.Dropout,
    nn.Dropout2d,
)
_KEEP_RANK_FUNCTIONS = ("cat", "relu", "gelu", "silu", "dropout", "contiguous", "add", "mul", "sigmoid", "tanh")
_KEEP_RANK_FUNCTIONS = (*_KEEP_RANK_FUNCTIONS, "batch_norm", "linear", "iadd", "isub", "imul", "itruediv")
