"""The integer norms: errors within their bounds, kernels equal to the definition, layers as modules."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse import native
from normfuse.errors import NormfuseError
from normfuse.layers import L1BatchNorm1d, L1BatchNorm2d, L1LayerNorm, L1RMSNorm, PowerNorm
from normfuse.quantization import (
    IntegerL1BatchNorm,
    IntegerL1LayerNorm,
    IntegerL1RMSNorm,
    integer_arithmetic,
    native_norms,
)
from normfuse.quantization.integer_arithmetic import make_form
from tests.quantization.norm_rows import SIZES, hard_rows, layer

FORMS = [(6, 2, 127), (8, 4, 127), (10, 4, 7), (12, 7, 31)]
TARGETS = ["-march=native", "-mno-avx512vnni", "-mavx2", "-mno-sse3"]
INTEGER: dict[Any, Any] = {L1LayerNorm: IntegerL1LayerNorm, L1RMSNorm: IntegerL1RMSNorm}
both = pytest.mark.parametrize("kind", INTEGER, ids=["layer", "rms"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep libraries in a folder of the test; without a build there is none."""
    monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("NORMFUSE_KERNELS", raising=False)
    native_norms.kernels.forget()
    yield tmp_path
    native_norms.kernels.forget()


@pytest.fixture(scope="module", params=TARGETS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> native_norms.IntegerNorms:
    """Compile the kernels for this processor, without its VNNI, for AVX2, and without vector types."""
    target = tmp_path_factory.mktemp("kernels") / "kernels.so"
    if request.param == "-mavx2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor has no AVX2")
    plain = ["-march=x86-64"] if request.param in ("-mavx2", "-mno-sse3") else []
    compile_or_skip(target, [*plain, request.param] if request.param in ("-mavx2", "-mno-avx512vnni") else plain)
    return native_norms.IntegerNorms(target)


def compile_or_skip(target: Path, options: list[str], library: native.Library = native_norms.LIBRARY) -> None:
    try:
        library.compile(target, options)
    except NormfuseError as error:
        pytest.skip(str(error))


def exact(norm: nn.Module, x: Tensor, scale: float) -> Tensor:
    return norm(x.double() * scale).detach()


def reach(norm: Any, integer: Any, x: Tensor) -> Tensor:
    """Return where the normalized values are within what the integers represent."""
    plain = type(norm)(norm.normalized_shape, norm.eps, False, gaussian=norm.gaussian)
    return exact(plain, x, integer.input_scale).abs() <= integer.peak


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gaussian", [False, True])
@both
def test_error_is_within_its_bound(bits: int, size: int, gaussian: bool, kind: Any):
    norm, x = layer(size, kind=kind, gaussian=gaussian), hard_rows(size)
    integer = INTEGER[kind].from_float(norm, 0.05, 4 / (2 ** (bits - 1) - 1), bits)
    expected = (exact(norm, x, 0.05) / integer.output_scale).clamp(-integer.limit, integer.limit)
    found = integer(x)
    where = reach(norm, integer, x)
    assert found.dtype == torch.int8
    assert int(found.abs().max()) <= integer.limit
    assert float((found - expected).abs()[where].max()) <= integer.error_bound()
    assert integer.error_bound() < 1


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
@both
def test_inputs_of_few_bits(bits: int, kind: Any):
    """Both ends in ``bits`` bits, stored in int8: the bound holds, and the integers stay within their bits."""
    norm, limit = layer(200, kind=kind), 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(bits)
    x = (torch.randn(300, 200, generator=generator) * limit / 3 + limit / 4).round().clamp(-limit, limit).to(torch.int8)
    integer = INTEGER[kind].from_float(norm, 3 / limit, 4 / limit, bits)
    expected = (exact(norm, x, 3 / limit) * limit / 4).clamp(-limit, limit)
    found = integer(x)
    assert int(found.abs().max()) == limit
    assert float((found - expected).abs().max()) <= integer.error_bound() < 1


@pytest.mark.parametrize("input_scale", [1e-6, 1e-3, 1.0, 50.0])
@both
def test_bound_holds_for_any_input_scale(input_scale: float, kind: Any):
    """Down to steps that are small beside eps, where rows are far from normalized."""
    norm, x = layer(96, kind=kind), hard_rows(96)
    integer = INTEGER[kind].from_float(norm, input_scale, 0.04)
    expected = (exact(norm, x, input_scale) / 0.04).clamp(-127, 127)
    assert float((integer(x) - expected).abs()[reach(norm, integer, x)].max()) <= integer.error_bound()


@both
def test_peak_covers_what_is_not_clipped(kind: Any):
    """With gains alike, every value beyond the peak is clipped in exact arithmetic too; so nothing is lost."""
    norm, x = layer(300, kind=kind, spread=0.2), hard_rows(300)
    with torch.no_grad():
        norm.weight.masked_fill_(norm.weight == 0, 1)
    integer = INTEGER[kind].from_float(norm, 0.1, 0.05)
    expected = (exact(norm, x, 0.1) / 0.05).clamp(-127, 127)
    assert float((integer(x) - expected).abs().max()) <= integer.error_bound()
    assert bool((~reach(norm, integer, x)).any())


def test_bound_is_not_loose():
    """On random rows the largest error comes within a tenth of a step of the bound."""
    norm = layer(512)
    integer = IntegerL1LayerNorm.from_float(norm, 0.05, 4 / 127)
    x = (torch.randn(400, 512, generator=torch.Generator().manual_seed(0)) * 30).round().clamp(-127, 127).to(torch.int8)
    expected = (exact(norm, x, 0.05) * 127 / 4).clamp(-127, 127)
    assert integer.error_bound() - 0.15 < float((integer(x) - expected).abs().max()) <= integer.error_bound()


@torch.no_grad()
def test_constant_rows_give_the_shift():
    norm = layer(65)
    integer = IntegerL1LayerNorm.from_float(norm, 0.3, 0.02)
    x = torch.tensor([127, 3, 0, -128]).unsqueeze(1).expand(4, 65).to(torch.int8)
    assert norm.bias is not None
    assert torch.equal(integer(x)[0].expand(4, 65), integer(x))
    assert float((integer(x) - norm.bias / 0.02).abs().max()) <= 0.5 + 2.0**-integer.form.output


@pytest.mark.parametrize(("size", "form"), [*itertools.product(SIZES, FORMS), (4096, FORMS[1]), (2**15, FORMS[2])])
def test_kernels_equal_the_definition(library: native_norms.IntegerNorms, size: int, form: tuple[int, int, int]):
    x = hard_rows(size, seed=size)
    gain, shift = torch.randint(-32767, 32768, (2, size), generator=torch.Generator().manual_seed(size)).to(torch.int16)
    for eps, centred in itertools.product((0.0, 1e-3, 5.0, 4096.0), (True, False)):
        constants = make_form(size, 1.2533, eps, *form)
        expected = integer_arithmetic.l1_rows(x, gain, shift, constants, centred=centred)
        assert torch.equal(library.l1_rows(x, gain, shift, constants, centred=centred), expected)
        assert library.l1_rows(x[:0], gain, shift, constants, centred=centred).shape == (0, size)


def test_threads_share_the_rows(library: native_norms.IntegerNorms, monkeypatch: pytest.MonkeyPatch):
    x = hard_rows(65).repeat(4, 1)
    gain, shift = torch.full((65,), 9000, dtype=torch.int16), torch.full((65,), 8, dtype=torch.int16)
    form = make_form(65, 1.0, 1e-3, 9, 4, 127)
    expected = integer_arithmetic.l1_rows(x, gain, shift, form)
    monkeypatch.setattr(native_norms, "PART_BYTES", 1000)
    monkeypatch.setattr(native_norms.torch, "get_num_threads", lambda: 3)
    started: list[Any] = []
    start = native_norms.threading.Thread.start
    monkeypatch.setattr(native_norms.threading.Thread, "start", lambda self: (started.append(self), start(self)))
    assert torch.equal(library.l1_rows(x, gain, shift, form), expected)
    assert len(started) == 2


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (2, 5, 7), (2, 5, 3, 65), (2, 5, 0), (1, 1, 1)])
@pytest.mark.parametrize("limit", [7, 127])
def test_affine_kernels_equal_the_definition(library: native_norms.IntegerNorms, shape: tuple[int, ...], limit: int):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    multiplier = torch.randint(-(2**22), 2**22, shape[1:2], generator=generator).to(torch.int32)
    addend = torch.randint(-(2**30), 2**30, shape[1:2], generator=generator).to(torch.int32)
    down = torch.arange(shape[1]).to(torch.int32) * 22 // 5
    expected = integer_arithmetic.affine(x, multiplier, addend, down, limit)
    forms = [x, x.transpose(0, -1).contiguous().transpose(0, -1)]
    forms += [x.to(memory_format=torch.channels_last)] if x.dim() == 4 else []
    for value in forms:
        found = library.affine(value, multiplier, addend, down, limit)
        assert found.shape == x.shape
        assert torch.equal(found, expected)
        if value is forms[-1] and x.dim() == 4:
            assert found.is_contiguous(memory_format=torch.channels_last)


def test_definition_of_the_sums_is_that_of_the_formula():
    """The row's numbers against float64: R and M place each value at 2^h (x - mean) / (s + eps)."""
    x = hard_rows(300).long()
    form = make_form(300, 1.0, 0.01, 9, 4, 127)
    total = x.sum(1, keepdim=True)
    deviation = (300 * x - total).abs().sum(1, keepdim=True)
    rows = integer_arithmetic.settle(total, form.factor * deviation + form.eps, form)
    mean, s = total / 300, deviation / 300**2
    z = (x - mean) / (s + 0.01) * 2**9
    found = (x - torch.where(rows.wide, 0, rows.centre)) * 2.0**rows.shift * rows.scale / 2**15 - rows.offset
    inside = (z.abs() < 2**13) & (rows.wide | ((x - rows.centre).abs() < 2 ** (15 - rows.shift)))
    assert bool(rows.wide.any())
    assert bool((~rows.wide).any())
    assert float(((found - z).abs() - z.abs() * 2**-14)[inside].max()) < 2.1


def batch_norm(channels: int, cls: Any = L1BatchNorm2d, seed: int = 0) -> Any:
    norm = cls(channels, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_deviation):
            tensor.copy_(torch.randn(channels, generator=generator, dtype=torch.float64) * 10)
        norm.running_deviation.abs_()
        norm.weight[1] = 0
    return norm.eval()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("scales", [(0.1, 0.05), (1e-4, 1.0), (3.0, 0.01)])
def test_batch_norm_error_is_within_its_bound(bits: int, scales: tuple[float, float]):
    norm = batch_norm(40)
    x = hard_rows(64).reshape(-1, 2, 4, 8).repeat(1, 20, 1, 1)
    integer = IntegerL1BatchNorm.from_float(norm, *scales, bits)
    expected = (exact(norm, x, scales[0]) / scales[1]).clamp(-integer.limit, integer.limit)
    assert float((integer(x) - expected).abs().max()) <= integer.error_bound()
    assert 0.5 <= integer.error_bound() < 1 or scales[0] > 1


@pytest.mark.parametrize("kind", [*INTEGER, None])
def test_modules(kind: Any):
    """The same with and without kernels, for any layout; state, copies and pickles carry the constants."""
    make = INTEGER[kind].from_float if kind else None
    integer = make(layer((5, 8), kind=kind), 0.1, 0.05) if make else None
    integer = integer or IntegerL1BatchNorm.from_float(batch_norm(5), 0.1, 0.05, 6)
    x = hard_rows(80).reshape(34, 2, 5, 8)
    x = x if make else x.transpose(1, 2)
    expected = integer(x)
    other = make(layer((5, 8), kind=kind, seed=3), 1.0, 0.5) if make else None
    other = other or IntegerL1BatchNorm.from_float(batch_norm(5, seed=3), 0.3, 0.5)
    other.load_state_dict(integer.state_dict())
    stored = io.BytesIO()
    torch.save(integer.state_dict(), stored)
    stored.seek(0)
    third = copy.deepcopy(integer).half()  # no buffer is floating-point
    third.load_state_dict(torch.load(stored, weights_only=True))
    for module in (other, third):
        assert torch.equal(module(x), expected)
    assert "input_scale=0.1" in repr(other)
    try:
        native_norms.kernels.build()
    except NormfuseError as error:
        pytest.skip(str(error))
    with torch.inference_mode():
        assert torch.equal(integer(x), expected)
    assert torch.equal(integer(x.contiguous()), expected)
    assert integer(x[:0]).shape == x[:0].shape


def test_nothing_is_compiled_by_itself(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a process was started"))
    IntegerL1LayerNorm.from_float(layer(8), 0.1, 0.1)(hard_rows(8))
    assert native_norms.kernels.get() is None
    assert not list(cache.iterdir())


def test_kernels_that_round_otherwise_are_not_used(cache: Path):
    wrong, target = cache / "wrong.c", cache / "wrong.so"
    wrong.write_text(native_norms.LIBRARY.source.read_text().replace("+ 16384", "+ 16385").replace("mulhrs", "mulhi"))
    compile_or_skip(target, [], replace(native_norms.LIBRARY, source=wrong))
    assert native_norms.kernels.load(target) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: IntegerL1LayerNorm.from_float(layer(8), 0.0, 0.1),
        lambda: IntegerL1LayerNorm.from_float(layer(8), 0.1, float("inf")),
        lambda: IntegerL1LayerNorm.from_float(layer(8), 0.1, 0.1, bits=9),
        lambda: IntegerL1LayerNorm.from_float(layer(8), 0.1, 1e-6),
        lambda: IntegerL1LayerNorm.from_float(layer(8), 1e-12, 0.1),
        lambda: IntegerL1LayerNorm.from_float(L1LayerNorm(2**15 + 1), 0.1, 0.1),
        lambda: IntegerL1BatchNorm.from_float(batch_norm(3), 1e9, 1e-3),
        lambda: IntegerL1BatchNorm.from_float(batch_norm(3), 0.1, -1.0),
        lambda: IntegerL1LayerNorm.from_float(layer(8), 0.1, 0.1)(torch.zeros(2, 7, dtype=torch.int8)),
        lambda: IntegerL1BatchNorm.from_float(batch_norm(3), 0.1, 0.1)(torch.zeros(2, 4, dtype=torch.int8)),
    ],
)
def test_wrong_values(make: Any):
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own text
        make()


def test_wrong_types():
    for call in (
        lambda: IntegerL1LayerNorm.from_float(nn.LayerNorm(3), 0.1, 0.1),
        lambda: IntegerL1LayerNorm.from_float(L1RMSNorm(3), 0.1, 0.1),
        lambda: IntegerL1RMSNorm.from_float(L1LayerNorm(3), 0.1, 0.1),
        lambda: IntegerL1BatchNorm.from_float(PowerNorm(3), 0.1, 0.1),
        lambda: IntegerL1LayerNorm.from_float(layer(8), 0.1, 0.1)(torch.zeros(2, 8)),
        lambda: IntegerL1BatchNorm.from_float(batch_norm(3, L1BatchNorm1d), 0.1, 0.1)(torch.zeros(2, 3)),
    ):
        with pytest.raises(TypeError):
            call()
