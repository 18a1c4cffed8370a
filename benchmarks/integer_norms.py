"""int8 L1 and L2 LayerNorm and RMSNorm on one core, beside copying the same bytes, float32, and compiled code.

    python benchmarks/integer_norms.py [--rounds 40] [--out benchmarks/results/integer_norms-cpu.json]

Times are process CPU time of calls that take turns; ratios are those within a round: median and quartiles. The L2
kernels (``integer_l2.c``) share blocks, output pass and compiler options with the L1 kernels and take both moments in
one pass; one takes its root in double precision, the other bit by bit in integers. Where the processor has VNNI, the
kernels of both use it for their sums, and are timed without it too. float32 variants move four times the
bytes. The kernels are compiled into a temporary folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._environment import environment
from benchmarks._timing import turns
from normfuse.quantization import integer_arithmetic, native_norms
from normfuse.quantization.integer_arithmetic import NormForm, make_form

SHAPES = ((8192, 768), (1024, 1024), (64, 4096))
BYTES_PER_ROUND = 8_000_000  # of input
RATIOS = (
    ("int8 L1", "copy"),
    ("int8 L2", "copy"),
    ("int8 L2", "int8 L1"),
    ("int8 L2, integer root", "int8 L1"),
    ("int8 L2, integer root, without VNNI", "int8 L1 without VNNI"),
    ("int8 L1 without VNNI", "copy"),
    ("int8 L2 without VNNI", "int8 L1 without VNNI"),
    ("int8 L1 RMS", "copy"),
    ("int8 L2 RMS", "int8 L1 RMS"),
    ("compiled integer L1", "int8 L1"),
    ("float32 layer_norm", "int8 L1"),
    ("compiled float32 L1", "int8 L1"),
)
FRACTION, OUTPUT, GAIN, STEPS = 10, 4, 32, 127


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description="time integer norms")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/integer_norms-cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": environment(), "threads": 1, "clock": "process CPU time", "shapes": {}}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        libraries = {"": built(Path(folder))}
        if "avx512_vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            libraries[" without VNNI"] = built(Path(folder) / "plain", "-mno-avx512vnni")
        for shape in SHAPES:
            calls = {name: repeated(call, shape) for name, call in variants(libraries, *shape).items()}
            rounds = turns(calls, rounds=options.rounds, warmup=4, clock=time.process_time, shuffled=True)
            times = {name: [value / repeats(shape) for value in values] for name, values in rounds.items()}
            result["shapes"]["x".join(map(str, shape))] = summary(times)
            print(f"{shape[0]} x {shape[1]}, load {os.getloadavg()[0]:.1f}")
            for name, (low, median, high) in result["shapes"]["x".join(map(str, shape))]["ratios"].items():
                print(f"  {name:<60} {median:.2f} ({low:.2f} to {high:.2f})")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def built(folder: Path, *options: str) -> native_norms.IntegerNorms:
    """Return the L1 and L2 kernels, compiled for this processor."""
    target = folder / "integer_norms.so"
    source = Path(__file__).with_name("integer_l2.c")
    library = replace(native_norms.LIBRARY, source=source, linked=("-lm",))
    library.compile(target, [f"-I{native_norms.LIBRARY.source.parent}", *options])
    return native_norms.IntegerNorms(target)


def variants(libraries: dict[str, native_norms.IntegerNorms], rows: int, size: int) -> dict[str, Callable[[], object]]:
    """Return the calls to time on the same rows; the L1 kernels are exact, those of L2 within a step of the formula."""
    x = (30 * torch.randn(rows, size)).round().clamp(-127, 127).to(torch.int8)
    values, copy = x.float(), torch.empty_like(x)
    gain = torch.full((size,), GAIN << (15 + OUTPUT - FRACTION), dtype=torch.int16)
    shift = torch.full((size,), 1 << (OUTPUT - 1), dtype=torch.int16)
    form = make_form(size, 1.0, 1e-3, FRACTION, OUTPUT, STEPS)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: copy.copy_(x)}
    for suffix, library in libraries.items():
        calls |= integer_variants(library, x, gain, shift, form, suffix)
    torch._dynamo.reset()
    weight, bias = torch.ones(2, size)
    compiled_integer = compiled_integer_l1(form)
    compiled_float = torch.compile(float_l1, fullgraph=True, dynamic=False)
    assert torch.equal(compiled_integer(x, gain, shift), integer_arithmetic.l1_rows(x, gain, shift, form))
    return {
        **calls,
        "compiled integer L1": lambda: compiled_integer(x, gain, shift),
        "float32 layer_norm": lambda: torch.nn.functional.layer_norm(values, [size], weight, bias),
        "compiled float32 L1": lambda: compiled_float(values, weight, bias),
    }


def integer_variants(
    library: native_norms.IntegerNorms, x: Tensor, gain: Tensor, shift: Tensor, form: NormForm, suffix: str
) -> dict[str, Callable[[], object]]:
    """Return the calls of one library, whose results are checked."""
    size = form.size
    form_l2 = form._replace(eps=size * size // 1000)
    l1 = functools.partial(library.l1_rows, x, gain, shift, form)
    l2 = functools.partial(library.rows, "normfuse_l2_rows", x, gain, shift, form_l2)
    integer_root = functools.partial(library.rows, "normfuse_l2_rows_integer_root", x, gain, shift, form_l2)
    assert torch.equal(l1(), integer_arithmetic.l1_rows(x, gain, shift, form))
    l1_rms = functools.partial(library.l1_rows, x, gain, shift, form, centred=False)
    l2_rms = functools.partial(library.rows, "normfuse_l2_rms_rows", x, gain, shift, form_l2)
    assert torch.equal(l1_rms(), integer_arithmetic.l1_rows(x, gain, shift, form, centred=False))
    exact = torch.nn.functional.layer_norm(x.double(), [size], eps=1e-3) * GAIN
    exact_rms = torch.nn.functional.rms_norm(x.double(), [size], eps=1e-3) * GAIN
    for call, wanted in ((l2, exact), (integer_root, exact), (l2_rms, exact_rms)):
        assert float((call() - wanted.clamp(-STEPS, STEPS)).abs().max()) < 1
    root = f"int8 L2, integer root,{suffix}" if suffix else "int8 L2, integer root"
    both: dict[str, Callable[[], object]] = {f"int8 L1{suffix}": l1, f"int8 L2{suffix}": l2, root: integer_root}
    return both if suffix else {**both, "int8 L1 RMS": l1_rms, "int8 L2 RMS": l2_rms}


def compiled_integer_l1(form: NormForm) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the definition with both passes over the rows compiled, in 32 bits; the numbers of a row are not."""

    def sums(x: Tensor) -> tuple[Tensor, Tensor]:
        value = x.to(torch.int32)
        total = value.sum(1, keepdim=True, dtype=torch.int32)
        centre = torch.div(2 * total + form.size, 2 * form.size, rounding_mode="floor")
        return total, (value - centre).abs().sum(1, keepdim=True, dtype=torch.int32)

    def more(x: Tensor, next_centre: Tensor) -> Tensor:
        return (x.to(torch.int32) - next_centre).abs().sum(1, keepdim=True, dtype=torch.int32)

    def write(x: Tensor, gain: Tensor, shift: Tensor, *row: Tensor) -> Tensor:
        return integer_arithmetic.write_rows(x, integer_arithmetic.Rows(*row), gain, shift, form)

    fast_sums: Any = torch.compile(sums, fullgraph=True, dynamic=False)
    fast_more: Any = torch.compile(more, fullgraph=True, dynamic=False)
    fast_write: Any = torch.compile(write, fullgraph=True, dynamic=False)

    def run(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        total, at_centre = fast_sums(x)
        centre = torch.div(2 * total + form.size, 2 * form.size, rounding_mode="floor")
        rest = total - form.size * centre
        deviation = form.size * at_centre.long() + rest.abs() * (fast_more(x, centre + rest.sign()) - at_centre).long()
        wide, *row = integer_arithmetic.settle(total.long(), form.factor * deviation + form.eps, form)
        return fast_write(x, gain, shift, wide, *(t.to(torch.int32) for t in row))

    return run


def float_l1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the L1 LayerNorm in floating point."""
    d = x - x.mean(1, keepdim=True)
    return d / (d.abs().mean(1, keepdim=True) + 1e-5) * weight + bias


def repeated(call: Callable[[], object], shape: tuple[int, int]) -> Callable[[], None]:
    """Return what makes the calls of a round."""

    def run() -> None:
        for _ in range(repeats(shape)):
            call()

    return run


def repeats(shape: tuple[int, int]) -> int:
    """Return how many calls take a millisecond or more."""
    return max(1, BYTES_PER_ROUND // (shape[0] * shape[1]))


def quartiles(values: list[float]) -> list[float]:
    """Return the first quartile, the median and the third quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return the JSON-ready quartiles of the times of a call and of the ratios."""
    ratios = {
        f"{one} / {other}": quartiles([a / b for a, b in zip(times[one], times[other], strict=True)])
        for one, other in RATIOS
        if one in times
    }
    seconds = {name: quartiles(values) for name, values in times.items()}
    return {"load": os.getloadavg()[0], "rounds": len(times["copy"]), "seconds": seconds, "ratios": ratios}


if __name__ == "__main__":
    main()
