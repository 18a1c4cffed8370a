"""Whole random networks: what goes in, what is done to it, what comes out, and what users do to it from outside."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.networks import blocks, layers, norms, operations
from tests.networks.draft import Draft
from tests.networks.network import Network

INPUTS = {
    "picture": (6, "torch.randn(n, {c}, 6, 6, dtype=torch.float64)"),
    "signal": (1.5, "torch.randn(n, {c}, 7, dtype=torch.float64)"),
    "volume": (0.5, "torch.randn(n, {c}, 4, 4, 4, dtype=torch.float64)"),
    "tokens": (1.5, "torch.randn(n, 5, {c}, dtype=torch.float64)"),
    "vector": (1, "torch.randn(n, {c}, dtype=torch.float64)"),
    "words": (0.7, "torch.randint(7, (n, 5))"),
    "unbatched signal": (0.6, "torch.randn({c}, 7, dtype=torch.float64)"),
    "unbatched picture": (0.3, "torch.randn({c}, 6, 6, dtype=torch.float64)"),
}
MOVES = {
    layers.product: 6.0,
    layers.repeated: 0.4,
    layers.parametrized: 0.5,
    blocks.block: 2.0,
    blocks.attention: 0.8,
    norms.norm: 2.0,
    norms.own_statistics: 0.3,
    operations.activation: 1.5,
    operations.arithmetic: 1.5,
    operations.window: 1.0,
    operations.movement: 1.5,
    operations.in_place: 0.4,
    operations.join: 1.5,
    operations.gate: 0.5,
}


def network(seed: int) -> Network:
    """Return the network of this seed."""
    draft = Draft(seed)
    kind = draft.weighted({name: weight for name, (weight, _) in INPUTS.items()})
    x = draft.input(INPUTS[kind][1].format(c=draft.one(2, 3, 4)))
    draft.channels_at = 0 if kind.startswith("unbatched") else 1
    if kind == "words":
        x = layers.embedding(draft, x) or x
    if draft.chance(0.5):
        x = layers.product(draft, x) or x
    for _ in range(draft.random.randint(1, 7)):
        x = _move(draft, x)
    _ensure_norm(draft, x)
    _from_outside(draft)
    gains = draft.one("positive", "signed", "signed", "zeros")
    return draft.finish(_output(draft), gains, _options(draft), several=draft.chance(0.4))


def _move(draft: Draft, x: str) -> str:
    """Do one thing to a value, or to an earlier one, and what often follows it."""
    if draft.chance(0.12):
        x = draft.one(*draft.values)
    if draft.chance(0.06):
        return _branch(draft, x) or x
    step = draft.weighted(MOVES)
    made = step(draft, x) or x
    if step is layers.product and made != x:
        for follower, share in ((operations.window, 0.08), (operations.arithmetic, 0.06), (operations.movement, 0.08)):
            made = follower(draft, made) or made if draft.chance(share) else made
        made = norms.norm(draft, made) or made if draft.chance(0.65) else made
        made = operations.activation(draft, made) or made if draft.chance(0.4) else made
    return made


def _ensure_norm(draft: Draft, x: str) -> None:
    """Add a norm, and sometimes a layer behind it, where there is none yet."""
    if "Norm" not in "".join(draft.setup):
        made = norms.norm(draft, x)
        if made is not None and draft.chance(0.5):
            layers.product(draft, made)


def _branch(draft: Draft, x: str) -> str | None:
    """Let a flag, or the shape of the value, decide what happens; or let the forward ask its norm."""
    n = draft.spatial(x)
    if not (draft.channels_at and n in (0, 1, 2, 3)):
        return None
    name = draft.name("branch")
    if not draft.make(f"self.{name} = nn.BatchNorm{max(n, 1)}d({draft.channels(x)})"):
        return None
    own = f"self.{name}"
    kind = draft.one("flag", "shape", "dtype", "eps", "isinstance", "none", "features")
    if kind == "flag":
        draft.flag("use_norm", "True", False)
    forms = {
        "flag": f"OUT = {own}({x}) if use_norm else {x}",
        "shape": f"OUT = {own}({x}) if {x}.shape[0] < 3 else {x} * 2",
        "dtype": f"OUT = {own}({x}.to({own}.weight.dtype))",
        "eps": f"OUT = {own}({x}) + {own}.eps",
        "isinstance": f"OUT = {own}({x}) if isinstance({own}, nn.BatchNorm{max(n, 1)}d) else {x}.exp()",
        "none": f"OUT = {x}\nif {own} is not None:\n    OUT = {own}(OUT)",
        "features": f"OUT = {own}({x}) * {own}.num_features",
    }
    return draft.say(x, forms[kind])


def _from_outside(draft: Draft) -> None:
    """Hooks, patches, ties and modes: what is done to a network once it is built, and around every module."""
    if draft.chance(0.02):
        hook = draft.one("watch", "double_convolutions")
        draft.surroundings = f"nn.modules.module.register_module_forward_hook(parts.{hook})"
    if not draft.chance(0.2):
        return
    names = draft.layers(nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.ReLU)
    if not names:
        return
    shared = any("lambda" in line for line in draft.setup)  # a layer that copies share must not learn
    mode = "net.requires_grad_(False)" if shared else "net.train()"
    own = f"net.{draft.one(*names)}"
    lines = [
        f"{own}.register_forward_hook(parts.double_output)", f"{own}.register_forward_pre_hook(parts.shift_input)",
        f"{own}.register_forward_hook(parts.watch)", f"{own}.register_full_backward_hook(parts.watch)",
        f"parts.patch_forward({own})", f"parts.patch_transparent({own})", mode, f"{own}.requires_grad_(False)",
        "net.register_forward_hook(parts.watch)", f"net.alias = {own}", mode,
        f"{own}._version_note = 'mine'", f"parts.patch_conv({own})" if "conv" in own else mode,
        f"net.twin = [{own}]",
    ]  # fmt: skip
    if not draft.flags:
        lines += ["net = nn.Sequential(net)", "net = parts.Wrapped(net)"]
    draft.after.append(draft.one(*lines))
    convs = draft.layers(nn.Conv2d)
    if len(convs) > 1 and draft.chance(0.5):
        a, b = (draft.net._modules[name] for name in convs[:2])
        if a.weight.shape == b.weight.shape:
            draft.after.insert(0, f"net.{convs[1]}.weight = net.{convs[0]}.weight")


def _output(draft: Draft) -> str:
    """Return the last value, or several in a container."""
    last = draft.body[-1].result if draft.body else "x"
    if draft.chance(0.75):
        return last
    other = draft.one(*draft.values)
    forms = [
        f"({last}, {other})",
        f"[{last}, {other}]",
        f"{{'out': {last}, 'aux': {other}}}",
        f"{last}, {other}.mean()",
    ]
    return draft.one(*forms, f"parts.Output({last}, {other})", f"parts.Output(logits={last})")


def _options(draft: Draft) -> dict[str, Any]:
    """Return keywords for the fold; mostly none."""
    if draft.chance(0.85):
        return {}
    names = [name for name, module in draft.net.named_modules() if name] or ["none"]
    return draft.one({"duplicate_shared": True}, {"duplicate_shared": True}, {"exclude": [draft.one(*names)]})
