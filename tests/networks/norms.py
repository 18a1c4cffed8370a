"""Norms of every kind, as modules, as functions, and written out."""

from __future__ import annotations

from tests.networks.draft import Draft
from tests.networks.layers import place


def norm(draft: Draft, x: str) -> str | None:
    """Add a norm that the value admits."""
    spatial = draft.spatial(x)
    options = {over_last: 1.0 if spatial else 2.0}
    if spatial in (0, 1, 2, 3) and (spatial or draft.channels_at):
        options |= {batch_norm: 7.0}
    if spatial in (1, 2, 3):
        options |= {instance_norm: 0.6, group_norm: 0.6}
    if spatial == 2 and draft.channels_at:
        options |= {special: 1.5}
    return draft.weighted(options)(draft, x)


def batch_norm(draft: Draft, x: str) -> str | None:
    """A BatchNorm, by its module or its function, or written out on its statistics."""
    n, channels = draft.spatial(x), draft.channels(x)
    if not draft.channels_at:  # without a batch, a BatchNorm of lower rank takes the next axis
        return _unbatched(draft, x)
    kind = f"BatchNorm{max(n, 1)}d" if draft.chance(0.93) else "SyncBatchNorm"
    affine = draft.one("", "", "", "", ", affine=False", ", eps=0.1")
    layer = place(draft, "bn", f"nn.{kind}({channels}{affine})")
    if layer is None:
        return None
    call, owner = layer
    if owner is None or draft.chance(0.65):
        return draft.say(x, f"{call}({x})")
    if draft.chance(0.35):
        return _written(draft, x, owner, n)
    stats = f"{owner}.running_mean, {owner}.running_var"
    w, b = f"{owner}.weight", f"{owner}.bias"
    forms = [
        f"F.batch_norm({x}, {stats}, {w}, {b}, False, 0.1, {owner}.eps)",
        f"F.batch_norm({x}, {stats}, {w}, {b}, self.training, 0.1, {owner}.eps)",
        f"F.batch_norm({x}, {stats}, weight={w}, bias={b}, eps={owner}.eps)",
        f"F.batch_norm({x}, {stats}, {w})",
        f"F.batch_norm({x}, {stats}, bias={b})",
        f"F.batch_norm({x}, {stats})",
        f"F.batch_norm(input={x}, running_mean={owner}.running_mean, running_var={owner}.running_var, eps=1e-3)",
        f"torch.batch_norm({x}, {w}, {b}, {stats}, False, 0.1, {owner}.eps, False)",
    ]
    return draft.say(x, draft.one(*forms))


def _unbatched(draft: Draft, x: str) -> str | None:
    """A BatchNorm1d of a signal without a batch normalizes its second axis; one of higher rank does not take it."""
    shape = draft.shape(x)
    if len(shape) not in (2, 3):
        return None
    layer = place(draft, "bn", f"nn.BatchNorm1d({shape[1]})")
    return None if layer is None else draft.say(x, f"{layer[0]}({x})")


def _written(draft: Draft, x: str, owner: str, n: int) -> str | None:
    """The arithmetic of a BatchNorm, in one of the forms that users write."""
    view = f".view(1, -1{', 1' * n})" if draft.chance(0.5) else f"[None, :{', None' * n}]"
    mean, var = f"{owner}.running_mean{view}", f"{owner}.running_var{view}"
    w, b, eps = f"{owner}.weight{view}", f"{owner}.bias{view}", f"{owner}.eps"
    forms = [
        f"({x} - {mean}) / torch.sqrt({var} + {eps}) * {w} + {b}",
        f"({x} - {mean}) * torch.rsqrt({var} + {eps}) * {w} + {b}",
        f"{w} * (({x} - {mean}) / ({var} + {eps}) ** 0.5) + {b}",
        f"scale = {w} * ({var} + {eps}).rsqrt()\nOUT = {x} * scale + ({b} - {mean} * scale)",
        f"({x} - {mean}) / ({var} + 1e-5).sqrt()",
        f"{x} * {w} + {b}",
    ]
    return draft.say(x, draft.one(*forms))


def instance_norm(draft: Draft, x: str) -> str | None:
    """An InstanceNorm with or without running statistics."""
    n, channels = draft.spatial(x), draft.channels(x)
    tracked = draft.one("", ", track_running_stats=True", ", affine=True, track_running_stats=True", ", affine=True")
    layer = place(draft, "instance", f"nn.InstanceNorm{n}d({channels}{tracked})")
    if layer is None:
        return None
    call, owner = layer
    if owner is not None and "track" in tracked and draft.chance(0.2):
        stats = f"{owner}.running_mean, {owner}.running_var, {owner}.weight, {owner}.bias"
        return draft.say(x, f"F.instance_norm({x}, {stats}, use_input_stats=False)")
    return draft.say(x, f"{call}({x})")


def group_norm(draft: Draft, x: str) -> str | None:
    """A GroupNorm."""
    channels = draft.channels(x)
    groups = draft.one(*(g for g in (1, 2, 3, channels) if channels % g == 0))
    layer = place(draft, "gn", f"nn.GroupNorm({groups}, {channels}{draft.one('', '', ', affine=False')})")
    if layer is None:
        return None
    call, owner = layer
    forms = [f"{call}({x})"] * 3
    forms += (
        [f"F.group_norm({x}, {groups}, {owner}.weight, {owner}.bias)", f"F.group_norm({x}, {groups})"] if owner else []
    )
    return draft.say(x, draft.one(*forms))


def over_last(draft: Draft, x: str) -> str | None:
    """A LayerNorm or RMSNorm over the last axis or axes."""
    shape = draft.shape(x)
    sizes = shape[-1:] if draft.chance(0.8) else shape[-2:]
    if len(sizes) == len(shape) or sizes[-1] == 1:
        return None
    kind = draft.one("LayerNorm", "LayerNorm", "RMSNorm")
    settings = draft.one("", "", "", ", elementwise_affine=False", ", bias=False" if kind == "LayerNorm" else "")
    layer = place(draft, "ln", f"nn.{kind}({list(sizes)}{settings})")
    if layer is None:
        return None
    call, owner = layer
    forms = [f"{call}({x})"] * 4
    if owner is not None:
        function = "layer_norm" if kind == "LayerNorm" else "rms_norm"
        forms += [f"F.{function}({x}, {list(sizes)}, {owner}.weight)", f"F.{function}({x}, {list(sizes)})"]
        forms += [f"F.layer_norm({x}, {list(sizes)}, {owner}.weight, {owner}.bias)"] if kind == "LayerNorm" else []
        scaled = f"{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-6)"
        forms += [f"{scaled} * {owner}.weight"] if len(sizes) == 1 else []
    return draft.say(x, draft.one(*forms))


def special(draft: Draft, x: str) -> str | None:
    """A norm that is no plain layer of torch."""
    channels = draft.channels(x)
    kind = draft.one("NormAct", "FrozenNorm", "LayerNorm2d", "CountingNorm", "SqueezeExcite", "Domains", "torchvision")
    if kind == "Domains":
        name = draft.name("domains")
        draft.flag("domain", "0", 1)
        made = draft.make(f"self.{name} = parts.Domains(nn.BatchNorm2d, {channels})")
        return draft.say(x, f"self.{name}({x}, domain)") if made else None
    if kind == "torchvision":
        layer = place(draft, "frozen", f"__import__('torchvision').ops.FrozenBatchNorm2d({channels})")
    else:
        layer = place(draft, "special", f"parts.{kind}({channels})")
    return None if layer is None else draft.say(x, f"{layer[0]}({x})")


def own_statistics(draft: Draft, x: str) -> str | None:
    """A batch norm by buffers of the network, read by two calls with a gain each."""
    n, channels, name = draft.spatial(x), draft.channels(x), draft.name("stats")
    if n not in (0, 1, 2, 3) or not draft.channels_at:
        return None
    lines = [f"self.register_buffer('{name}_mean', torch.randn({channels}))"]
    lines += [f"self.register_buffer('{name}_var', torch.rand({channels}) + 0.5)"]
    lines += [f"self.{name}_gain{i} = nn.Parameter(torch.randn({channels}))" for i in (1, 2)]
    if not draft.make(*lines):
        return None
    stats = f"self.{name}_mean, self.{name}_var"
    first = draft.say(x, f"F.batch_norm({x}, {stats}, self.{name}_gain1)")
    others = draft.same_shape(x)
    if first is not None and others and draft.chance(0.6):
        again = draft.one(f", self.{name}_gain2", f", self.{name}_gain1", f", self.{name}_gain1, eps=0.1", "")
        other = draft.one(*others)
        draft.say(other, f"F.batch_norm({other}, {stats}{again})")
    return first
