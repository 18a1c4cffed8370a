"""Name the first layer whose output differs between a source and its candidate.

Layers correspond by their qualified name. A fold changes outputs on purpose between the layer that absorbs and the
norm that vanishes; the manifest of the folded model lists these pairs, and within a pair only the layer that is run
last must agree. Without a manifest the layers before the last agreement count as healed.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import deploy, rerun
from normfuse.graph import Inputs
from normfuse.outputs import input_tensors

Call = tuple[str, int]  # a layer by name, and which of its calls


def first_divergence(reference: nn.Module, candidate: nn.Module, inputs: Inputs) -> str | None:
    """Return the qualified name of the first layer that diverges, None where no layer of both can be blamed.

    Both run in float64, where only a wrong formula shows. If all layers agree there, the candidate runs once more in
    its own precision, where an overflow shows.
    """
    pairs = manifest_pairs(deploy.manifest_of(candidate))
    try:
        source = record_in_double(reference, inputs)
        twin = rerun.duplicate(candidate)
        dtype = rerun.main_dtype(candidate) or torch.float32
        own = record(twin, inputs, dtype)
        exact = record(rerun.convert(twin, torch.float64), inputs, torch.float64)
    except Exception:  # a diagnosis must not hide the verdict it explains
        return None
    return blame(source, exact, pairs, limit_for(dtype)) or blame(source, own, pairs, limit_for(dtype))


def limit_for(dtype: torch.dtype | None) -> float:
    """Return the error, relative to the largest output of a layer, that rounding in ``dtype`` hardly reaches.

    4e-5 in float32, 2e-9 in float64: weights are rounded to that type also where the run is in float64.
    """
    return math.sqrt(torch.finfo(dtype or torch.float32).eps) / 8


def record_in_double(model: nn.Module, inputs: Inputs) -> dict[Call, list[Tensor]]:
    """Record a float64 copy of the model."""
    return record(rerun.convert(rerun.duplicate(model), torch.float64), inputs, torch.float64)


def record(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> dict[Call, list[Tensor]]:
    """Run the model and return the output of every module in it, in the order in which they finish."""
    calls: dict[Call, list[Tensor]] = {}
    counts: collections.Counter[str] = collections.Counter()

    def keep(name: str, output: Any) -> None:
        calls[name, counts[name]] = [tensor.detach().clone() for tensor in input_tensors(output)]
        counts[name] += 1

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        rerun.run(model, inputs, dtype)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def manifest_pairs(manifest: Mapping[str, Any] | None) -> list[set[str]]:
    """Return the layers of every applied pair of a manifest."""
    pairs = (manifest or {}).get("pairs", [])
    return [{pair["subject"], *pair["producer"]} for pair in pairs if pair["action"] == "applied"]


def blame(
    source: Mapping[Call, list[Tensor]],
    found: Mapping[Call, list[Tensor]],
    pairs: Sequence[set[str]],
    limit: float,
) -> str | None:
    """Return the first layer of ``source`` whose output in ``found`` is off by more than ``limit`` of its largest."""
    inside = _inside(list(source), pairs)
    agreements = [
        (name, _agree(tensors, found[name, index], limit))
        for position, ((name, index), tensors) in enumerate(source.items())
        if (name, index) in found and position not in inside
    ]
    start = 0 if pairs else max((i + 1 for i, (_, agrees) in enumerate(agreements) if agrees), default=0)
    return next((name for name, agrees in agreements[start:] if not agrees), None)


def _inside(order: Sequence[Call], pairs: Sequence[set[str]]) -> set[int]:
    """Return the positions within some pair, from its first layer to before its last."""
    inside: set[int] = set()
    for pair in pairs:
        positions = [i for i, (name, _) in enumerate(order) if name in pair]
        if positions:
            inside.update(range(positions[0], positions[-1]))
    return inside


def _agree(expected: Sequence[Tensor], found: Sequence[Tensor], limit: float) -> bool:
    if len(expected) != len(found):
        return False
    return all(_close(a, b, limit) for a, b in zip(expected, found, strict=True))


def _close(expected: Tensor, found: Tensor, limit: float) -> bool:
    if expected.shape != found.shape:
        return False
    if not expected.is_floating_point() or expected.numel() == 0:
        return torch.equal(expected.cpu(), found.to(expected.dtype).cpu())
    expected, found = expected.double().cpu(), found.double().cpu()
    difference = (expected - found).abs().where(expected != found, 0.0).max()
    scale = expected.abs().where(expected.isfinite(), 0.0).max()
    return bool(difference <= limit * scale)  # false for NaN
