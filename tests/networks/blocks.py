"""Blocks of several layers, called in the ways in which users call them: in a row, in a loop, around a residual."""

from __future__ import annotations

from tests.networks.draft import Draft


def block(draft: Draft, x: str) -> str | None:
    """Add layers in a row, with a norm, in a container."""
    n = draft.spatial(x)
    if n not in (0, 1, 2, 3) or not draft.channels_at:
        return None
    given = draft.channels(x)
    made = draft.one(given, given, 2, 4)
    norm = f"nn.BatchNorm{max(n, 1)}d({made})"
    if n == 0:
        layers = [f"nn.Linear({given}, {made}{draft.one('', ', bias=False')})", norm]
    else:
        kernel, padding = draft.one((1, 0), (3, 1))
        bias = draft.one("", ", bias=False")
        layers = [f"nn.Conv{n}d({given}, {made}, {kernel}, padding={padding}{bias})", norm]
    layers[1:1] = [f"nn.ZeroPad{n}d(1)"] if n and draft.chance(0.08) else []
    layers += [draft.one("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.GELU()", "nn.Identity()")] * draft.chance(0.7)
    layers = layers[::-1] if made == given and draft.chance(0.2) else layers
    return _called(draft, x, ", ".join(layers), made == given)


def _called(draft: Draft, x: str, layers: str, fits: bool) -> str | None:
    name = draft.name("block")
    own, kept = f"self.{name}", f"self.kept_{name}"
    loop = f"OUT = {x}\nfor layer in LAYERS:\n    OUT = layer(OUT)"
    row, listed = f"{own} = nn.Sequential({layers})", f"{own} = nn.ModuleList([{layers}])"
    forms = [
        ([row], f"{own}({x})"),
        ([row], f"{own}({x})"),
        ([listed], loop.replace("LAYERS", own)),
        ([row], loop.replace("LAYERS", f"{own}.children()")),
        ([row], f"OUT = {own}[:1]({x})\nOUT = {own}[1:](OUT)"),
        ([listed, f"{kept} = list({own})"], loop.replace("LAYERS", kept)),
        ([listed], f"functools.reduce(lambda value, layer: layer(value), {own}, {x})"),
        ([row], f"torch.utils.checkpoint.checkpoint({own}, {x}, use_reentrant=False)"),
        ([row], f"torch.func.functional_call({own}, dict({own}.named_parameters()), ({x},))"),
        ([row, f"{kept} = {{'run': {own}.forward}}"], f"{kept}['run']({x})"),
    ]
    if fits:
        forms += [([row], f"{x} + {own}({x})"), ([row], f"{own}({x}).add_({x})"), ([row], f"{own}({own}({x}))")]
    lines, code = draft.one(*forms)
    return draft.say(x, code) if draft.make(*lines) else None


def attention(draft: Draft, x: str) -> str | None:
    """Let tokens attend to each other, by a layer or written out; or read them one after the other."""
    shape = draft.shape(x)
    if len(shape) != 3 or not draft.channels_at:
        return None
    size, name = shape[-1], draft.name("attention")
    heads = draft.one(1, 2) if size % 2 == 0 else 1
    own = f"self.{name}"
    whole = f"q, k, v = {own}({x}).chunk(3, dim=-1)\nOUT = F.scaled_dot_product_attention(q, k, v)"
    scores = f"q, k, v = {own}({x}).split({size}, -1)\nOUT = torch.softmax(q @ k.transpose(-2, -1), axis=-1) @ v"
    width = f"{size}, {heads}, 8, batch_first=True"
    forms = [
        (f"{own} = nn.MultiheadAttention({size}, {heads}, batch_first=True)", f"{own}({x}, {x}, {x})[0]"),
        (f"{own} = nn.MultiheadAttention({size}, {heads})", f"{own}({x}, {x}, {x}, need_weights=False)[0]"),
        (f"{own} = nn.Linear({size}, {3 * size}, bias={draft.chance(0.5)})", whole),
        (f"{own} = nn.Linear({size}, {3 * size})", scores),
        (f"{own} = nn.GRU({size}, {size}, batch_first=True)", f"{own}({x})[0]"),
        (f"{own} = nn.TransformerEncoderLayer({width}, norm_first={draft.chance(0.5)})", f"{own}({x})"),
    ]
    line, code = draft.one(*forms)
    return draft.say(x, code) if draft.make(line) else None
