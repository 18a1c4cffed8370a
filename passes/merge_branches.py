"""Merge parallel linear branches of one value into one convolution.

    z = sum of  W_i * x + b_i,   a_j x + c_j,   x     =>     z = W' * x + b'

A branch may be a convolution, a norm of fixed affine form, a per-channel factor or the identity; sums and differences
nest (RepVGG, arXiv 2101.03697; MobileOne, arXiv 2206.04040; FastViT, arXiv 2303.14189; RepGhost, arXiv 2211.06088). The
module that holds the branches is replaced by the chain of what runs before them, the convolution, and what runs after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from normfuse import absorbers, branches, norms, standing_in, surgery
from normfuse.affine import AffineMap
from normfuse.base import Exactness, Match, Pass, Reason, Refusal, Refused
from normfuse.branches import Form
from normfuse.graph import ModelGraph, ModuleCall, function_name
from normfuse.legality import require_no_hooks, require_replaceable
from normfuse.norms import Norm
from normfuse.numerics import exact
from normfuse.operations import describe
from normfuse.scopes import head_before, tail_after

Forms = dict[fx.Node, Form]


@dataclass(frozen=True, slots=True, eq=False)
class _Region:
    """Branches from ``base`` to ``join``, inside one module call, and the chains around them."""

    base: fx.Node
    join: fx.Node
    form: Form
    call: ModuleCall
    head: list[str]
    tail: list[str]
    nodes: list[fx.Node]


class MergeBranches(Pass):
    """Sums of parallel convolutions, norms and identities into one convolution."""

    name = "merge-branches"
    exactness = Exactness.EXACT

    def detect(self, graph: ModelGraph) -> Iterator[Match]:
        """Yield the modules whose body is a merged region, innermost first."""
        regions = _Finder(graph).regions()
        for region in sorted(regions, key=lambda r: -r.call.name.count(".")):
            layer = type(graph.module(region.call.name)).__name__
            yield Match(region.call.name, layer, norm=False, payload=region)

    def check(self, match: Match, graph: ModelGraph) -> Match | Refusal:
        """Refuse what is shared, hooked, or would cost more than the branches do."""
        region: _Region = match.payload
        try:
            _require_own(region, graph)
            _require_cheaper(region)
        except Refused as refused:
            return refused.refusal
        partners = tuple(str(n.target) for n in region.nodes if n.op == "call_module" and not n.meta.get("removed"))
        absorbed = tuple((n.name, n.layer) for n in norms.find_norms(graph) if set(n.nodes) & set(region.nodes))
        return replace(match, partners=partners, absorbed=absorbed)

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Replace the module by the chain with the merged convolution, and give that its values."""
        region: _Region = match.payload
        weight, bias = region.form.weight, region.form.bias
        parts: list[dict[str, Any]] = [{"ref": name} for name in region.head]
        parts += [_spec(region.form), *({"ref": name} for name in region.tail)]
        path = region.call.name
        graph.perform({"op": "replace", "path": path, "module": parts[0] if len(parts) == 1 else {"sequential": parts}})
        name = path if len(parts) == 1 else f"{path}.{len(region.head)}"
        surgery.assign(graph.root.get_submodule, {f"{name}.weight": weight, f"{name}.bias": bias})


def _spec(form: Form) -> dict[str, Any]:
    assert form.weight is not None
    out, per_group, *kernel = form.weight.shape
    kwargs = {
        "in_channels": per_group * form.groups,
        "out_channels": out,
        "kernel_size": kernel,
        "stride": list(form.stride),
        "padding": list(form.padding),
        "dilation": list(form.dilation),
        "groups": form.groups,
    }
    return {"class": f"torch.nn.modules.conv.Conv{len(kernel)}d", "kwargs": kwargs}


def _require_own(region: _Region, graph: ModelGraph) -> None:
    calls = graph.calls_of(region.call.name)
    if len(calls) > 1:
        raise Refused(Reason.SHARED_MODULE, f"{region.call.name} is called {len(calls)} times")
    require_replaceable(region.call.name, graph)
    standing_in.require_unasked(region.call.name, graph)
    for node in region.nodes:
        if node.op == "call_module":
            require_no_hooks(str(node.target), graph)
            if len(graph.call_sites(str(node.target))) > 1:
                raise Refused(Reason.SHARED_MODULE, f"{node.target} is called more than once")
    if graph.partial:
        raise Refused(Reason.PARTIAL_CAPTURE, "only parts of the model could be traced", "pass example_inputs")


def _require_cheaper(region: _Region) -> None:
    weight = region.form.weight
    if weight is None or weight.numel() > region.form.cost:
        text = f"one convolution for the branches of {region.call.name} would do more work than they do"
        raise Refused(Reason.NOT_CHEAPER, text)


class _Finder:
    """Finds the regions of a graph: largest sums whose terms are forms of one value."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.memo: dict[fx.Node, Forms] = {}
        self.norm_of = {node: norm for norm in norms.norm_nodes(graph) for node in norm.nodes}

    def regions(self) -> list[_Region]:
        """Return the regions, each node in at most one."""
        for node in self.graph.nodes:
            self.memo[node] = self._forms(node)
        found, taken = [], set()
        for node in reversed(self.graph.nodes):
            if node not in taken and (region := self._region(node)) is not None and not taken & set(region.nodes):
                taken |= set(region.nodes)
                found.append(region)
        return found

    def _region(self, join: fx.Node) -> _Region | None:
        """Return the widest region that ends at a node and can be cut out of a module."""
        for base, form in sorted(self.memo[join].items(), key=lambda item: -item[1].joins):
            if form.joins == 0 or form.weight is None:
                continue
            nodes = self._between(base, join)
            if nodes is None:
                continue
            for call in reversed(join.meta.get("scope", ())):
                if not call.name:
                    continue
                head, tail = head_before(base, call, nodes), tail_after(join, call, self.graph)
                if head is not None and tail is not None:
                    return _Region(base, join, form, call, head, tail, nodes)
        return None

    def _between(self, base: fx.Node, join: fx.Node) -> list[fx.Node] | None:
        """Return the nodes from ``base`` (left out) to ``join``; None if something else reads one of them."""
        inside: dict[fx.Node, None] = {join: None}
        stack = [join]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source is not base and source not in inside and not self.graph.is_constant(source):
                    inside[source] = None
                    stack.append(source)
        inner = [node for node in inside if node is not join]
        if any(user not in inside for node in inner for user in self.graph.consumers(node)):
            return None
        return sorted(inside, key=self.graph.order.__getitem__)

    # forms of one node, by base

    def _forms(self, node: fx.Node) -> Forms:
        try:
            return {**self._step(node), **self._trivial(node)}
        except Refused:
            return self._trivial(node)

    def _trivial(self, node: fx.Node) -> Forms:
        shape = self.graph.shape(node)
        channels = self._channels(node) if shape is None else shape[1] if len(shape) > 1 else None
        if channels is None or node.op in ("get_attr", "output"):
            return {}
        return {node: Form.channelwise(torch.ones(channels), torch.zeros(channels))}

    def _channels(self, node: fx.Node) -> int | None:
        module = self.graph.module_of(node)
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.out_channels
        source = next(iter(node.all_input_nodes), None)
        keeps = node in self.norm_of or describe(node, self.graph).name in ("relu", "identity", "add", "sub", "mul")
        known = self.memo.get(source) if source is not None and (keeps or isinstance(module, _ELEMENTWISE)) else None
        return next((form.bias.numel() for base, form in known.items() if base is source), None) if known else None

    def _step(self, node: fx.Node) -> Forms:
        """Return the forms that a node has by what it does to its inputs."""
        if node in self.norm_of and not node.meta.get("removed"):
            return self._of_norm(node, self.norm_of[node])
        operation = describe(node, self.graph)
        if operation.name == "identity":
            return self.memo[operation.inputs[0]]
        if operation.name in ("add", "sub"):
            return self._of_sum(operation.args, operation.name)
        if operation.name == "mul":
            return self._of_factor(node, operation.args)
        return self._of_convolution(node)

    def _of_norm(self, node: fx.Node, norm: Norm) -> Forms:
        if len(norm.nodes) != 1:
            return {}
        value, m = norms.source(norm, node, self.graph)
        return {base: form.map(m) for base, form in self.memo[value].items()}

    def _of_sum(self, args: dict[str, Any], name: str) -> Forms:
        left, right = args.get("input"), args.get("other")
        if name == "add" and isinstance(right, fx.Node) and not isinstance(left, fx.Node):
            left, right = right, left
        if not isinstance(left, fx.Node) or right is None or args.get("alpha", 1) != 1:
            return {}
        if not isinstance(right, fx.Node):
            return self._of_number(left, -float(right) if name == "sub" else float(right))
        summed: Forms = {}
        for base in self.memo[left].keys() & self.memo[right].keys():
            one, two = self.memo[left][base], self.memo[right][base]
            if name == "sub":
                two = two.then(-torch.ones_like(two.bias), torch.zeros_like(two.bias))
            try:
                summed[base] = branches.add(one, two)
            except Refused:
                continue
        return summed

    def _of_number(self, value: fx.Node, number: float) -> Forms:
        forms = self.memo[value]
        return {base: f.then(torch.ones_like(f.bias), torch.full_like(f.bias, number)) for base, f in forms.items()}

    def _of_factor(self, node: fx.Node, args: dict[str, Any]) -> Forms:
        pair: list[Any] = [args.get("input"), args.get("other")]
        values = [v for v in pair if isinstance(v, fx.Node) and not self.graph.is_constant(v)]
        if len(values) != 1 or None in pair:
            return {}
        other = next(v for v in pair if v is not values[0])
        shape = self.graph.shape(values[0])
        factor = self.graph.value(other) if isinstance(other, fx.Node) else torch.tensor(float(other))
        if shape is None or shape != self.graph.shape(node):  # a factor that broadcasts its value makes more channels
            return {}
        factor = exact(factor).reshape((1,) * (len(shape) - factor.dim()) + tuple(factor.shape))
        m = AffineMap(factor, torch.zeros_like(factor))
        return {base: form.map(m) for base, form in self.memo[values[0]].items()}

    def _of_convolution(self, node: fx.Node) -> Forms:
        if function_name(node) or node.op != "call_module":
            return {}
        absorber = absorbers.output_side(node, self.graph)
        module: Any = self.graph.module_of(node)
        if absorber is None or absorber.kind != "conv" or absorber.transposed or module.padding_mode != "zeros":
            return {}
        padding, shape = _numbers(module), self.graph.shape(node)
        if shape is not None and len(shape) != module.weight.dim():  # without a batch, channels are not on axis 1
            return {}
        if padding is None or nn.utils.parametrize.is_parametrized(module):
            return {}
        bias = None if module.bias is None else module.bias.detach()
        geometry = (module.stride, padding, module.dilation, module.groups)
        return {node.all_input_nodes[0]: Form.convolution(module.weight.detach(), bias, *geometry)}


_ELEMENTWISE = (nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.BatchNorm2d)


def _numbers(module: Any) -> tuple[int, ...] | None:
    """Return the padding of a convolution in numbers; None where it is not the same on both sides."""
    if not isinstance(module.padding, str):
        return module.padding
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
