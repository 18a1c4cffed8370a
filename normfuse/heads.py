"""The layers that make the outputs of a network, found without running it.

Where a model says which they are, it is believed: timm's ``get_classifier``, and what a model of transformers has
beside its base model. Otherwise heads are found by name, near the root (``head``, ``classifier``, ``fc``,
``rpn.head``, ``aux_classifier``, ``roi_heads``), and of each the layers that feed no other: the last of a sequence,
and of any other module those whose width no later layer takes (so one with exactly as many outputs as a layer behind
it has inputs is missed). Where nothing is called like that, it is the last layer that has parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from normfuse.norms import is_norm

_HEAD = re.compile(r"(^|_)(heads?|classifiers?|predictors?|logits|auxlogits|aux\d*|fc|score)(_|$)")
_INNER = re.compile(r"heads?|classifiers?|predictors?")  # further inside
_BODY = re.compile(r"backbone|encoder|body|features|stem")


def head_layers(model: nn.Module) -> list[str]:
    """Return the qualified names of the layers that make the outputs, in the order of the model."""
    prefix, root = _unwrapped(model)
    names = {module: name for name, module in root.named_modules()}
    layers = _declared(root) or [layer for head in _called_heads(root) for layer in _outputs(head)]
    if not layers:
        layers = [module for module in root.modules() if module._parameters][-1:]
    order = list(names)
    return [(prefix + names[layer]).rstrip(".") for layer in sorted(set(layers), key=order.index)]


def _unwrapped(model: nn.Module) -> tuple[str, nn.Module]:
    """Return a model inside of modules that hold nothing else, such as wrappers, and the prefix of its names."""
    prefix = ""
    while not model._parameters and not _says_heads(model) and len(_children(model)) == 1:
        ((name, inner),) = _children(model)
        if not _children(inner) or isinstance(inner, nn.Sequential | nn.ModuleList) or _HEAD.search(name):
            break
        prefix, model = f"{prefix}{name}.", inner
    return prefix, model


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children that have parameters."""
    return [(n, child) for n, child in module.named_children() if next(child.parameters(), None) is not None]


def _says_heads(model: Any) -> bool:
    return callable(getattr(model, "get_classifier", None)) or getattr(model, "base_model_prefix", "") != ""


def _declared(model: Any) -> list[nn.Module]:
    """Return the heads that the model itself names."""
    if callable(getattr(model, "get_classifier", None)):
        found = model.get_classifier()
        heads = found if isinstance(found, tuple | list) else [found]
        return [h for h in heads if isinstance(h, nn.Module) and next(h.parameters(), None) is not None]
    base = getattr(model, getattr(model, "base_model_prefix", None) or " ", None)
    if isinstance(base, nn.Module):
        return [child for _, child in _children(model) if child is not base]
    return []


def _called_heads(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules near the root that are called heads."""
    for name, child in _children(model):
        if _HEAD.search(name.lower()):
            yield child
        elif not _BODY.search(name.lower()):
            yield from (inner for key, inner in _children(child) if _INNER.fullmatch(key.lower()))


def _outputs(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a head that feed no other of its layers."""
    parts = [child for _, child in _children(module)]
    if module._parameters or not parts:
        return [module]
    if isinstance(module, nn.Sequential):
        last = max((i for i, part in enumerate(parts) if not is_norm(part)), default=0)
        parts = parts[last:]  # a norm behind the last layer belongs to it
    elif not isinstance(module, nn.ModuleList | nn.ModuleDict):
        parts = [part for i, part in enumerate(parts) if not any(_feeds(part, later) for later in parts[i + 1 :])]
    return [layer for part in parts for layer in _outputs(part)]


def _feeds(one: nn.Module, later: nn.Module) -> bool:
    """Whether a module has an output of a width that a later one takes, as it is or, of a map, flattened."""
    return any(_fits(last, first) for last in _outputs(one) for first in _first(later))


def _fits(layer: nn.Module, later: nn.Module) -> bool:
    out, taken = _width(layer, "out"), _width(later, "in")
    flattens = isinstance(later, nn.Linear) and not isinstance(layer, nn.Linear)
    return out is not None and taken is not None and (out == taken or (flattens and out > 1 and taken % out == 0))


def _first(module: nn.Module) -> list[nn.Module]:
    """Return the layers that a module's input comes to first."""
    parts = [child for _, child in _children(module)]
    if module._parameters or not parts:
        return [module]
    first = parts if isinstance(module, nn.ModuleList | nn.ModuleDict) else parts[:1]
    return [layer for part in first for layer in _first(part)]


def _width(layer: Any, way: str) -> int | None:
    """Return the number of features that go ``in`` or ``out``, None where the layer does not say."""
    for name in (f"{way}_features", f"{way}_channels", "num_features", "num_channels"):
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width
    shape = getattr(layer, "normalized_shape", None)
    return shape[-1] if isinstance(shape, tuple | list) and shape else None
