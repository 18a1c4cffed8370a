"""Operations on values: arithmetic, activations, windows, movements, joins, in the spellings of torch and of NumPy.

The tables hold templates, two spaces apart. ``X`` stands for the value, ``Y`` for another one, ``P`` for a parameter,
``C`` for the channel axis, ``S`` for the axes behind it and ``N`` for how many these are, ``A`` and ``B`` for sizes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tests.networks.draft import Draft


def table(text: str) -> list[str]:
    """Return the templates of a table."""
    return re.split(r"\s{2,}", text.strip())


ACTIVATION_LAYERS = table("""
    ReLU()  ReLU(inplace=True)  LeakyReLU(0.2)  PReLU()  GELU()  SiLU(inplace=True)  Hardtanh(-1, 2)  ReLU6()
    Sigmoid()  Dropout()  Identity()  Softmax(dim=1)  ELU()  Tanh()  Hardswish()
""")
ACTIVATIONS = table("""
    F.relu(X)  X.relu()  torch.relu(X)  F.relu(X, inplace=True)  X.relu_()  F.leaky_relu(X, 0.1)  X.clamp(min=0)
    torch.clamp(X, 0, 6)  F.gelu(X)  X.tanh()  X.sigmoid() * X  F.silu(X)  F.dropout(X, 0.5, self.training)  X.abs()
    torch.maximum(X, torch.zeros_like(X))  F.softmax(X, dim=-1)  torch.where(X > 0, X, 0.1 * X)  X.clip(0, 1)
""")
ARITHMETIC = table("""
    X * 0.5  2 * X  X / -1.5  X + 0.5  X - 2  -X  1.5 - X  X.mul(2)  torch.add(X, 0.5)  torch.sub(X, 0.5, alpha=2)
    X ** 2  torch.mul(input=X, other=2)  X / X.shape[-1] ** 0.5  X + X  X * X  X.neg()  torch.div(X, 2)  X.square()
""")
WITH_TENSOR = table("""
    X * P  P * X  X + P  X - P  P - X  X / (P.abs() + 1)  X.mul(P)  torch.addcmul(P, X, P)  X * P.sigmoid()
    X + P.expand_as(X)  X.add(other=P, alpha=2)  X * (1 + P)  torch.multiply(X, P)  torch.add(P, X)
""")
WINDOW_LAYERS = table("""
    MaxPoolNd(2)  AvgPoolNd(2)  MaxPoolNd(3, 1, 1)  AvgPoolNd(3, 1, padding=1)  AdaptiveAvgPoolNd(1)
    PixelShuffle(2)  PixelUnshuffle(2)  ChannelShuffle(2)  Flatten()  Flatten(2)  Unflatten(-1, (2, -1))
    AdaptiveMaxPoolNd(2)  AvgPoolNd(3, 2, 1, count_include_pad=False)  ConstantPadNd(1, 0.5)  ZeroPadNd(1)
    ReflectionPadNd(1)  ReplicationPadNd(1)  Upsample(scale_factor=2)  CircularPadNd(1)  ZeroPadNd(padding=1)
""")
WINDOWS = table("""
    F.pad(X, (1, 1) * N)  F.pad(X, (0, 1) * N, value=0.5)  F.max_poolNd(X, 2)  F.avg_poolNd(X, kernel_size=2)
    F.adaptive_avg_poolNd(X, 1)  X.mean(S, keepdim=True)  X.mean(axis=S, keepdims=True)  X.sum(axis=-1, keepdims=True)
    F.interpolate(X, scale_factor=2)  X.amax(dim=S, keepdim=True)  torch.mean(X, axis=-1)  X.mean(-1)  X.mean(axis=-1)
    torch.sum(input=X, dim=-1)  X.max(dim=-1).values  X.flatten(-N).mean(-1)  F.pad(X, (1, 1), mode='reflect')
    torch.amax(X, axis=-1)  torch.mean(X, dim=S)  F.interpolate(X, size=(4,) * N)
""")
MOVEMENTS = table("""
    X.flip(-1)  X.roll(1, -1)  X.unsqueeze(-1)  X[..., :1]  X.contiguous()  X.clone()  X[..., ::2]
    torch.flip(X, dims=[-1])  X[:, 1:]  X.narrow(C, 0, 1)  X.detach()  X.unsqueeze(axis=-1)  X.squeeze(-1)
    torch.roll(X, shifts=1, dims=-1)  X.transpose(0, 1).transpose(0, 1)  X.to(torch.float64)  X.double()  X.type_as(X)
    X.chunk(2, dim=C)[0]  torch.split(X, 1, dim=C)[-1]  X.select(C, 0)  X[:, 0]  X.index_select(-1, torch.tensor([0]))
    X.squeeze()  X.flatten(C)  torch.squeeze(X, axis=-1)  torch.tensor_split(X, 2, dim=C)[0]  X.unbind(C)[0]
    X.unflatten(-1, (2, -1))  X.reshape(*X.shape[:-1], 2, -1)  X.tile(2)  X.repeat_interleave(2, dim=-1)
    X[None].squeeze(0)
    X.unflatten(C, (2, -1))  X.unflatten(C, (2, -1)).transpose(C, C + 1).flatten(C, C + 1)  F.glu(X, C)  X[..., None]
    X.unflatten(dim=C, sizes=(-1, 2))  X.swapaxes(0, 1).swapaxes(0, 1)  torch.take_along_dim(X, X.argsort(-1), -1)
""")
MOVEMENTS_OF_MORE_AXES = table("""
    X.flatten(1)  X.transpose(1, 2)  X.swapaxes(1, -1)  X.movedim(1, -1)  torch.swapaxes(X, 1, 2)  X.moveaxis(1, -1)
    X.reshape(X.shape[0], -1)  X.mT  torch.flatten(X, start_dim=1)  X.view(X.size(0), X.size(1), -1)  X.flatten(-2)
    X.transpose(dim0=1, dim1=-1)  X.reshape(X.shape[0], A, -1)  torch.reshape(X, (-1, B))  torch.movedim(X, 1, -1)
    torch.transpose(X, dim0=1, dim1=2)  X.transpose(1, -1).contiguous()  X.flatten(start_dim=1, end_dim=2)
    X.permute(0, 2, 3, 1)  X.permute(0, 2, 3, 1).contiguous()  torch.permute(X, dims=(0, 2, 1))  F.pixel_shuffle(X, 2)
    F.pixel_unshuffle(X, 2)  X.permute(dims=(0, 3, 1, 2))  X.view(X.shape[0], -1)  X.diagonal(dim1=-2, dim2=-1)
""")
IN_PLACE = table("""
    OUT = X.mul_(2)  OUT = X.add_(1)  OUT = X; OUT += 1  OUT = X.clone(); OUT[:, 0] = 0  OUT = X; OUT *= 0.5
    OUT = torch.zeros_like(X); OUT[...] = X  OUT = X.clone(); OUT[..., :1] += 1  part = X[:, :1]; part.mul_(3); OUT = X
    OUT = X.sub_(X.mean())  OUT = X.copy_(X * 2)  OUT = X.new_zeros(X.shape); OUT.copy_(X)  OUT = X.div_(2)
    OUT = X.masked_fill(X > 3, 0.0)  OUT = X.masked_fill_(X > 3, 0.0)
    OUT = torch.empty_like(X); torch.add(X, 1, out=OUT)
""")
JOINS = table("""
    X + Y  X.add(Y)  torch.add(X, Y, alpha=0.5)  X - Y  X * Y  torch.cat([X, Y], dim=C)  torch.cat((Y, X), C)
    torch.concatenate([X, Y], axis=C)  torch.concat([X, Y], dim=-1)  torch.stack([X, Y], 0).sum(0)  X * Y.sigmoid()
    torch.maximum(X, Y)  torch.stack([X, Y], dim=-1)  X + 0.5 * Y  OUT = X; OUT += Y  torch.hstack([X, Y])
    torch.lerp(X, Y, 0.3)  sum([X, Y])  X.add_(Y)  torch.cat(tensors=[X, Y], dim=C)  torch.stack([X, Y], 0).mean(axis=0)
""")
JOINS_OF_OTHER_SHAPES = table("X * Y  X + Y  torch.cat([X, Y], dim=C)  X @ Y  X * Y.mean()")
GATES = table("""
    X * X.mean(S, keepdim=True).sigmoid()  X * X.mean(C, keepdim=True)  X + X.mean(axis=S, keepdims=True)
    X * torch.ones_like(X)[:, :1]  X * X[..., :1]  X - X.mean(C, keepdim=True)  X / X.norm(dim=-1, keepdim=True)
""")
NOISES = table(
    "X + X[:, :1] * P  X + X.mean(1, keepdim=True) * P  X + P * X.mean(axis=1, keepdims=True)  X * (P * X[:, :1])"
)


def filled(draft: Draft, templates: Sequence[str], x: str, **tokens: Any) -> str:
    """Return one of the templates with its letters replaced."""
    shape, n = draft.shape(x), draft.spatial(x)
    axes: Any = tuple(range(-n, 0)) if n > 1 else -1
    values = {"X": x, "C": draft.channels_at, "S": axes, "N": n, "A": shape[min(1, len(shape) - 1)], "B": shape[-1]}
    values |= tokens
    return re.sub(r"\b[XYPCSNAB]\b|N(?=d\()", lambda found: str(values[found[0]]), draft.one(*templates))


def activation(draft: Draft, x: str) -> str | None:
    """Add an activation: a layer, a function, a method, or in place."""
    return _layer_or_call(draft, x, "act", ACTIVATION_LAYERS, ACTIVATIONS)


def window(draft: Draft, x: str) -> str | None:
    """Add a pool, a pad, an upsampling or a reduction."""
    return _layer_or_call(draft, x, "window", WINDOW_LAYERS, WINDOWS) if draft.spatial(x) in (1, 2, 3) else None


def _layer_or_call(draft: Draft, x: str, stem: str, layers: list[str], calls: list[str]) -> str | None:
    name = draft.name(stem)
    if draft.chance(0.5) and draft.make(f"self.{name} = nn.{filled(draft, layers, x)}"):
        return draft.say(x, f"self.{name}({x})")
    return draft.say(x, filled(draft, calls, x))


def arithmetic(draft: Draft, x: str) -> str | None:
    """Calculate with a number, or with a parameter or a buffer of the network."""
    if draft.chance(0.45):
        return draft.say(x, filled(draft, ARITHMETIC, x))
    read, buffer = _tensor(draft, _size(draft, x))
    result = draft.say(x, filled(draft, WITH_TENSOR, x, P=read))
    if result is not None and draft.chance(0.3 if buffer else 0.05):
        draft.say(result, f"{result} + {read}.mean()")
    return result


def _size(draft: Draft, x: str) -> list[int]:
    """Return sizes that broadcast to a value: along one axis, of all samples, of one number."""
    shape = list(draft.shape(x))
    axis = draft.one(min(draft.channels_at, len(shape) - 1), len(shape) - 1)
    along = [size if a == axis else 1 for a, size in enumerate(shape)]
    return draft.one(along, along, along[axis:], [1], shape[1:], [1, *shape[1:]])


def _tensor(draft: Draft, sizes: list[int]) -> tuple[str, bool]:
    """Add a tensor to the network; return what reads it, and whether it is a buffer."""
    name, value = draft.name("tensor"), f"torch.randn({sizes})"
    kind = draft.weighted({"parameter": 4, "buffer": 2, "attribute": 1, "holder": 1})
    line, read = {
        "parameter": (f"self.{name} = nn.Parameter({value})", f"self.{name}"),
        "buffer": (f"self.register_buffer({name!r}, {value})", f"self.{name}"),
        "attribute": (f"self.{name} = {value}", f"self.{name}"),
        "holder": (f"self.{name} = parts.Holder(gain={tuple(sizes)})", f"self.{name}.gain"),
    }[kind]
    draft.make(line)
    return read, kind == "buffer"


def movement(draft: Draft, x: str) -> str | None:
    """Move values: reshape, permute, slice, split, roll, gather."""
    more = MOVEMENTS_OF_MORE_AXES if len(draft.shape(x)) > 2 else []
    return draft.say(x, filled(draft, MOVEMENTS + more, x))


def in_place(draft: Draft, x: str) -> str | None:
    """Write into a value, or into a view of it."""
    return draft.say(x, filled(draft, IN_PLACE, x))


def join(draft: Draft, x: str) -> str | None:
    """Join a value with another of the network."""
    others = draft.same_shape(x)
    if others:
        return draft.say(x, filled(draft, JOINS, x, Y=draft.one(*others)))
    return draft.say(x, filled(draft, JOINS_OF_OTHER_SHAPES, x, Y=draft.one(*draft.values)))


def gate(draft: Draft, x: str) -> str | None:
    """Multiply by a gate of the value's own means, or by noise of one channel times a gain."""
    if draft.spatial(x) > 0 and draft.channels_at and draft.chance(0.5):
        read, _ = _tensor(draft, [1, draft.channels(x), *[1] * draft.spatial(x)])
        return draft.say(x, filled(draft, NOISES, x, P=read))
    return draft.say(x, filled(draft, GATES, x))
