"""Threads that fold, verify, load and tune at once disturb neither each other nor threads that run their own models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import normfuse
from tests.saved_net import ARCH, unfolded

ROUNDS = 8


def at_once(*jobs: Callable[[], object], rounds: int = ROUNDS) -> list[BaseException]:
    """Run every job in two threads, several times; return what they raised."""
    raised: list[BaseException] = []

    def work(job: Callable[[], object]) -> None:
        try:
            for _ in range(rounds):
                job()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_one_model_in_eight_threads(tmp_path: Path):
    model, x = unfolded().double().eval(), torch.randn(2, 3, 8, 8).double()
    expected, result = model(x), normfuse.fold(model)
    normfuse.save(result, tmp_path / "m.pt", arch=ARCH)
    modes = [module.training for module in model.modules()]
    call, default, safe = nn.Module.__call__, torch.get_default_dtype(), set(torch.serialization.get_safe_globals())

    def fold() -> None:
        assert torch.allclose(normfuse.fold(model, example_inputs=x)(x), expected)

    def verify() -> None:
        assert normfuse.verify(model, result, x)

    def inspect() -> None:
        assert normfuse.inspect(model, example_inputs=x).applied

    def load() -> None:
        assert torch.equal(normfuse.load(tmp_path / "m.pt", model=model)(x), result(x))

    assert at_once(fold, verify, inspect, load) == []
    assert nn.Module.__call__ is call
    assert torch.get_default_dtype() is default
    assert set(torch.serialization.get_safe_globals()) == safe
    assert [module.training for module in model.modules()] == modes


def test_models_of_their_own(tmp_path: Path):
    x = torch.randn(2, 3, 8, 8).double()

    def tune() -> None:
        model = unfolded().double().eval()
        expected = model(x)
        assert torch.allclose(normfuse.tune_mode(model)(x), expected)

    def fold() -> None:
        model = unfolded().double().eval()
        expected = model(x)
        assert torch.allclose(normfuse.fold(model)(x), expected)

    assert at_once(tune, fold) == []


def test_other_threads_are_not_touched():
    """Their default dtype stays, and calls of their modules enter no graph."""
    model, x = unfolded().double().eval(), torch.randn(2, 3, 8, 8).double()
    over = threading.Event()
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    seen: set[torch.dtype] = set()

    def watch() -> None:
        image = torch.ones(1, 3, 5, 5)
        while not over.is_set():
            seen.update({torch.get_default_dtype(), torch.zeros(1).dtype, own(image).dtype})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(ROUNDS):
            result = normfuse.fold(model, example_inputs=x)
            assert normfuse.verify(model.float(), result.float(), x.float())
            model.double()
    finally:
        over.set()
        watcher.join()
    assert seen == {torch.float32}


class Makes(nn.Module):
    """A forward that makes tensors of the default type, and divides integers."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.make, self.weight = make, nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.make()


MAKERS: dict[str, Callable[[], torch.Tensor]] = {
    "zeros": lambda: torch.zeros(3),
    "full": lambda: torch.full((3,), 0.1),
    "tensor": lambda: torch.tensor([0.1, 0.2, 0.3]),
    "linspace": lambda: torch.linspace(0, 1, 3),
    "arange": lambda: torch.arange(0.05, 0.35, 0.1),
    "rand": lambda: torch.rand(3),
    "division": lambda: torch.arange(3) / 7,
    "root": lambda: torch.arange(3).sqrt(),
    "mean": lambda: torch.arange(3).float().mean(),
    "named": lambda: torch.zeros(3, dtype=torch.float32) + torch.full((3,), 0.1, dtype=torch.float32),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_the_judge_reads_every_float_as_float64(maker: str):
    from normfuse.rerun import run

    model = Makes(MAKERS[maker]).double()
    x = torch.zeros(3, dtype=torch.float64)
    got = run(model, x, torch.float64, promote=True)
    try:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        expected = {"named": lambda: torch.full((3,), 0.1)}.get(maker, MAKERS[maker])()
    finally:
        torch.set_default_dtype(torch.float32)
    expected = torch.arange(3).double().mean() if maker == "mean" else expected
    assert got.dtype is torch.float64
    assert torch.equal(got, expected.expand(3).double())
