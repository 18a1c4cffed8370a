"""The quantizer: its definition, its rounding, and the inputs that break quantizers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfuse.quantization import Quantized, ShiftQuant
from normfuse.quantization.shiftquant import channel_ranges
from tests.quantization.operands import RANGES, spread

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def assert_same(a: Quantized, b: Quantized) -> None:
    assert (a.dim, a.bits, a.groups, a.dtype) == (b.dim, b.bits, b.groups, b.dtype)
    for x, y in ((a.values, b.values), (a.scale, b.scale), (a.shift, b.shift)):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def worst_step(q: Quantized, x: torch.Tensor) -> float:
    """Return the largest error in units of the step of its channel."""
    steps = q.channel_scales().double().reshape([-1 if d == q.dim else 1 for d in range(x.dim())])
    return float(((q.dequantize(torch.float64) - x.double()) / steps).abs().max())


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("groups", [1, 2, 4, 7])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_definition(ranges: str, groups: int, bits: int):
    """The shift is the largest whose threshold covers the channel; nothing is clipped, or off by over half a step."""
    x = RANGES[ranges](9, 20)
    q = ShiftQuant(bits, groups)(x)
    limit, r = 2 ** (bits - 1) - 1, x.abs().amax(0)
    for k in range(20):
        covering = [g for g in range(groups) if r[k] <= math.ldexp(float(r.max()), -g)]
        assert int(q.shift[k]) == max(covering)
    assert int(q.values.abs().max()) <= limit
    assert worst_step(q, x) <= 0.5 + 1e-12
    if r.max() > 0:
        assert float(q.scale) == float(r.max()) / limit
        assert int(q.values.abs().max()) == limit


def test_logarithm_is_not_rounded():
    """A range a little over a power of two keeps the coarser scale."""
    edge = torch.tensor([1.0, 0.5, math.nextafter(0.5, 1.0), 0.25, math.nextafter(0.25, 0.0)], dtype=torch.float64)
    assert ShiftQuant(8, 4)(edge.expand(3, 5)).shift.tolist() == [0, 1, 0, 2, 2]


def test_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert ShiftQuant(8, 1)(x, dim=0).values.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_axis_and_rank(dim: int):
    x = spread(6, 20).reshape(4, 6, 5)
    q = ShiftQuant(6, 3)(x, dim=dim)
    assert q.dim == dim % 3
    assert q.shift.shape == (x.shape[dim],)
    moved = ShiftQuant(6, 3)(x.movedim(dim, -1))
    assert torch.equal(moved.values, q.values.movedim(dim, -1))
    assert torch.equal(q.dequantize(), moved.dequantize().movedim(-1, dim))


def test_transpose():
    q = ShiftQuant()(spread(3, 5))
    assert torch.equal(q.T.dequantize(), q.dequantize().T)
    assert (q.T.dim, q.T.shape) == (0, (5, 3))
    with pytest.raises(ValueError, match="matrix"):
        _ = ShiftQuant()(torch.ones(2, 2, 2)).T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype):
    x = spread(8, 10).to(dtype)
    q = ShiftQuant(8, 4)(x)
    assert (q.values.dtype, q.shift.dtype) == (torch.int8, torch.int8)
    assert q.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert q.dequantize().dtype == dtype
    assert q.dequantize(torch.float64).dtype == torch.float64
    assert worst_step(q, x) <= 0.5 + 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["subnormal", "smallest", "largest"])
def test_ends_of_the_number_range(dtype: torch.dtype, size: str):
    """Nothing becomes infinite, and what is lost is below the smallest step."""
    info = torch.finfo(dtype)
    magnitude = {"subnormal": info.tiny / 4, "smallest": info.smallest_normal, "largest": info.max}[size]
    x = (torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6) * magnitude).to(dtype)
    q = ShiftQuant(8, 4)(x)
    assert bool(torch.isfinite(q.dequantize()).all())
    assert worst_step(q, x) <= 0.5 + 1e-3
    if size == "largest":
        assert int(q.values.abs().max()) == 127


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)])
def test_empty(shape: tuple[int, ...]):
    x = torch.zeros(shape)
    q = ShiftQuant()(x)
    assert q.dequantize().shape == shape
    assert q.shift.shape == (shape[-1],)


def test_vector():
    x = torch.tensor([8.0, -4.0, 1.0])
    q = ShiftQuant(8, 4)(x)
    assert q.shift.tolist() == [0, 1, 3]
    assert worst_step(q, x) <= 0.5 + 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["max", 90.0])
def test_not_finite(bad: float, kind: float):
    x = spread(4, 6)
    x[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        ShiftQuant(range=kind)(x)


@pytest.mark.parametrize("x", [torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.complex64)])
def test_not_floating_point(x: torch.Tensor):
    with pytest.raises(TypeError, match="floating point"):
        ShiftQuant()(x)


def test_no_axis():
    with pytest.raises(ValueError, match="no axis"):
        ShiftQuant()(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "bits"),
        ({"bits": 9}, "bits"),
        ({"groups": 0}, "groups"),
        ({"groups": 33}, "groups"),
        ({"rounding": "up"}, "rounding"),
        ({"range": "min"}, "range"),
        ({"range": 0.0}, "range"),
        ({"range": 101.0}, "range"),
    ],
)
def test_bad_options(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ShiftQuant(**options)


def test_generator_without_stochastic_rounding():
    with pytest.raises(ValueError, match="stochastic"):
        ShiftQuant()(torch.ones(2, 2), generator=torch.Generator())


# a percentile


def test_percentile_clips_what_lies_above():
    x = spread(1000, 4, octaves=0.0)
    q = ShiftQuant(8, 1, range=90.0)(x)
    r = x.abs().sort(0).values[899]  # nearest rank: 900th of 1000
    assert torch.equal(channel_ranges(x, 1, 90.0), r)
    assert float(q.scale) == float(r.max()) / 127
    inside = x.abs() <= r.max()
    assert bool((~inside).any())
    assert bool((q.values[~inside].abs() == 127).all())
    assert float((q.dequantize() - x)[inside].abs().max()) <= float(q.scale) / 2 * (1 + 1e-9)


def test_percentile_of_hundred_is_the_maximum():
    x = spread(50, 8)
    assert_same(ShiftQuant(range=100)(x), ShiftQuant()(x))


def test_percentile_of_zero_keeps_a_sparse_channel():
    x = torch.zeros(100, 2)
    x[7] = 5.0
    q = ShiftQuant(range=90)(x)
    assert torch.equal(q.dequantize(), x)


# stochastic rounding


def test_stochastic_rounding_is_unbiased():
    """The mean of many roundings is within 4.5 standard errors of the value, for every element."""
    x, repeats = spread(4, 8, octaves=4), 20_000
    generator = torch.Generator().manual_seed(0)
    many = ShiftQuant(4, 3, "stochastic")(x.expand(repeats, 4, 8), generator=generator)
    values = many.values.double()
    scaled = x / many.channel_scales()
    fraction = scaled - scaled.floor()
    error = (values.mean(0) - scaled) * math.sqrt(repeats)
    sure = (fraction * (1 - fraction)).sqrt() < 1e-6
    assert bool((error[sure].abs() < 1e-3).all())
    assert float((error[~sure] / (fraction * (1 - fraction))[~sure].sqrt()).abs().max()) < 4.5
    assert float(values.var(0).max()) <= 0.25 * 1.05


def test_stochastic_rounding_goes_to_a_neighbour_and_leaves_integers():
    x = spread(50, 8)
    q = ShiftQuant(6, 3, "stochastic")(x, generator=torch.Generator().manual_seed(1))
    assert 0.5 < worst_step(q, x) < 1
    whole = torch.arange(-31, 32).double().unsqueeze(1)
    assert torch.equal(ShiftQuant(6, 1, "stochastic")(whole).values, whole.to(torch.int8))


def test_generator_decides():
    x, quantizer = spread(20, 8), ShiftQuant(4, 2, "stochastic")
    first, again = (quantizer(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert_same(first, again)
    other = quantizer(x, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(first.values, other.values)


# as a value


def test_copies_and_pickles():
    q = ShiftQuant(5, 3)(spread(4, 6))
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert_same(other, q)
    quantizer = ShiftQuant(5, 3, "stochastic", 99.0)
    assert pickle.loads(pickle.dumps(quantizer)) == copy.deepcopy(quantizer) == quantizer


def test_result_is_detached_and_input_untouched():
    x = spread(4, 6).requires_grad_()
    before = x.detach().clone()
    q = ShiftQuant()(x)
    assert not q.dequantize().requires_grad
    assert torch.equal(x, before)


def test_compiles():
    x = spread(8, 16).float()
    compiled = torch.compile(lambda t: ShiftQuant(6, 3)(t).dequantize(), backend="eager")
    assert torch.equal(compiled(x), ShiftQuant(6, 3)(x).dequantize())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 9),
    bits=st.integers(3, 8),
    groups=st.integers(1, 32),
    octaves=st.floats(0, 60),
    seed=st.integers(0, 99),
)
def test_any_shape(rows: int, columns: int, bits: int, groups: int, octaves: float, seed: int):
    x = spread(rows, columns, seed, octaves=octaves)
    q = ShiftQuant(bits, groups)(x)
    assert q.shape == x.shape
    if x.numel():
        assert worst_step(q, x) <= 0.5 + 1e-12
        assert int(q.values.abs().max()) <= q.limit
        assert 0 <= int(q.shift.min()) <= int(q.shift.max()) < groups
