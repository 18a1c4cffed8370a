"""Layers that multiply by weights, each called in one of the ways in which users call them."""

from __future__ import annotations

from typing import Any

from tests.networks.draft import Draft

HOLDERS = {
    "attribute": 40, "list": 2, "dict": 1, "tuple": 1, "object": 2, "closure": 1, "partial": 1, "bound": 1,
    "module list": 2, "module dict": 1, "wrapped": 3, "sequential": 3, "getattr": 1, "modules": 1, "unregistered": 0.5,
}  # fmt: skip


def place(draft: Draft, stem: str, constructor: str) -> tuple[str, str | None] | None:
    """Add a layer to the network.

    Returns:
        What calls it, and what its parameters are read from, None where only the call is at hand; None in place of
        both where no such layer exists.
    """
    name = draft.name(stem)
    made = f"self.{name} = {constructor}"
    lines, call, owner = _placed(draft.weighted(HOLDERS), name, made, constructor)
    return (call, owner) if draft.make(*lines) else None


def _placed(kind: str, name: str, made: str, constructor: str) -> tuple[list[str], str, str | None]:
    own, kept = f"self.{name}", f"self.kept_{name}"
    table: dict[str, tuple[list[str], str, str | None]] = {
        "attribute": ([made], own, own),
        "list": ([made, f"{kept} = [{own}]"], f"{kept}[0]", f"{kept}[0]"),
        "dict": ([made, f"{kept} = {{'a': {own}}}"], f"{kept}['a']", own),
        "tuple": ([made, f"{kept} = ({own}, 1)"], f"{kept}[0]", own),
        "object": ([made, f"{kept} = parts.Box(layer={own})"], f"{kept}.run", f"{kept}.layer"),
        "closure": ([f"layer = {constructor}", f"{own} = layer", f"{kept} = (lambda f: lambda x: f(x))(layer)"], kept, own),  # noqa: E501
        "partial": ([made, f"{kept} = functools.partial({own})"], kept, own),
        "bound": ([made, f"{kept} = {own}.forward"], kept, own),
        "module list": ([f"{own} = nn.ModuleList([{constructor}])"], f"{own}[0]", f"{own}[0]"),
        "module dict": ([f"{own} = nn.ModuleDict({{'a': {constructor}}})"], f"{own}['a']", f"{own}['a']"),
        "wrapped": ([f"{own} = parts.Wrapped({constructor})"], own, f"{own}.layer"),
        "sequential": ([f"{own} = nn.Sequential({constructor})"], own, f"{own}[0]"),
        "getattr": ([made], f"getattr(self, {name!r})", own),
        "modules": ([made], f"self._modules[{name!r}]", own),
        "unregistered": ([f"{kept} = [{constructor}.eval()]"], f"{kept}[0]", None),
    }  # fmt: skip
    return table[kind]


def product(draft: Draft, x: str) -> str | None:
    """Add a convolution, a linear layer or another product with weights."""
    spatial = draft.spatial(x)
    options = {linear: 2.0 if spatial in (1, 2, 3) else 6.0, matrix: 0.7}
    if spatial in (1, 2, 3):
        options |= {convolution: 6.0, own_convolution: 0.8}
    return draft.weighted(options)(draft, x)


def convolution(draft: Draft, x: str) -> str | None:
    """Add a convolution of any kind: grouped, depthwise, transposed, padded, dilated."""
    n, given = draft.spatial(x), draft.channels(x)
    transposed = draft.chance(0.12)
    groups = draft.one(1, 1, 1, *(g for g in (2, 3, given) if given % g == 0))
    made = groups * draft.one(1, 2) if groups > 1 else draft.one(2, 3, 4, 6)
    kernel = draft.one(1, 1, 3, 3, 2)
    settings = {"groups": groups} if groups > 1 else {}
    settings |= {"stride": 2} if draft.chance(0.15) else {}
    settings |= {"padding": draft.one(1, 1, "same", (1,) * n)} if kernel > 1 and draft.chance(0.5) else {}
    settings |= {"dilation": 2} if kernel > 1 and draft.chance(0.1) else {}
    mode = draft.one("reflect", "circular", "replicate") if settings.get("padding") and draft.chance(0.2) else None
    if transposed and (settings.get("padding") == "same" or mode):
        return None
    bias = draft.chance(0.6)
    modes = {"padding_mode": mode} if mode else {}
    text = _settings({**settings, **modes, **({} if bias else {"bias": False})})
    kind = f"Conv{'Transpose' if transposed else ''}{n}d"
    if n == 2 and not transposed and draft.chance(0.08):
        kind = draft.one("UnbiasedConv", "StandardizedConv", "ConvNorm")
    owner = "parts" if kind in ("UnbiasedConv", "StandardizedConv", "ConvNorm") else "nn"
    if kind == "ConvNorm" and draft.chance(0.7):
        text += f", norm=nn.BatchNorm2d({made})"
    layer = place(draft, "conv", f"{owner}.{kind}({given}, {made}, {kernel}{text})")
    if layer is None:
        return None
    return _called(draft, x, layer, f"conv{'_transpose' if transposed else ''}{n}d", settings, bias, mode is not None)


def _settings(values: dict[str, Any]) -> str:
    return "".join(f", {key}={value!r}" for key, value in values.items())


def _called(
    draft: Draft, x: str, layer: tuple[str, str | None], function: str, settings: dict[str, Any], bias: bool, only: bool
) -> str | None:
    """Call a layer as a module, or its function on its parameters."""
    call, owner = layer
    if owner is None or only or draft.chance(0.6):
        return draft.say(x, f"{call}({x})")
    rest, b = _settings(settings), f"{owner}.bias"
    home = draft.one("F.", "F.", "F.", "torch.") if function != "linear" else "F."
    forms = [
        f"{home}{function}({x}, {owner}.weight, {b}{rest})",
        f"{home}{function}({x}, {owner}.weight{rest})",
        f"{home}{function}({x}, {owner}.weight, None{rest})",
        f"{home}{function}({x}, weight={owner}.weight, bias={b}{rest})",
        f"{home}{function}(input={x}, weight={owner}.weight{rest}, bias=None)",
        f"{home}{function}({x}, {owner}.weight * 2, {b}{rest})",
        f"{home}{function}({x}, {owner}.weight.to({x}.dtype), {b}{rest})",
    ]
    if function.startswith("conv") and "transpose" not in function:
        n = draft.spatial(x)
        forms += [f"{owner}._conv_forward({x}, {owner}.weight, {one})" for one in (b, "None")]
        if bias:
            view = f"{b}.view(-1{', 1' * n})"
            forms += [f"{home}{function}({x}, {owner}.weight{rest}) + {view}"]
    if function == "linear":
        forms += [f"{x} @ {owner}.weight.t()", f"{x} @ {owner}.weight.T", f"torch.matmul({x}, {owner}.weight.mT)"]
        forms += [f"{owner}.forward({x})"]
        forms += [f"F.linear({x}, {owner}.weight) + {b}"] if bias else []
    return draft.say(x, draft.one(*forms))


def own_convolution(draft: Draft, x: str) -> str | None:
    """Convolve with parameters of the network itself, or of a module that is no layer."""
    n, given = draft.spatial(x), draft.channels(x)
    made, kernel = draft.one(2, 3, 4), draft.one(1, 3)
    shape = (made, given, *[kernel] * n)
    name = draft.name("own")
    if draft.chance(0.6):
        scale = draft.one("", " * 0.5")
        lines = [f"self.{name} = nn.Parameter(torch.randn{shape}{scale})"]
        lines += [f"self.{name}_bias = nn.Parameter(torch.randn({made}))"]
        w, b = f"self.{name}", f"self.{name}_bias"
    else:
        lines = [f"self.{name} = parts.Holder(weight={shape}, bias=({made},))"]
        w, b = f"self.{name}.weight", f"self.{name}.bias"
    if not draft.make(*lines):
        return None
    bias = draft.one(f", {b}", f", bias={b}", "", ", None")
    return draft.say(x, f"F.conv{n}d({x}, {w}{bias}{draft.one('', ', padding=1') if kernel == 3 else ''})")


def linear(draft: Draft, x: str) -> str | None:
    """Add a linear layer over the last axis, which may be moved there first."""
    given, made, bias = draft.shape(x)[-1], draft.one(2, 3, 4, 6), draft.chance(0.6)
    layer = place(draft, "linear", f"nn.Linear({given}, {made}{'' if bias else ', bias=False'})")
    return None if layer is None else _called(draft, x, layer, "linear", {}, bias, False)


def matrix(draft: Draft, x: str) -> str | None:
    """Multiply by a parameter: ``@``, ``matmul``, ``addmm``, ``einsum``."""
    given, made, name = draft.shape(x)[-1], draft.one(2, 3, 4), draft.name("own")
    lines = [f"self.{name} = nn.Parameter(torch.randn({given}, {made}))"]
    lines += [f"self.{name}_bias = nn.Parameter(torch.randn({made}))"]
    if not draft.make(*lines):
        return None
    w, b = f"self.{name}", f"self.{name}_bias"
    forms = [
        f"{x} @ {w}",
        f"torch.matmul({x}, {w})",
        f"{x}.matmul({w}) + {b}",
        f"torch.einsum('...i,ij->...j', {x}, {w})",
    ]
    if len(draft.shape(x)) == 2:
        forms += [f"torch.addmm({b}, {x}, {w})", f"torch.mm({x}, {w})", f"{b}.addmm({x}, {w})"]
        forms += [f"torch.addmm({b}, {x}, {w}, beta=0.5, alpha=2)", f"torch.einsum('ni,ij->nj', {x}, {w})"]
    return draft.say(x, draft.one(*forms))


def embedding(draft: Draft, x: str) -> str | None:
    """Look integers up."""
    layer = place(draft, "embedding", f"nn.Embedding(7, {draft.one(3, 4, 6)})")
    if layer is None:
        return None
    call, owner = layer
    forms = [f"{call}({x})"] * 3
    forms += [] if owner is None else [f"F.embedding({x}, {owner}.weight)", f"{owner}.weight[{x}]"]
    return draft.say(x, draft.one(*forms))


def parametrized(draft: Draft, x: str) -> str | None:
    """Give a layer of the network a weight that is computed."""
    from torch import nn

    names = draft.layers(nn.Linear, nn.Conv1d, nn.Conv2d)
    if not names:
        return None
    own = f"self.{draft.one(*names)}"
    utils = "nn.utils"
    draft.make(
        draft.one(
            f"{utils}.parametrizations.weight_norm({own})",
            f"{utils}.parametrizations.spectral_norm({own})",
            f"{utils}.parametrize.register_parametrization({own}, 'weight', parts.Doubled())",
            f"{utils}.prune.random_unstructured({own}, 'weight', 0.3)",
            f"{utils}.spectral_norm({own})",
            f"for p in {own}.parameters(): p.requires_grad_(False)",
        )
    )
    return None


def repeated(draft: Draft, x: str) -> str | None:
    """Call a layer of the network again."""
    from torch import nn

    names = draft.layers(nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
    return draft.say(x, f"self.{draft.one(*names)}({x})") if names else None
