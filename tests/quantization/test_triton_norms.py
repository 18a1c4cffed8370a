"""The Triton kernel of the integer norms equals the definition, in Triton's interpreter: no CUDA device is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

PROGRAM = """
import torch
from normfuse.quantization import integer_arithmetic, triton_norms
from tests.quantization.norm_rows import hard_rows
for size in (1, 2, 63, 100, 768):
    for form in ((6, 2, 127), (10, 4, 7), (12, 7, 31)):
        for eps in (0.0, 1e-3):
            x = hard_rows(size)[::2].contiguous()
            generator = torch.Generator().manual_seed(size)
            gain, shift = torch.randint(-32767, 32768, (2, size), generator=generator).to(torch.int16)
            constants = integer_arithmetic.make_form(size, 1.2533, eps, *form)
            for centred in (True, False) if form[0] == 10 else (True,):
                expected = integer_arithmetic.l1_rows(x, gain, shift, constants, centred=centred)
                found = triton_norms.l1_rows(x, gain, shift, constants, centred=centred)
                assert torch.equal(found, expected), (size, form, eps, centred)
assert triton_norms.l1_rows(x[:0], gain, shift, constants).shape == (0, size)
print("equal")
"""


@pytest.mark.slow
def test_kernel_equals_the_definition():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
