"""Quantizers in an ONNX file, from calibration data: pairs of QuantizeLinear and DequantizeLinear ("Q/DQ").

    q(x) = clamp(round(x / s) + z),   dq(q) = s (q - z)        s per tensor for values, per output channel for weights

ONNX Runtime and TensorRT want them differently. ONNX Runtime fuses an operator only where its output is quantized as
well, and is fastest with unsigned values. TensorRT takes symmetric scales (z = 0) in front of what multiplies, no
quantized bias, and quantizes the rest as it sees fit. The quantizer is ``onnxruntime.quantization`` in both cases; of
``fp8`` it finds the ranges (:mod:`.onnx_float8`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from normfuse.errors import LoweringError, MissingDependencyError
from normfuse.lowering import onnx_float8
from normfuse.lowering.onnxruntime import INSTALL
from normfuse.lowering.precision import Numbers

if TYPE_CHECKING:
    import numpy

MULTIPLYING = ["Conv", "ConvTranspose", "Gemm", "MatMul"]
KEPT_INTEGER = ["Add", "Relu", "Clip", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat"]
KEPT_INTEGER += ["Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Resize", "Pad", "Slice", "Split"]
PERCENTILE = 99.999


def quantize_file(path: Path, data: Sequence[Mapping[str, Any]], numbers: Numbers) -> None:
    """Quantize a float32 ONNX file in place.

    Args:
        path: The file.
        data: The calibration data: for each item, the inputs of the file by name.
        numbers: The type, the placement and the calibrator.

    Raises:
        LoweringError: There is nothing to quantize, or the data does not run.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingDependencyError(INSTALL) from error
    external = path.with_name(f"{path.name}.data").exists()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet():
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / path.name
        try:
            # No optimization: the exporter did it, and ONNX Runtime's would fold norms that were asked to be kept.
            quant_pre_process(
                path, prepared, skip_optimization=True, skip_symbolic_shape=True, save_as_external_data=external
            )
            quantization.quantize_static(
                os.fspath(prepared),
                os.fspath(quantized),
                _reader(quantization, prepared, data),
                use_external_data_format=external,
                nodes_to_exclude=onnx_float8.grouped_convolutions(prepared) if numbers.precision == "fp8" else [],
                **_settings(quantization, numbers),
            )
        except Exception as error:  # the quantizer lets errors of any kind through
            text = next(iter(str(error).strip().splitlines()), "no message")
            raise LoweringError(
                f"{numbers.precision}: the calibration failed: {type(error).__name__}: {text}"
            ) from error
        _require_quantizers(quantized, numbers)
        if numbers.precision == "fp8":
            onnx_float8.from_integers(quantized, prepared)
        for file in Path(folder).glob(f"{path.name}*"):
            os.replace(file, path.parent / file.name)


def _settings(quantization: Any, numbers: Numbers) -> dict[str, Any]:
    kinds, methods = quantization.QuantType, quantization.CalibrationMethod
    options: dict[str, Any] = {"WeightSymmetric": True, "CalibTensorRangeSymmetric": False}
    if numbers.calibrator == "percentile":
        options["CalibPercentile"] = PERCENTILE
    settings: dict[str, Any] = {
        "quant_format": quantization.QuantFormat.QDQ,
        "activation_type": kinds.QUInt8,
        "weight_type": kinds.QInt8,
        "per_channel": True,
        "op_types_to_quantize": MULTIPLYING + KEPT_INTEGER,
        "calibrate_method": getattr(methods, {"minmax": "MinMax"}.get(numbers.calibrator, numbers.calibrator.title())),
        "extra_options": options,
    }
    if numbers.qdq == "tensorrt":
        settings |= {"activation_type": kinds.QInt8, "op_types_to_quantize": MULTIPLYING}
        options |= {
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": MULTIPLYING,
        }
    return settings


def _reader(quantization: Any, path: Path, data: Sequence[Mapping[str, Any]]) -> Any:
    """Return the data as the quantizer reads it, once through."""
    from normfuse.lowering import graphs

    names = [value.name for value in graphs.load(path).graph.input]
    items = iter([{name: _array(name, item) for name in names} for item in data])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(items, None)

    return Reader()


def _array(name: str, item: Mapping[str, Any]) -> numpy.ndarray:
    value = item.get(name)
    if not isinstance(value, Tensor):
        raise LoweringError(f"calibration data: there is no tensor for the input {name}; it has {', '.join(item)}")
    return value.detach().cpu().contiguous().numpy()


def _require_quantizers(path: Path, numbers: Numbers) -> None:
    from normfuse.lowering import graphs

    if not graphs.op_counts(graphs.load(path))["DequantizeLinear"]:
        raise LoweringError(f"{numbers.precision}: this model has no {', '.join(MULTIPLYING)} to quantize")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer from writing to the terminal; its errors arrive as exceptions."""
    logger = logging.getLogger()
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
