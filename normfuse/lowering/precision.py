"""The numbers of a written file: their type, which layers keep another, and what would be lost, before it is written.

``fp16`` and ``bf16`` cast the model before it is traced, so that the type is in the graph and no builder needs a flag.
``mixed`` is fp16 with every norm, and the layers that are listed, in fp32: casts stand around each of them. ``int8``
and ``fp8`` are written in fp32 and quantized afterwards (:mod:`normfuse.lowering.onnx_quantize`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from normfuse import activations, ranges, rerun
from normfuse.calibration import Batches, Calibration
from normfuse.errors import LoweringError
from normfuse.graph import Inputs
from normfuse.lowering.integer_verdict import MIN_COSINE, MIN_TOP1
from normfuse.norms import is_norm
from normfuse.outputs import map_tensors

Precision = Literal["fp32", "fp16", "bf16", "mixed", "int8", "fp8"]
Placement = Literal["onnxruntime", "tensorrt"]
Calibrator = Literal["minmax", "entropy", "percentile"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "mixed": torch.float16}
QUANTIZED = ("int8", "fp8")
FLUSHED, SUBNORMAL = 1e-3, 0.05  # fractions of a layer's elements from which on it is worth a line
SPREAD = 1e4  # ratio of the largest to the smallest channel from which on eight bits are worth a line


@dataclass(frozen=True, slots=True)
class Numbers:
    """How the numbers of a file are to be written.

    Attributes:
        precision: The type of the file.
        keep_fp32: Globs of qualified names of modules that ``mixed`` keeps in fp32, beside every norm.
        calibration: What ``int8`` and ``fp8`` take the ranges of the activations from, and every narrow type is checked
            on: an item, or an iterable of items, each as example inputs are. None for the example input.
        qdq: Where ``int8`` puts its quantizers: as ONNX Runtime or as TensorRT wants them.
        calibrator: How the range of an activation follows from its values.
        min_cosine: The cosine similarity to the float64 run, for each output, below which a quantized file is refused.
        min_top1: The part of the rows with the same largest entry below which it is (:mod:`.integer_verdict`).
    """

    precision: Precision = "fp32"
    keep_fp32: tuple[str, ...] = ()
    calibration: Calibration | None = None
    qdq: Placement = "onnxruntime"
    calibrator: Calibrator = "minmax"
    min_cosine: float = MIN_COSINE
    min_top1: float = MIN_TOP1

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(get_args(Precision))}")
        if self.keep_fp32 and self.precision != "mixed":
            raise LoweringError(f"layers are kept in fp32 by precision mixed, not by {self.precision}")
        if self.precision in QUANTIZED and self.calibration is None:
            raise LoweringError(f"{self.precision} needs calibration data: a folder of images, arrays or an iterable")
        if self.precision == "fp8" and self.qdq != "tensorrt":
            raise LoweringError("fp8 is for TensorRT: no kernel of ONNX Runtime on the CPU computes with it")

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that the model is cast to."""
        return DTYPES.get(self.precision, torch.float32)

    @property
    def quantized(self) -> bool:
        """Whether the file holds quantizers."""
        return self.precision in QUANTIZED

    def batches(self, model: nn.Module, example_inputs: Inputs) -> list[Inputs]:
        """Return the data as inputs of the model: the calibration data, or the example."""
        if self.calibration is None:
            return [example_inputs]
        return [batch.inputs for batch in Batches(self.calibration, model)]


@dataclass(frozen=True, slots=True)
class Loss:
    """What the model would lose in the type of the file.

    Attributes:
        weights: What each layer's weights lose.
        activations: What each module's outputs lose, on the data.
        notes: What is worth knowing among it, in words.
    """

    weights: tuple[ranges.LayerRange, ...]
    activations: tuple[activations.ActivationRange, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values."""
        return {key: [one.to_dict() for one in getattr(self, key)] for key in ("weights", "activations")}


def cast(model: nn.Module, numbers: Numbers) -> nn.Module:
    """Cast a model to the type of the file, in place; kept modules stay in fp32 between casts.

    Raises:
        LoweringError: A glob of ``keep_fp32`` matches no module.
    """
    kept = _kept(model, numbers)
    rerun.convert(model, numbers.dtype)
    for module in kept:
        rerun.convert(module, torch.float32)
        module.register_forward_pre_hook(_widen_inputs, with_kwargs=True)
        module.register_forward_hook(_narrow_output)
    return model


def _kept(model: nn.Module, numbers: Numbers) -> list[nn.Module]:
    """Return the outermost modules that stay in fp32."""
    if numbers.precision != "mixed":
        return []
    named = dict(model.named_modules())
    for glob in numbers.keep_fp32:
        if not any(fnmatch.fnmatchcase(name, glob) for name in named):
            raise LoweringError(f"keep_fp32: no module is called {glob}; normfuse inspect lists the norms")
    chosen = [name for name, module in named.items() if name and (is_norm(module) or _listed(name, numbers.keep_fp32))]
    return [named[name] for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)]


def _listed(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _widen_inputs(_module: nn.Module, args: Any, kwargs: Any) -> Any:
    return map_tensors(args, _to(torch.float32)), map_tensors(kwargs, _to(torch.float32))


def _narrow_output(_module: nn.Module, _args: Any, output: Any) -> Any:
    return map_tensors(output, _to(torch.float16))


def _to(dtype: torch.dtype) -> Any:
    return lambda tensor: tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor


def check_ranges(model: nn.Module, numbers: Numbers, data: Sequence[Inputs]) -> Loss:
    """Return what the model loses in the type of the file, on the data.

    Raises:
        LoweringError: Weights of a layer, or values that it returns, leave the range of the type.
    """
    if numbers.precision == "fp32":
        return Loss((), (), ())
    weights = require_weights_in_range(model, numbers)
    if numbers.quantized:
        spread = [f"{one.name} ({one.channel_ratio:.0e})" for one in weights if one.channel_ratio > SPREAD]
        return Loss(weights, (), tuple(_in_words("channels of very different range", spread)))
    found = activations.activation_ranges(model, data, numbers.dtype)
    if numbers.precision != "mixed":
        _require_values_in_range(numbers.precision, activations.overflowing(found))
    return Loss(weights, found, tuple(_notes(numbers.precision, weights, found)))


def require_weights_in_range(model: nn.Module, numbers: Numbers) -> tuple[ranges.LayerRange, ...]:
    """Return what the weights lose in the type of the file.

    Raises:
        LoweringError: Those of a layer leave its range.
    """
    weights = ranges.ranges(model, numbers.dtype)
    named, kept = dict(model.named_modules()), set()
    for module in _kept(model, numbers):
        kept |= {id(part) for part in module.modules()}
    lost = [one for one in weights if one.overflowed and id(named[one.name]) not in kept]
    if lost:
        worst = max(lost, key=lambda layer: max(layer.max_weight, layer.max_bias))
        found = f"{worst.name} reaches {max(worst.max_weight, worst.max_bias):.3g}"
        advice = f"keep_fp32 {worst.name} (mixed), bf16 or fp32"
        raise LoweringError(f"{len(lost)} layers exceed the range of {numbers.precision}: {found}; use {advice}")
    return weights


def _require_values_in_range(precision: str, lost: Sequence[activations.ActivationRange]) -> None:
    if lost:
        worst = max(lost, key=lambda one: one.largest)
        names = ", ".join(one.name or "the model" for one in lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise LoweringError(
            f"on this data {len(lost)} modules return values beyond the range of {precision} ({names}): {worst}; "
            "use bf16 or fp32, or mixed with keep_fp32 for the block around them"
        )


def _notes(
    precision: str, weights: Sequence[ranges.LayerRange], values: Sequence[activations.ActivationRange]
) -> Iterator[str]:
    poor = [str(one) for one in weights if one.flushed > FLUSHED or one.subnormal > SUBNORMAL or one.overflowed]
    yield from _in_words(f"weights lose digits in {precision}", poor)
    beyond = [str(one) for one in values if one.overflowed]
    yield from _in_words(f"values beyond the range of {precision} on this data, unless kept in fp32", beyond)
    norms = [one.name for one in values if one.squares_overflow]
    if norms and precision == "fp16":
        yield from _in_words("squares of what norms read overflow fp16; mixed keeps norms in fp32", norms)


def _in_words(what: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        more = f"; and {len(lines) - 2} more" if len(lines) > 2 else ""
        yield f"{what}: {'; '.join(lines[:2])}{more}"
