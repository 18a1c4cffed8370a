"""Run networks and compare what they return, whatever its structure.

The error of a tensor is ``max |d| / max |reference|``; the error of a result is the largest of its tensors. Detections
come in an order that ties decide, so they are compared as sets: each detection against the nearest one of the other
side, both ways (Hausdorff distance), with the boxes in units of the image.

The noise of a network is what rounding alone does to its result: the same comparison after every stored number was
moved by one unit in the last place, up or down; one draw for each of two inputs, the larger difference.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LIMIT = 1e-9
NOISE_FACTOR = 10.0
RAW_PARTS = ("rpn.head", "head")  # not the backbone: a fold may move a scale from its end into the heads


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the network without gradients. A tuple is positional arguments, a mapping keywords, all else one argument."""
    with torch.no_grad():
        if isinstance(inputs, tuple):
            return model(*inputs)
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(inputs)


def results(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Run the network; beside a detector's detections, keep the tensors that no threshold or sorting has touched."""
    kept: dict[str, Any] = {}
    parts = dict(model.named_modules()) if isinstance(inputs, list) else {}
    handles = [parts[name].register_forward_hook(_keeper(kept, name)) for name in RAW_PARTS if name in parts]
    try:
        kept["output"] = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _keeper(kept: dict[str, Any], name: str) -> Any:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        kept[name] = output

    return keep


def difference(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> float:
    """Return the largest relative difference of two results; infinite where their structure differs."""
    errors = [0.0]
    for name in reference.keys() & candidate.keys():
        ours, theirs = reference[name], candidate[name]
        if _is_detections(ours):
            errors += [_detections(a, b) for a, b in zip(ours, theirs, strict=True)]
        else:
            errors.append(_tensors(list(tensors(ours)), list(tensors(theirs))))
    return max(errors)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a nested result, in a fixed order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from tensors(value[key])
    elif dataclasses.is_dataclass(value):
        yield from tensors(vars(value))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def finite(result: Mapping[str, Any]) -> bool:
    """Return whether every number of a result is finite and some number is not zero."""
    values = list(tensors(result))
    return all(v.isfinite().all().item() for v in values) and any(v.any().item() for v in values)


def noise(model: nn.Module, examples: Sequence[tuple[Any, Mapping[str, Any]]]) -> float:
    """Return what one unit in the last place of every stored number does to the results; see the module docstring.

    Args:
        model: The network, in float64.
        examples: Pairs of inputs and the result that the network returns for them; each gets a draw of its own.
    """
    return max(
        difference(expected, results(_perturbed(model, seed), inputs))
        for seed, (inputs, expected) in enumerate(examples)
    )


def limit(measured_noise: float) -> float:
    """Return the difference up to which a result counts as the same."""
    return max(LIMIT, NOISE_FACTOR * measured_noise)


def _perturbed(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*moved.parameters(), *moved.buffers()]:
            if tensor.dtype == torch.float64:
                sign = torch.randint(0, 2, tensor.shape, generator=generator, dtype=tensor.dtype).mul_(2).sub_(1)
                tensor.mul_(1 + torch.finfo(tensor.dtype).eps * sign)
    return moved


def _tensors(ours: list[Tensor], theirs: list[Tensor]) -> float:
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    return max((_relative(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel()), default=0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    largest = a.abs().max().item()
    error = (a - b).abs().max().item() / (largest or 1.0)
    return error if error == error else float("inf")


def _is_detections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "boxes" in value[0]


def _detections(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    a, b = _rows(ours), _rows(theirs)
    if a.shape != b.shape:
        return float("inf")
    if not len(a):
        return 0.0
    distance = (a[:, None] - b[None]).abs().amax(-1)
    nearest = distance.argmin(1)
    others = [_relative(ours[k], theirs[k][nearest]) for k in ours if k in ("masks", "keypoints", "keypoints_scores")]
    return max(distance.amin(0).max().item(), distance.amin(1).max().item(), *others)


def _rows(found: dict[str, Tensor]) -> Tensor:
    boxes = found["boxes"]
    size = boxes.abs().max().clamp_min(1.0) if boxes.numel() else 1.0
    return torch.cat([boxes / size, found["scores"][:, None], found["labels"][:, None].to(boxes.dtype)], 1)
