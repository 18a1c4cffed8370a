"""Remove channels that a norm has made constant, their constant folded into what reads them.

    y_c = gamma_c z_c + beta_c, |gamma_c| <= tau  ~  y_c = beta_c;    behind channel-wise operations f: v_c = f(beta_c)

    z = W y + b   =>   W' = W without column c,   b' = b + sum of W[:, c] v_c       (v_c = 0, or no zero padding)

Row c of the layer in front of the norm goes, channel c of the norm, and column c of the layer behind it. Exact where
gamma is 0. Networks of which only the norms were trained have such channels: about a third of all (arXiv 2003.00152).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normfuse import norms
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.call_arguments import arguments_of
from normfuse.graph import ModelGraph, function_name
from normfuse.legality import require_no_hooks
from normfuse.norms import Norm
from normfuse.operations import named

_POINTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh)
_POINTWISE = (*_POINTWISE, nn.Sigmoid, nn.Tanh, nn.Mish, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d)
_POINTWISE_FUNCTIONS = ("relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid", "tanh", "mish")
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_POOLS = (*_POOLS, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)


@dataclass(frozen=True, slots=True)
class _Prune:
    """What ``apply`` does at one norm."""

    tensors: dict[str, Tensor]
    edits: tuple[dict[str, Any], ...]


class PruneConstant(Pass):
    """Channels with a gain of about zero, between two layers that can lose them.

    Args:
        threshold: tau; 0 removes channels with a gain of exactly zero only.

    Raises:
        ValueError: The threshold is negative.
    """

    name = "prune-constant"
    exactness = Exactness.APPROXIMATE

    def __init__(self, threshold: float = 1e-3) -> None:
        if threshold < 0:
            raise ValueError(f"the threshold is not negative, unlike {threshold}")
        self.threshold = threshold

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield every norm of stored statistics that has a channel with such a gain."""
        for norm in norms.norm_nodes(graph):
            module = graph.module(norm.module) if norm.module is not None else None
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and bool(self._dead(module).any()):
                yield Match(norm.name, norm.layer, payload=norm)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Find the layers on both sides, and the channels that both can lose."""
        norm: Norm = match.payload
        try:
            source, target, constant = _neighbours(norm, graph)
            for name in (norm.name, source, target):
                require_no_hooks(name, graph)
            prune = _plan(norm.name, source, target, constant, self._dead(graph.module(norm.name)), graph)
        except Refused as refused:
            return refused.refusal
        return replace(match, partners=(source, target), payload=prune)

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Resize the three layers and write what is left."""
        prune: _Prune = match.payload
        for edit in prune.edits:
            graph.perform(edit)
        graph.assign(prune.tensors)

    def _dead(self, norm: Any) -> Tensor:
        if norm.weight is None:
            return torch.zeros(norm.num_features, dtype=torch.bool)
        return norm.weight.detach().abs().cpu() <= self.threshold


def _neighbours(norm: Norm, graph: ModelGraph) -> tuple[str, str, Tensor]:
    """Return the layer in front of a norm, the one behind it, and the value of each channel there if it is constant."""
    if len(norm.nodes) != 1:
        raise Refused(Reason.SHARED_MODULE, f"{norm.name} is called {len(norm.nodes)} times")
    if norm.nodes[0].op != "call_module":
        raise Refused(Reason.FORWARD_OVERRIDDEN, f"{norm.name} ({norm.layer}) has a forward of its own")
    if graph.partial:
        raise Refused(Reason.PARTIAL_CAPTURE, "only parts of the model could be traced", "pass example_inputs")
    node = norm.nodes[0]
    value, _ = norms.input_of(norm, node, graph)
    if len(graph.consumers(value)) != 1:
        raise Refused(Reason.EXTRA_CONSUMER, f"what {norm.name} reads is also used elsewhere")
    module: Any = graph.module(norm.name)
    beta = torch.zeros(module.num_features) if module.bias is None else module.bias.detach()
    constant = beta.double().cpu()
    while True:
        consumers = graph.consumers(node)
        if any(reader.op == "output" for reader in consumers):
            raise Refused(Reason.EXTRA_CONSUMER, f"{named(node, graph)} is an output of the model")
        if len(consumers) != 1:
            raise Refused(Reason.EXTRA_CONSUMER, f"{named(node, graph)} is read {len(consumers)} times")
        node = consumers[0]
        if _is_product(graph.module_of(node)):
            return _product(value, graph), _product(node, graph), constant
        constant = _through(node, constant, graph)


def _is_product(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd)


def _product(node: fx.Node, graph: ModelGraph) -> str:
    """Return the name of an undivided convolution or linear layer with one call and weights of its own."""
    module: Any = graph.module_of(node)
    if not _is_product(module):
        raise Refused(
            Reason.UNSUPPORTED_LAYER, f"{named(node, graph)} is no convolution or linear layer that can lose channels"
        )
    name = str(node.target)
    if getattr(module, "groups", 1) > 1:
        raise Refused(Reason.UNSUPPORTED_LAYER, f"{name} has {module.groups} groups of channels")
    tied = any(len(graph.owners(f"{name}.{key}")) > 1 for key in ("weight", "bias") if getattr(module, key) is not None)
    if tied or len(graph.call_sites(name)) != 1:
        raise Refused(Reason.SHARED_MODULE, f"{name} is called more than once, or shares its weight")
    return name


def _through(node: fx.Node, constant: Tensor, graph: ModelGraph) -> Tensor:
    """Return what constants ``(C,)`` become behind an operation that treats each channel on its own."""
    module = graph.module_of(node)
    name = function_name(node)
    if isinstance(module, _POINTWISE):
        return module(constant.clone())
    if name in _POINTWISE_FUNCTIONS and len(node.all_input_nodes) == 1:
        target: Any = node.target if node.op == "call_function" else getattr(Tensor, str(node.target))
        return target(constant.clone(), *node.args[1:], **node.kwargs)
    if isinstance(module, _POOLS) or _averages_space(node, name, graph):
        return constant
    if isinstance(module, nn.Flatten) or name == "flatten":
        before, after = graph.shape(node.all_input_nodes[0]), graph.shape(node)
        if before is not None and after is not None and before[:2] == after[:2] and len(after) == 2:
            return constant
        if before is not None and after is not None and len(after) == 2:
            return constant.repeat_interleave(after[1] // before[1])
    raise Refused(Reason.OPAQUE_OPERATION, f"a constant channel cannot pass {named(node, graph)}")


def _averages_space(node: fx.Node, name: str, graph: ModelGraph) -> bool:
    axes = arguments_of(node).get("dim")
    shape = graph.shape(node.all_input_nodes[0]) if node.all_input_nodes else None
    if name not in ("mean", "amax") or shape is None or not isinstance(axes, list | tuple):
        return False
    return {int(axis) % len(shape) for axis in axes} == set(range(2, len(shape)))  # type: ignore[arg-type]


def _plan(norm: str, source: str, target: str, constant: Tensor, dead: Tensor, graph: ModelGraph) -> _Prune:
    first, middle, last = (graph.module(name) for name in (source, norm, target))
    weight: Tensor = last.weight.detach().double()  # type: ignore[union-attr, operator, assignment]
    per_channel = weight.shape[1] // len(dead)  # columns of one channel: more than one behind a flatten
    values = constant.to(weight.device)
    columns = dead.repeat_interleave(per_channel).to(weight.device)
    spread = values if len(values) == len(columns) else values.repeat_interleave(per_channel)
    if _pads_with_zeros(last):
        columns = columns & (spread == 0)
        if not bool(columns.any()):
            text = f"the constants of {norm} would meet the zeros that {target} pads with"
            raise Refused(Reason.NONZERO_PADDING, text)
    gone = columns.reshape(-1, per_channel).all(1)
    gone[0] &= not bool(gone.all())  # a layer keeps one channel
    columns, kept = gone.repeat_interleave(per_channel), ~gone
    folded = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    shift = folded[:, columns] @ spread[columns]
    bias = getattr(last, "bias", None)
    tensors = {
        f"{target}.weight": weight[:, ~columns],
        f"{target}.bias": shift if bias is None else bias.detach().double() + shift,
        **{f"{source}.{key}": t.detach()[kept.to(t.device)] for key, t in _own(first)},
        **{f"{norm}.{key}": t.detach()[kept.to(t.device)] for key, t in _own(middle)},
    }
    sizes = ((source, "out"), (norm, "num"), (target, "in"))
    edits = tuple(_edit(path, kind, graph.module(path), tensors) for path, kind in sizes)
    return _Prune(tensors, edits)


def _pads_with_zeros(module: Any) -> bool:
    if not isinstance(module, _ConvNd):
        return False
    padding = module.padding if isinstance(module.padding, tuple) else (1,) if module.padding == "same" else (0,)
    return module.padding_mode == "zeros" and any(padding)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the tensors of a layer that have one row for each channel it writes."""
    return [(k, t) for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None and t.dim()]


def _edit(path: str, kind: str, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    names = {"out": ("out_channels", "out_features"), "in": ("in_channels", "in_features"), "num": ("num_features",)}
    shapes = {k.rpartition(".")[2]: list(t.shape) for k, t in tensors.items() if k.rpartition(".")[0] == path}
    axis = 1 if kind == "in" else 0
    attribute = next(name for name in names[kind] if hasattr(module, name))
    return {"op": "resize", "path": path, "attributes": {attribute: shapes["weight"][axis]}, "tensors": shapes}
