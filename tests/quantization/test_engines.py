"""The probe finds engines that saturate, round or stall, and the choice never falls on one of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from normfuse.quantization import engine_choice
from normfuse.quantization.engine_choice import choose, exact_engines, extremes, is_exact, odd_sums
from normfuse.quantization.integer_engines import ENGINES, INT64, Engine, reference

CPU = torch.device("cpu")
FLOAT32 = next(e for e in ENGINES if e.name == "float32")
PAIRS = [(127, 127), (64, 127), (8, 127), (112, 112), (112, 7), (56, 56), (7, 7), (3, 1)]


def in_pairs(a: Tensor, b: Tensor, offset: int) -> Tensor:
    """Multiply as CPUs without VNNI do: uint8 times int8, pairs of products added with saturation in 16 bits."""
    pad = a.shape[1] % 2
    a, b = (torch.nn.functional.pad(t.long(), (0, pad)) for t in (a, b))
    products = ((a + offset).unsqueeze(1) * b.unsqueeze(0)).unflatten(2, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    return (products.sum(-1) - offset * b.sum(1)).to(torch.int32)


def engine(multiply: Callable[[Tensor, Tensor, int], Tensor], *, largest_sum: int = 2**31 - 1) -> Engine:
    return Engine("of the test", "cpu", largest_sum, lambda b: b, multiply)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that sets which engines there are to choose from."""
    engine_choice._choose.cache_clear()
    yield lambda *engines: monkeypatch.setattr(engine_choice, "ENGINES", engines)
    engine_choice._choose.cache_clear()


@pytest.mark.parametrize(("qa", "qb"), PAIRS)
def test_accepted_engines_equal_the_reference(qa: int, qb: int):
    """At shapes that the probe does not try, on extremes and at random."""
    accepted = exact_engines(CPU, qa, qb)
    assert {"float32", "float64"} <= {e.name for e in accepted}
    for e in accepted:
        for m, k, n in [(9, 1, 6), (2, 5, 1), (33, 100, 17), (8, min(1001, e.depth(qa, qb)), 40)]:
            a, b = extremes(m, k, qa, first=7), extremes(n, k, qb, first=6)
            assert torch.equal(e.multiply(a, e.pack(b), qa).double(), reference(a, b).double()), e.name


@pytest.mark.parametrize("offset", [127, 128])
def test_saturation_in_pairs_is_found(offset: int):
    saturating = engine(lambda a, b, qa: in_pairs(a, b, offset))
    assert not is_exact(saturating, CPU, 127, 127)
    assert is_exact(saturating, CPU, 63, 63)
    smaller = engine(lambda a, b, qa: in_pairs(a, b, qa))  # an offset no larger than needed leaves more room
    assert is_exact(smaller, CPU, 64, 127)
    assert not is_exact(smaller, CPU, 65, 127)


@pytest.mark.parametrize(("qa", "qb"), [(127, 127), (112, 112), (112, 7), (3, 1)])
def test_rounding_at_depth_is_found(qa: int, qb: int):
    """A float32 engine that claims one bit more than float32 has: its full depth is tried."""
    claims = dataclasses.replace(FLOAT32, largest_sum=2**25)
    deep_enough = 2**25 // (qa * qb) <= claims.depth(qa, qb)
    assert is_exact(claims, CPU, qa, qb) != deep_enough
    assert is_exact(FLOAT32, CPU, qa, qb)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 7, 5), (6, 1, 5), (6, 7, 1), (1, 1, 5), (1, 7, 1), (1, 1, 1)])
def test_axes_of_one_element_in_any_layout(m: int, k: int, n: int):
    """Their strides say nothing, and are those of the transpose where that is what they were made from."""
    for e in exact_engines(CPU, 127, 127):
        a, b = extremes(m, k, 127, first=3), extremes(n, k, 127)
        expected = reference(a, b).double()
        for left in (a, a.T.contiguous().T, a.T.contiguous().reshape(k, m).T):
            for right in (b, b.T.contiguous().T):
                assert torch.equal(e.multiply(left, e.pack(right), 127).double(), expected), e.name


@pytest.mark.parametrize("offset", [lambda qa: 0, lambda qa: qa, lambda qa: 128], ids=["none", "qa", "128"])
@pytest.mark.parametrize(("qa", "qb"), [(127, 127), (64, 127), (127, 64), (64, 64), (127, 31), (64, 31)])
def test_rounding_before_the_offset_is_subtracted_is_found(offset: Callable[[int], int], qa: int, qb: int):
    """As oneDNN does on CPUs with AMX: the sum of ``(a + c) b`` is converted to float32 first."""

    def multiply(a: Tensor, b: Tensor, qa: int) -> Tensor:
        sums = reference(a.long() + offset(qa), b).to(torch.float32)
        return sums - (offset(qa) * b.long().sum(1)).to(torch.float32)

    honest = dataclasses.replace(engine(multiply, largest_sum=2**24), offset=offset)
    depth = honest.depth(qa, qb)
    assert (qa + offset(qa)) * qb * depth <= 2**24
    assert is_exact(honest, CPU, qa, qb)
    for beyond in (2, 3, 4):  # a few columns more than that, whatever the parity of the depth
        claims = engine(multiply, largest_sum=qa * qb * (depth + beyond))
        assert claims.depth(qa, qb) == depth + beyond
        assert not is_exact(claims, CPU, qa, qb)


@pytest.mark.parametrize("name", ["onednn", "fbgemm", "float32"])
@pytest.mark.parametrize(("qa", "qb"), PAIRS)
def test_depths_leave_room_for_offsets(name: str, qa: int, qb: int):
    """Derived from the worst order of operations, so that no machine can do worse."""
    (found,) = (e for e in ENGINES if e.name == name)
    largest = qa + {"onednn": qa, "fbgemm": 128, "float32": 0}[name]
    assert found.depth(qa, qb) * largest * qb <= 2**24


@pytest.mark.parametrize("columns", [5, 6])
@pytest.mark.parametrize("offset", [0, 1, 127, 128])
@pytest.mark.parametrize(("qa", "qb"), [(127, 127), (64, 127), (127, 64), (64, 64)])
def test_odd_sums_are_odd_and_as_large_as_can_be(qa: int, qb: int, offset: int, columns: int):
    a, b = odd_sums(columns, qa, qb)
    sums = (a.long() + offset) @ b.long().T
    least = (columns * (qa + offset) - 1) * qb - (qa + offset)  # one off in each operand
    for side in (sums[:, :3], -sums[:, 3:]):
        assert bool((side % 2 == 1).any())
        assert int(side.min()) >= least


def test_wrong_for_one_row_only_is_found():
    def multiply(a: Tensor, b: Tensor, qa: int) -> Tensor:
        return reference(a, b) if len(a) > 1 else reference(a, b) + 1

    assert not is_exact(engine(multiply), CPU, 7, 7)


def test_wrong_for_one_column_only_is_found():
    def multiply(a: Tensor, b: Tensor, qa: int) -> Tensor:
        return reference(a, b) if a.shape[1] > 1 else reference(a, b) + 1

    assert not is_exact(engine(multiply), CPU, 7, 7)


def test_slow_engine_is_given_up_after_tiny_products():
    sizes = []

    def multiply(a: Tensor, b: Tensor, qa: int) -> Tensor:
        sizes.append(a.numel() * len(b))
        time.sleep(1.5 * engine_choice.TINY_SECONDS)
        return reference(a, b)

    assert not is_exact(engine(multiply), CPU, 127, 127)
    assert max(sizes) <= 4 * 64 * 8
    assert len(sizes) <= 4


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError])
def test_missing_kernel_is_a_rejection(error: type[Exception]):
    def multiply(a: Tensor, b: Tensor, qa: int) -> Tensor:
        raise error("no kernel")

    assert not is_exact(engine(multiply), CPU, 7, 7)


def test_choice_is_fast_and_exact(offered: Callable[..., None]):
    def slower(a: Tensor, b: Tensor, qa: int) -> Tensor:
        time.sleep(0.004)
        return FLOAT32.multiply(a, b.to(torch.float32).T, qa)

    slow, wrong = engine(slower, largest_sum=2**24), engine(lambda a, b, qa: a.new_zeros(len(a), len(b)))
    offered(slow, FLOAT32, wrong)
    assert choose(CPU, 127, 127, (5, 64, 5), packed=False) is FLOAT32
    assert choose(CPU, 127, 127, (5, 64, 5), packed=True) is FLOAT32
    engine_choice._choose.cache_clear()
    offered(wrong)
    assert choose(CPU, 127, 127, (5, 64, 5), packed=False) is INT64


def test_choice_is_made_once(offered: Callable[..., None]):
    calls = []

    def multiply(a: Tensor, b: Tensor, qa: int) -> Tensor:
        calls.append(a.shape)
        return reference(a, b)

    offered(engine(multiply))
    choose(CPU, 5, 7, (50, 60, 70), packed=False)
    assert calls
    calls.clear()
    choose(CPU, 5, 7, (64, 64, 65), packed=False)  # the same powers of four
    assert not calls


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 700, 5), (2000, 3000, 1000)])
def test_choice_for_any_shape(shape: tuple[int, int, int], packed: bool):
    assert choose(CPU, 127, 127, shape, packed=packed) in exact_engines(CPU, 127, 127)


def test_probing_leaves_the_random_state():
    engine_choice._is_exact.cache_clear()
    before = torch.get_rng_state()
    exact_engines(CPU, 21, 33)
    assert torch.equal(torch.get_rng_state(), before)
