"""Quantize the Conv and Linear layers of a model, to train on integers or to run on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from normfuse import api, surgery
from normfuse.calibration import Batch, Batches, Calibration, PaddingMask
from normfuse.capture import readable, unwrap
from normfuse.graph import Inputs
from normfuse.layer_quantization import LayerQuantization
from normfuse.layer_ranges import Range
from normfuse.order import is_folded
from normfuse.passes.quantize import METHODS, Method, Quantize
from normfuse.passes.shiftquant import ShiftQuantOff, ShiftQuantTraining
from normfuse.pipeline import Result
from normfuse.progress import tracked
from normfuse.quantization import Precision
from normfuse.quantization.calibrated import CalibratedLayer
from normfuse.quantization.quantizing_layer import QuantizingLayer
from normfuse.structure import restored_on_error
from normfuse.whole_model_error import require_in_proportion

M = TypeVar("M", bound=nn.Module)


def quantize(
    model: M,
    method: Method = "shiftquant",
    calibration: Calibration | None = None,
    *,
    bits: int = 8,
    groups: int = 4,
    grad_bits: int | None = None,
    range: Range = "max",
    keep_first: bool = False,
    keep_last: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fold: bool = True,
    inplace: bool = False,
    example_inputs: Inputs | None = None,
    padding_mask: PaddingMask | None = None,
    verify: bool = True,
    progress: bool = True,
) -> M:
    """Return the model with the products of its Conv1d, Conv2d and Linear layers in integers.

    Without ``calibration`` the result is made to be *trained*: each layer keeps its parameters and quantizes input,
    weight and gradient afresh at each call (:class:`normfuse.quantization.ShiftQuantLinear`). With it the result is
    made to be *run*: norms are folded, weights become int8, and inputs are quantized on scales that are found on the
    data (:mod:`normfuse.quantization.calibrated`); it takes no gradient, and :func:`normfuse.export` writes it as ONNX.
    A model that was trained on integers is calibrated in the same way.

    What every layer became, and why not where it did not, is the report of
    ``normfuse.apply(model, [Quantize(data)], example_inputs=...)`` (:mod:`normfuse.passes.quantize`,
    :mod:`normfuse.passes.shiftquant`); its pass object has the error of each layer. ShiftQuant is a *reconstruction* of
    arXiv 2411.10948.

    Args:
        model: Any module; it is not changed unless ``inplace``.
        method: ``"shiftquant"``; ``"per-channel"`` (a scale for each output of the weight, one for the input) or
            ``"per-tensor"`` (one for each) to compare with. To train there are ``"shiftquant"`` and ``"per-tensor"``.
        calibration: A DataLoader, or any iterable that can be read more than once, as for
            :func:`normfuse.swap_norms`. None to train.
        bits: Of inputs and weights, 3 to 8.
        groups: The most scales, powers of two apart, that the channels of an operand share. 1 is ``"per-tensor"`` for
            training and ``"per-channel"`` after it.
        grad_bits: Of gradients; as ``bits`` if None. To train only.
        range: Of inputs: ``"max"``, or a percentile of each channel, beyond which they are clipped.
        keep_first: Leave the layer that runs first in floating point.
        keep_last: Leave the layer that runs last in floating point.
        include: Globs of qualified names; only these layers are quantized. All, if empty.
        exclude: Globs of qualified names of layers to leave alone.
        fold: Whether :func:`normfuse.fold` comes first where there is calibration data.
        inplace: Edit ``model`` itself.
        example_inputs: What to read the model with, to train; the first item of the data otherwise.
        padding_mask: As for :func:`normfuse.swap_norms`: padding widens no range.
        verify: Whether to run the calibrated model and its source on the data and compare their outputs
            (:mod:`normfuse.whole_model_error`). It costs one more pass of each over the data, of three and two in all,
            and with ``inplace`` a second copy of the weights meanwhile.
        progress: Show a bar, if standard error is a terminal.

    Returns:
        A model of the same class in eval mode. A calibrated one refuses ``train()``.

    Raises:
        ValueError: An argument is out of its range or of the other mode, or the data is empty.
        CaptureError: The model does not run on the inputs.
        VerificationError: The error of an output is out of proportion to those of the layers; with ``inplace`` the
            model is as it was.

    Example:
        >>> quantized = normfuse.quantize(model, calibration=loader, keep_last=True)  # doctest: +SKIP
        >>> normfuse.export(quantized, "model.int8.onnx", example_inputs=images)  # doctest: +SKIP
    """
    settings: dict[str, Any] = {"bits": bits, "groups": groups, "grad_bits": grad_bits, "range": range}
    ends = {"keep_first": keep_first, "keep_last": keep_last}
    one = quantizing_pass(method, calibration, progress=progress, padding_mask=padding_mask, **settings, **ends)
    selection: dict[str, Any] = {"include": include, "exclude": exclude}
    return run_quantize(
        model, one, fold=fold, inplace=inplace, example_inputs=example_inputs, verify=verify, **selection
    ).model


def quantizing_pass(
    method: str,
    calibration: Calibration | None,
    *,
    bits: int = 8,
    groups: int = 4,
    grad_bits: int | None = None,
    range: Range = "max",
    progress: bool = False,
    padding_mask: PaddingMask | None = None,
    **ends: bool,
) -> LayerQuantization:
    """Return the pass that does it; arguments and errors as for :func:`quantize`."""
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if calibration is None:
        if method == "per-channel":
            raise ValueError('method="per-channel" needs calibration data; to train there is "shiftquant"')
        shared = groups if method == "shiftquant" else 1
        return ShiftQuantTraining(Precision(bits, shared, grad_bits=grad_bits, range=range), **ends)
    if grad_bits is not None:
        raise ValueError("grad_bits is for training, and a calibrated model takes no gradient: leave one of them out")
    options: dict[str, Any] = {"method": method, "bits": bits, "groups": groups, "range": range, **ends}
    one = Quantize(calibration, **options, padding_mask=padding_mask)

    def track(batches: Iterable[Batch], what: str) -> Iterable[Batch]:
        return tracked(batches, what, shown=progress)

    one.track = track
    return one


def run_quantize(
    model: M,
    one: LayerQuantization,
    *,
    fold: bool = True,
    inplace: bool = False,
    example_inputs: Inputs | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    verify: bool = True,
) -> Result[M]:
    """Run a quantizing pass on a model, behind the exact ones where it is calibrated; its report is returned.

    Arguments and errors are those of :func:`quantize`.
    """
    source = unwrap(readable(model))
    selection: dict[str, Any] = {"include": include, "exclude": exclude}
    if not isinstance(one, Quantize):
        return api.apply(source, [one], example_inputs=example_inputs, inplace=inplace, **selection)  # type: ignore[return-value]
    reference = surgery.copy(source) if inplace and verify else source
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = Batches(one.calibration, source, one.padding_mask).first()
    with restored_on_error(source) if inplace else contextlib.nullcontext():
        if any(isinstance(m, QuantizingLayer) and not isinstance(m, CalibratedLayer) for m in source.modules()):
            source = api.apply(source, [ShiftQuantOff()], example_inputs=first, inplace=inplace).model
            inplace = True  # what is edited from here on is the copy
        if fold and not is_folded(source):
            source = api.fold(source, example_inputs=first, inplace=inplace)
            inplace = True
        result: Result[Any] = api.apply(source, [one], example_inputs=first, inplace=inplace, **selection)
        if verify:
            batches = one.track(Batches(one.calibration, reference, one.padding_mask), "comparing")
            require_in_proportion(reference, result.model, one.layers.values(), batches)
        return result
