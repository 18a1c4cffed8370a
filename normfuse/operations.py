"""One vocabulary for layers and functions: ``nn.ReLU``, ``F.relu``, ``torch.relu_`` and ``x.relu()`` are all ``relu``.

An :class:`Operation` names what a node does and holds the few arguments that the rules of :mod:`normfuse.rules` ask
for, whichever way the model spelled it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from normfuse.call_arguments import arguments_of
from normfuse.capture.leaves import base_layer
from normfuse.graph import ModelGraph, function_name


@dataclass(frozen=True, slots=True)
class Operation:
    """What a node does.

    Attributes:
        name: The canonical name; ``""`` where none is known.
        inputs: The values it reads, in order of the arguments (the items of a list argument in line).
        args: Arguments by name: those of :mod:`normfuse.call_arguments`, or the attributes of a layer.
        label: How to call it in a message: ``"layer1.0.relu (ReLU)"`` or ``"torch.relu"``.
    """

    name: str
    inputs: tuple[fx.Node, ...]
    args: dict[str, Any] = field(default_factory=dict)
    label: str = ""


_LAYERS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), "identity"),
    ((nn.FeatureAlphaDropout,), "identity"),
    ((nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU), "relu"),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), "max_pool"),
    ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), "max_pool"),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), "avg_pool"),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), "adaptive_avg_pool"),
    ((nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d), "interpolate"),
    ((nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), "gather"),
    ((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), "pad"),
    ((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), "gather"),
    ((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), "gather_copy"),
    ((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), "gather_copy"),
)
_SYNONYMS = {
    "iadd": "add", "isub": "sub", "subtract": "sub", "imul": "mul", "multiply": "mul", "rmul": "mul", "radd": "add",
    "truediv": "div", "itruediv": "div", "true_divide": "div", "divide": "div", "negative": "neg",
    "concat": "cat", "concatenate": "cat", "hstack": "cat", "vstack": "cat", "dstack": "cat", "row_stack": "cat",
    "column_stack": "cat", "leaky_relu": "relu", "prelu": "relu", "rrelu": "relu",
}  # fmt: skip
_GROUPS = {
    "identity": "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout contiguous "
    "clone detach alias identity positive to float double half bfloat16 type_as requires_grad stochastic_depth "
    "_to_copy native_dropout type lift_fresh to_copy data",
    "gather": "reshape view flatten unflatten permute transpose t T mT numpy_T swapaxes swapdims movedim moveaxis "
    "squeeze unsqueeze pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle roll flip narrow select "
    "chunk split tensor_split unbind hsplit vsplit split_with_sizes getitem expand expand_as repeat tile broadcast_to "
    "repeat_interleave view_as reshape_as unsafe_chunk unsafe_split unsafe_view index_select rot90 flipud fliplr ravel "
    "atleast_1d atleast_2d atleast_3d",
    "max_pool": "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    "avg_pool": "avg_pool1d avg_pool2d avg_pool3d",
    "adaptive_avg_pool": "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    "interpolate": "interpolate upsample upsample_nearest upsample_bilinear upsample_nearest2d upsample_bilinear2d "
    "upsample_bicubic2d",
}
_CANONICAL = {name: group for group, names in _GROUPS.items() for name in names.split()} | _SYNONYMS


def describe(node: fx.Node, graph: ModelGraph) -> Operation:
    """Return what a node does, in the one vocabulary."""
    inputs = tuple(node.all_input_nodes)
    if node.meta.get("removed"):
        value = [source for source in inputs if not graph.is_constant(source)]
        return Operation("identity", tuple(value[:1]), {}, f"{node.name}, a folded norm")
    if node.op == "call_module":
        return _of_layer(node, graph, inputs)
    plain = function_name(node)
    if plain == "pick":
        return _of_part(node, describe(inputs[0], graph))
    name = _CANONICAL.get(plain, plain)
    label = f"{plain or node.name} in {_where(node)}"
    if name == "getitem" or plain == "getitem":
        name = "gather"
    return Operation(name, _in_order(node), {**arguments_of(node), "function": plain}, label)


def named(node: fx.Node, graph: ModelGraph) -> str:
    """Return how to call a value, or what reads one, in a message."""
    if node.op == "placeholder":
        return f"the input {node.name} of the model"
    if node.op == "output":
        return "the output of the model"
    return str(node.target) if node.op == "get_attr" else describe(node, graph).label


def _of_layer(node: fx.Node, graph: ModelGraph, inputs: tuple[fx.Node, ...]) -> Operation:
    module = graph.module_of(node)
    assert module is not None
    label = f"{node.target} ({type(module).__name__})"
    if base_layer(module) is None:
        return Operation("", inputs, {}, label)
    for classes, name in _LAYERS:
        if isinstance(module, classes):
            return Operation(name, inputs, {**vars(module), "layer": base_layer(module)}, label)
    return Operation("", inputs, {}, label)


def _of_part(node: fx.Node, whole: Operation) -> Operation:
    """One of several results: a part of a split, which only moves values, or the values of a maximum."""
    values = {"max": "amax", "max_pool": "max_pool"} if node.args[1] == 0 else {}
    name = "gather" if whole.name == "gather" else values.get(whole.name, "")
    return Operation(name, whole.inputs, whole.args, whole.label)


def _in_order(node: fx.Node) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), found.append)  # type: ignore[arg-type]
    return tuple(found)


def _where(node: fx.Node) -> str:
    scope = node.meta.get("scope", ())
    return (scope[-1].name or "the model") if scope else "the model"
