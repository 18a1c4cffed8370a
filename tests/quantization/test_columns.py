"""Windows of an image as rows: what ``F.unfold`` and ``F.fold`` do, in another order and on integers too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from normfuse.quantization.columns import Windows


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 2),
    channels=st.integers(1, 3),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
)
def test_windows_are_those_of_unfold_and_fold(
    batch: int,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int, int, int],
):
    """And ``scatter`` is the adjoint of ``gather``: ``<gather(x), r> = <x, scatter(r)>``."""
    windows = Windows(kernel, stride, dilation, padding)
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    try:
        windows.outputs(*size)
    except ValueError:
        with pytest.raises(ValueError, match="exceeds"):
            windows.gather(x)
        return
    rows = windows.gather(x)
    if batch:
        unrolled = F.unfold(F.pad(x, padding), kernel, dilation=dilation, stride=stride)  # (N, C taps, outputs)
        expected = unrolled.reshape(batch, channels, windows.taps, -1).permute(0, 3, 2, 1).reshape(rows.shape)
        assert torch.equal(rows, expected)
    other = torch.randn_like(rows)
    back = windows.scatter(other, (batch, channels, *size))
    assert back.shape == x.shape
    assert float((rows * other).sum()) == pytest.approx(float((x * back).sum()), abs=1e-9)


def test_integers_and_any_memory_format():
    windows = Windows((2, 3), (1, 2), (1, 1), (1, 1, 0, 0))
    x = torch.arange(-60, 60).reshape(2, 3, 4, 5)
    expected = windows.gather(x.double())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        image = x.to(torch.int8).contiguous(memory_format=memory_format)
        assert torch.equal(windows.gather(image).double(), expected)
    assert torch.equal(windows.gather(x.to(torch.int8)[:, ::2]).double(), windows.gather(x[:, ::2].double()))
