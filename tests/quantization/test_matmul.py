"""The integer product equals its definition bit for bit, on every engine, range and grouping."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfuse.quantization import Prepared, Quantized, ShiftQuant, matmul, shiftquant_matmul
from normfuse.quantization.engine_choice import is_exact, limit_class
from normfuse.quantization.integer_engines import ENGINES, INT64, Engine
from normfuse.quantization.matmul import integer_product
from tests.parity import error
from tests.quantization.operands import RANGES, product_by_definition, shifts, spread

FORMATS = [
    ((8, 1), (8, 1)),  # int8 as it is
    ((4, 5), (4, 5)),  # both shifted within int8
    ((6, 3), (8, 1)),
    ((8, 4), (8, 1)),  # two digits
    ((4, 2), (8, 4)),  # the shift of the right operand goes to the left
    ((8, 4), (8, 4)),
    ((8, 9), (8, 9)),  # wide: sums in int64
    ((3, 16), (5, 4)),
]


def quantized(rows: int, columns: int, bits: int, groups: int, seed: int = 0, *, dim: int = 1) -> Quantized:
    return ShiftQuant(bits, groups)(spread(rows, columns, seed, octaves=10), dim=dim)


@pytest.fixture(params=[e for e in (*ENGINES, INT64) if e.device in (None, "cpu")], ids=lambda e: e.name)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Make every product run on one engine."""
    only: Engine = request.param
    monkeypatch.setattr(matmul, "choose", lambda *args, **kwargs: only)
    return only


def is_rejected(engine: Engine, a: Quantized, b: Prepared) -> bool:
    """Return whether the probe keeps a product from an engine, for one of the digits it consists of."""
    shift, most = matmul._left_shift(a, b)
    limits = [(limit_class(limit), limit_class(b.limit)) for _, limit in matmul._digits(a, shift, most)]
    return not all(is_exact(engine, torch.device("cpu"), *pair) for pair in limits)


@pytest.mark.parametrize(("left", "right"), FORMATS, ids=str)
@pytest.mark.parametrize("ranges", RANGES)
def test_every_engine_is_exact_or_rejected(engine: Engine, ranges: str, left: tuple[int, int], right: tuple[int, int]):
    a, b = ShiftQuant(*left)(RANGES[ranges](7, 33)), ShiftQuant(*right)(spread(5, 33, 1, octaves=10))
    for prepared in (Prepared(b), Prepared(b, reused=False)):
        if not is_rejected(engine, a, prepared):
            assert torch.equal(shiftquant_matmul(a, prepared), product_by_definition(a, b))
    assert not is_rejected(INT64, a, Prepared(b))


@pytest.mark.parametrize(("left", "right"), FORMATS, ids=str)
@pytest.mark.parametrize("ranges", RANGES)
def test_chosen_engines(ranges: str, left: tuple[int, int], right: tuple[int, int]):
    a, b = ShiftQuant(*left)(RANGES[ranges](19, 70)), ShiftQuant(*right)(RANGES[ranges](11, 70))
    assert torch.equal(shiftquant_matmul(a, b), product_by_definition(a, b))


@pytest.mark.parametrize(("left", "right"), FORMATS, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_of_the_type_over_a_long_sum(left: tuple[int, int], right: tuple[int, int], sign: int):
    """Every product is the largest there is, all of one sign: nothing saturates, overflows or is rounded."""
    ones = torch.ones(3, 4099, dtype=torch.float64)
    a, b = ShiftQuant(*left)(sign * ones), ShiftQuant(*right)(ones[:2])
    sums, shifted = integer_product(a, Prepared(b))
    expected = sign * 4099 * a.limit * b.limit * 2**shifted
    assert sums.long().tolist() == [[expected] * 2] * 3
    assert torch.equal(shiftquant_matmul(a, b), product_by_definition(a, b))


def test_sums_beyond_int32():
    """K qa qb reaches 2^31: the sums are kept in int64, in parts of K."""
    ones = torch.ones(2, 140_001, dtype=torch.float64)
    a, b = ShiftQuant(8, 1)(ones), ShiftQuant(8, 1)(-ones)
    sums, _ = integer_product(a, Prepared(b))
    assert sums.dtype == torch.int64
    assert sums.tolist() == [[-140_001 * 127**2] * 2] * 2


def test_sums_beyond_63_bits_are_refused():
    with pytest.raises(ValueError, match="63 bits"):
        shiftquant_matmul(quantized(2, 64, 8, 32), quantized(2, 64, 8, 32))


@pytest.mark.parametrize("dims", [(1, 1), (0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize(("left", "right"), FORMATS, ids=str)
def test_shift_along_a_kept_axis(dims: tuple[int, int], left: tuple[int, int], right: tuple[int, int]):
    """It scales rows or columns of the result by powers of two, which is exact: operands along a row too."""
    a, b = quantized(6, 20, *left, dim=dims[0]), quantized(4, 20, *right, 1, dim=dims[1])
    plain = [dataclasses.replace(q, shift=torch.zeros_like(q.shift)) if q.dim == 0 else q for q in (a, b)]
    kept = [shifts(q) if q.dim == 0 else torch.ones(1, 1).double() for q in (a, b)]
    expected = product_by_definition(*plain) * kept[0] * kept[1].T
    assert torch.equal(shiftquant_matmul(a, b), expected)
    assert error(a.dequantize() @ b.dequantize().T, expected) < 1e-14


@pytest.mark.parametrize("left", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("right", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(left: torch.dtype, right: torch.dtype):
    a, b = ShiftQuant()(spread(6, 20).to(left)), ShiftQuant()(spread(4, 20, 1).to(right))
    y = shiftquant_matmul(a, b)
    assert y.dtype == torch.promote_types(left, right)
    rounding = torch.finfo(y.dtype).eps
    assert error(product_by_definition(a, b), y) < 3 * max(rounding, torch.finfo(torch.float32).eps)


def test_transposed_and_strided_operands():
    a, b = quantized(20, 30, 8, 4, dim=0).T, quantized(20, 9, 6, 3, 1, dim=0).T
    assert torch.equal(shiftquant_matmul(a, b), product_by_definition(a, b))


def test_prepared_operand_is_used_many_times():
    a, b = quantized(6, 40, 8, 4), quantized(5, 40, 8, 2, 1)
    prepared = Prepared(b)
    first = shiftquant_matmul(a, prepared)
    assert torch.equal(first, shiftquant_matmul(a, prepared))
    assert torch.equal(first, shiftquant_matmul(a, b))
    other = quantized(9, 40, 4, 3, 2)
    assert torch.equal(shiftquant_matmul(other, prepared), product_by_definition(other, b))


def test_autocast_does_not_round_the_integers(engine: Engine):
    a, b = quantized(6, 40, 8, 4), quantized(5, 40, 8, 1, 1)
    if is_rejected(engine, a, Prepared(b)):
        pytest.skip("not exact on this machine")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shiftquant_matmul(a, b), product_by_definition(a, b))


def test_default_dtype_does_not_matter(engine: Engine):
    a, b = quantized(6, 40, 8, 1), quantized(5, 40, 8, 1, 1)
    if is_rejected(engine, a, Prepared(b)):
        pytest.skip("not exact on this machine")
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(shiftquant_matmul(a, b), product_by_definition(a, b))
    finally:
        torch.set_default_dtype(torch.float32)


def test_wrong_shapes():
    with pytest.raises(ValueError, match="same K"):
        shiftquant_matmul(quantized(2, 3, 8, 1), quantized(2, 4, 8, 1))
    with pytest.raises(ValueError, match="matrices"):
        shiftquant_matmul(ShiftQuant()(torch.ones(2, 2, 2)), quantized(2, 2, 8, 1))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 9)),
    left=st.tuples(st.integers(3, 8), st.integers(1, 12)),
    right=st.tuples(st.integers(3, 8), st.integers(1, 12)),
    seed=st.integers(0, 99),
)
def test_any_shape_and_format(shape: tuple[int, int, int], left: tuple[int, int], right: tuple[int, int], seed: int):
    m, k, n = shape
    a, b = quantized(m, k, *left, seed), quantized(n, k, *right, seed + 1)
    y = shiftquant_matmul(a, b)
    assert y.shape == (m, n)
    assert torch.equal(y, product_by_definition(a, b))
