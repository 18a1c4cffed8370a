"""ShiftQuant, reconstructed: integers with power-of-two group scales, their product, layers that train on it.

And L1 norms on integers: int8 in, int8 out.
"""

from __future__ import annotations

from normfuse.quantization.integer_batch_norm import IntegerL1BatchNorm
from normfuse.quantization.integer_token_norm import IntegerL1LayerNorm, IntegerL1RMSNorm
from normfuse.quantization.matmul import Prepared, shiftquant_matmul
from normfuse.quantization.modules import ShiftQuantConv1d, ShiftQuantConv2d, ShiftQuantLinear
from normfuse.quantization.quantizing_layer import Precision
from normfuse.quantization.shiftquant import Quantized, ShiftQuant

__all__ = [
    "IntegerL1BatchNorm",
    "IntegerL1LayerNorm",
    "IntegerL1RMSNorm",
    "Precision",
    "Prepared",
    "Quantized",
    "ShiftQuant",
    "ShiftQuantConv1d",
    "ShiftQuantConv2d",
    "ShiftQuantLinear",
    "shiftquant_matmul",
]
