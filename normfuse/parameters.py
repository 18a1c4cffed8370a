"""Which parameters of a model to train: norms only, the last stage, the head, or what a glob names."""

from __future__ import annotations

import collections
import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn

from normfuse.heads import head_layers
from normfuse.norms import is_norm


def parameter_groups(
    model: nn.Module, which: str | Sequence[str] = "all", *, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Choose what to train: freeze every other parameter, and return the chosen ones as groups for an optimizer.

    Args:
        model: Any module, in Tune mode or not.
        which: One or several of

            - ``"all"``: every parameter;
            - ``"norm"``: gain and shift of every norm (what arXiv 2003.00152 trains);
            - ``"head"``: the layers that make the outputs (:mod:`normfuse.heads`): one for a classifier, several where
              a network has auxiliary classifiers, is distilled, or detects and segments;
            - ``"last-stage"``: everything from the stage that halves the resolution for the last time on;
            - ``"bias"``: every parameter that is added: ``bias``, ``in_proj_bias``, ``bias_ih_l0``, shifts of norms;
              not the tables that attention takes biases of positions from;
            - a glob of qualified names of modules or parameters, such as ``"layer4.*"``.
        weight_decay: If given, the first group gets it, and a second one, of everything with one axis (gains, shifts,
            biases), gets 0.

    Returns:
        One group ``{"params": [...]}``, or two, in the order of ``model.parameters()``.

    Raises:
        ValueError: A choice names no parameter, which would train less than was meant.
    """
    chosen: set[str] = set()
    for choice in [which] if isinstance(which, str) else which:
        names = _chosen(model, choice)
        if not names:
            raise ValueError(f"{choice!r} names no parameter of this model")
        chosen |= names
    ids = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in chosen}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ids)
    trained = [p for p in model.parameters() if id(p) in ids]
    if weight_decay is None:
        return [{"params": trained}]
    groups: dict[bool, list[nn.Parameter]] = collections.defaultdict(list)
    for parameter in trained:
        groups[parameter.dim() > 1].append(parameter)
    kinds = ((True, weight_decay), (False, 0.0))
    return [{"params": groups[kind], "weight_decay": decay} for kind, decay in kinds if groups[kind]]


def _chosen(model: nn.Module, choice: str) -> set[str]:
    """Return the names of the parameters that a choice means."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if choice == "all":
        return set(parameters)
    if choice == "bias":
        return {name for name in parameters if _is_bias(name)}
    if choice == "norm":
        return _inside([name for name, module in model.named_modules() if is_norm(module)], parameters)
    if choice == "head":
        return _inside(head_layers(model), parameters)
    if choice == "last-stage":
        return _inside(_last_stage(model), parameters)
    matched = [name for name, _ in model.named_modules() if fnmatch.fnmatchcase(name, choice)]
    return _inside(matched, parameters) | {name for name in parameters if fnmatch.fnmatchcase(name, choice)}


def _is_bias(name: str) -> bool:
    """Whether a parameter is a bias, by the words of its name; a parametrized one has its name one level up."""
    *path, last = name.split(".")
    if path[-2:-1] == ["parametrizations"]:
        last = path[-1]
    words = last.split("_")
    return "bias" in words and "table" not in words


def _inside(modules: Sequence[str], parameters: dict[str, nn.Parameter]) -> set[str]:
    prefixes = tuple(f"{name}." if name else "" for name in modules)
    return {name for name in parameters if name.startswith(prefixes)} if prefixes else set()


def _last_stage(model: nn.Module) -> list[str]:
    """Return the names of the modules from the last stage on.

    A stage is the outermost module in which all layers with a stride lie in one child: the ``layer4`` of a ResNet,
    whose strides are all in its first block, but not its ``layer1`` to ``layer4`` together.
    """
    strided = [name for name, module in model.named_modules() if _stride(module) > 1]
    if not strided:
        return []
    parts = strided[-1].split(".")
    stages = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    stage = next((name for name in stages if _is_stage(name, strided)), stages[-1])
    names = [name for name, _ in model.named_modules()]
    return [name for name in names[names.index(stage) :] if not stage.startswith(f"{name}.")]


def _is_stage(name: str, strided: Sequence[str]) -> bool:
    inside = [layer for layer in strided if f"{layer}.".startswith(f"{name}.")]
    return len(_children_with(name, strided)) <= 1 and len(inside) < max(len(strided), 2)


def _children_with(module: str, layers: Sequence[str]) -> set[str]:
    """Return the direct children of a module in which some of the layers lie."""
    prefix = f"{module}."
    return {name.removeprefix(prefix).partition(".")[0] for name in layers if name.startswith(prefix)}


def _stride(module: nn.Module) -> int:
    stride = getattr(module, "stride", 1)
    if not isinstance(module, nn.modules.conv._ConvNd | nn.modules.pooling._MaxPoolNd | nn.modules.pooling._AvgPoolNd):
        return 1
    return max(stride) if isinstance(stride, tuple) else stride
