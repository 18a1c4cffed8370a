"""The layers and parameters that take an affine map into their own values.

On the output side: convolutions, linear layers, embeddings, constant addends and factors, and the trailing gain and
shift of a norm. On the input side: convolutions, linear layers and the projections of an attention. A layer may be a
module or a call of its function on parameters, which :mod:`normfuse.product_calls` reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normfuse import adapters, bias_trials, product_calls
from normfuse.base import Reason, Refused
from normfuse.capture.leaves import base_layer
from normfuse.graph import ModelGraph, occurrences
from normfuse.layers.l1_layer_norm import L1TokenNorm
from normfuse.product_calls import ProductCall

Kind = Literal["conv", "linear", "embedding", "addend", "factor", "norm", "attention"]
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, L1TokenNorm)


@dataclass(frozen=True, slots=True)
class Absorber:
    """A place in the graph that can take a map into named tensors of the model.

    Attributes:
        kind: What it computes.
        name: Qualified name of the layer, or of the weight that a function is called on, for reports.
        weight: Qualified name of the tensor that is scaled.
        bias: Qualified name of the tensor that is shifted, None where nothing adds one. That of a module may be None
            in the model yet.
        transposed: Whether the inputs are along axis 0 of the weight: a transposed convolution, or ``addmm``.
        padded: Whether an input shift would be missing in zeros that the layer pads with.
        call: The call of a function on the parameters; None for a layer, and for a constant.
    """

    kind: Kind
    name: str
    weight: str
    bias: str | None = None
    groups: int = 1
    transposed: bool = False
    padded: bool = False
    call: fx.Node | None = field(default=None, compare=False)

    @property
    def owner(self) -> str:
        """Qualified name of the module that holds the weight."""
        return self.weight.rpartition(".")[0]


def output_side(node: fx.Node, graph: ModelGraph) -> Absorber | None:
    """Return the absorber whose output ``node`` is, if it is one."""
    if node.op == "get_attr":
        return Absorber("addend", str(node.target), str(node.target))
    if node.meta.get("removed"):
        return None
    module = graph.module_of(node)
    if module is None:
        call = product_calls.read(node, graph)
        return _of_call(call, node, graph) if call is not None and call.kind != "attention" else None
    layer = base_layer(module)
    name = str(node.target)
    if isinstance(module, nn.Embedding) and layer is not None:
        # with max_norm the forward pass rescales the rows it reads, so scaled rows would not stay scaled
        return Absorber("embedding", name, f"{name}.weight") if module.max_norm is None else None
    if isinstance(module, _NormBase) and layer is None:
        raise _untraced(name, module)
    if isinstance(module, _NORMS) and module.weight is not None:
        return Absorber("norm", name, f"{name}.weight", None if layer is nn.RMSNorm else f"{name}.bias")
    return _layer(node, module, name)


def input_side(node: fx.Node, value: fx.Node, graph: ModelGraph) -> Absorber | None:
    """Return the absorber that ``node`` is for its input ``value``, if it is one."""
    module = graph.module_of(node)
    if module is None:
        call = product_calls.read(node, graph)
        applied, absorber = (call.value, _of_call(call, node, graph)) if call is not None else (None, None)
    else:
        applied = node.args[0] if node.args else node.kwargs.get("input")
        absorber = _layer(node, module, str(node.target))
    if absorber is None or absorber.kind not in ("conv", "linear", "attention"):
        return None
    alone = occurrences(node, value) == 1 or absorber.kind == "attention"  # whose query, key and value it is
    return absorber if applied is value and alone else None


def _layer(node: fx.Node, module: nn.Module, name: str) -> Absorber | None:
    layer = base_layer(module)
    if layer is None:
        if isinstance(module, _ConvNd) and adapters.pads_same(module):
            return Absorber("conv", name, f"{name}.weight", f"{name}.bias", module.groups, padded=True)
        if isinstance(module, _ConvNd | nn.Linear):
            raise _untraced(name, module)
        return None
    if issubclass(layer, _ConvNd) and isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        zeros = module.padding_mode == "zeros" and _pads(module.padding, module.kernel_size)
        return Absorber("conv", name, f"{name}.weight", f"{name}.bias", module.groups, transposed, zeros or transposed)
    if issubclass(layer, nn.Linear):
        return Absorber("linear", name, f"{name}.weight", f"{name}.bias")
    return None


def _untraced(name: str, module: nn.Module) -> Refused:
    text = f"{name} ({type(module).__name__}) has its own forward, which cannot be traced"
    return Refused(Reason.FORWARD_OVERRIDDEN, text, "pass example_inputs")


def _of_call(call: ProductCall, node: fx.Node, graph: ModelGraph) -> Absorber:
    owner, _, attribute = call.weight.rpartition(".")
    name = owner if owner and attribute == "weight" else call.weight
    pads = call.transposed or _pads(call.padding, tuple(graph.tensor(call.weight).shape[2:]))
    padded = call.kind == "conv" and pads
    bias = call.bias or bias_trials.filled_place(call.weight, graph)
    return Absorber(call.kind, name, call.weight, bias, call.groups, call.transposed, padded, node)


def _pads(padding: Any, kernel: tuple[int, ...]) -> bool:
    if isinstance(padding, str):
        return padding == "same" and any(k > 1 for k in kernel)
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)
